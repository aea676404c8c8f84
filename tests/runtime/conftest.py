"""Fixtures of the engine's tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small import Small, quantize_small


@pytest.fixture(scope="session")
def make_small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Small]:
    """Quantize a checkpoint without a tokenizer; each (path, preset) once."""
    made: dict[tuple[Path, str], Small] = {}

    def make(path: Path, preset: str) -> Small:
        if (path, preset) not in made:
            folder = tmp_path_factory.mktemp("small") / "small.fl"
            made[path, preset] = quantize_small(path, preset, folder)
        return made[path, preset]

    return make


@pytest.fixture
def small(make_small: Callable[[Path, str], Small], tiny_gguf: Path) -> Small:
    """The tiny random llama, its grids imported."""
    return make_small(tiny_gguf, "import")
