"""Ops made from functions of NumPy and SciPy."""
