"""Compilers and what they say: finding, running and explaining them. Knows nothing of the cache."""
