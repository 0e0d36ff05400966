"""Losses, a module each."""
