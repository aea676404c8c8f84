"""Decide how each tensor is stored, and carry it out."""
