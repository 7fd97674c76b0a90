"""Measurements, run by hand: steps beside the released pipeline, memory, precision, bits of two revisions."""
