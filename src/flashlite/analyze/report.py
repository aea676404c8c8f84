"""`write_report`: an analysis as one HTML file that opens without a network."""

from __future__ import annotations
from pathlib import Path
from flashlite.analyze.analysis import Analysis

__all__ = ["write_report"]


def write_report(analysis: Analysis, path: Path) -> None:
    """x"""
