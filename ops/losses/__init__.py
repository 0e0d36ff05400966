"""Losses: one module for each."""
