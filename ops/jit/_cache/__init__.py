"""The cache: its place, its entries, and who may write to it. Knows nothing of C++."""
