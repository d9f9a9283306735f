"""Measurements: run by hand, never as tests; results are kept beside them."""
