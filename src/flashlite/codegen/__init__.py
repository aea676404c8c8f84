"""Artifact -> model.c -> library."""
