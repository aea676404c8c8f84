"""Measure a compiled model: speed and memory, beside other engines on the same weights."""
