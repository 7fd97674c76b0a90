"""Data sets: what is known about one (cards.py) and where its images come from (loading.py)."""
