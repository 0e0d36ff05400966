"""Compilers: finding and running them, and explaining their output. Knows nothing of the cache."""
