"""Comparison with numbers of the official implementation; see `test_golden.py`."""
