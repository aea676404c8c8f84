"""Measure a model: what each part costs, what its loss would do, what could be left out."""
