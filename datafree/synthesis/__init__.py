"""Sources of images and the objective that they are made under (phase 1)."""
