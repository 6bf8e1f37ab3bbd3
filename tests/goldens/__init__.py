"""Comparison with recorded numbers of the official code: `python -m tests.goldens DIR`."""
