"""Layers and other ops, a module each."""
