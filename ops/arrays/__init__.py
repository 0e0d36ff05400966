"""Ops made of functions of NumPy and SciPy."""
