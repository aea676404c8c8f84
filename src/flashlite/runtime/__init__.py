"""Run compiled models: engine, pages, scheduler, and the Python API."""
