"""Measure a model: what each of its parts may lose."""
