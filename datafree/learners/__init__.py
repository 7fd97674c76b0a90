"""What a student step does with the images (phase 2)."""
