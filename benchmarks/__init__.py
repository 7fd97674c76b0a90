"""Timings, which are no tests: what a step costs here, and beside the pipeline as it was released."""
