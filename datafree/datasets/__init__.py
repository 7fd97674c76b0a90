"""Data sets: what is known of one (cards.py) and where its images come from (loading.py)."""
