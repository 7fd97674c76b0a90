"""The programs: each says what is trained on which images; datafree.program runs it."""
