"""Describe a checkpoint, and run its description in plain NumPy."""
