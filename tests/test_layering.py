"""The folders are the data flow: a package imports only from those before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashlite

ROOT = Path(flashlite.__file__).parent
ORDER = [
    "errors",
    "paths",
    "checkpoint",
    "model",
    "analyze",
    "compress",
    "artifact",
    "codegen",
    "runtime",
    "evaluate",
    "context",
    "security",
    "server",
    "cli",
    "__main__",
    "__init__",  # only names them all
]
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    """The package of a file, or the module's own name at the root."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported_parts(source: str) -> Iterator[str]:
    """Every part of flashlite that a module imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from .x import y` would hide where it goes.
            assert node.level == 0, f"relative import, line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "flashlite":
                yield rest.partition(".")[0] or "__init__"


def backward(part: str, source: str) -> list[str]:
    """The imports that go against the order."""
    return [
        name
        for name in imported_parts(source)
        if name in ORDER and ORDER.index(name) > ORDER.index(part)
    ]


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part_of(path) for path in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    assert backward(part, (ROOT / path).read_text(encoding="utf-8")) == []


def test_an_import_that_goes_back_is_seen() -> None:
    assert backward("compress", "from flashlite.runtime import engine") == ["runtime"]
    assert backward("model", "def f():\n    import flashlite.cli.main") == ["cli"]
    assert backward("errors", "from flashlite import paths") == ["paths"]
    assert backward("cli", "from flashlite.errors import FlashliteError") == []
