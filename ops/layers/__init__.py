"""Layers and other ops: one module for each."""
