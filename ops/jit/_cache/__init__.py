"""The cache: where it is, what is in it, who may write to it. Knows nothing of C++."""
