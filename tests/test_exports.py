"""`__all__` is the list of public names: sorted, complete, true."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashlite

ROOT = Path(flashlite.__file__).parent
MODULES = sorted(
    ".".join(("flashlite", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)
OPTIONAL = {
    "llama_cpp",
    "lm_eval",
    "msgspec",
    "openvino",
    "openvino_genai",
    "sentence_transformers",
    "starlette",
    "torch",
    "transformers",
    "uvicorn",
}


def public_names(source: str) -> set[str]:
    """Functions and classes that a module defines without a leading underscore."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = {node.name for node in ast.parse(source).body if isinstance(node, kinds)}
    return {name for name in names if not name.startswith("_")}


def sort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions: the order ruff keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_complete_and_true(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL:
            pytest.skip(f"{error.name} is not installed")
        raise
    listed: list[str] = getattr(module, "__all__", [])
    assert listed == sorted(listed, key=sort_key)
    assert len(set(listed)) == len(listed)
    for entry in listed:
        assert hasattr(module, entry)
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert public_names(source) <= set(listed)


def test_the_package_offers_every_error() -> None:
    errors = importlib.import_module("flashlite.errors")
    assert set(errors.__all__) <= set(flashlite.__all__)
    assert flashlite.ContextOverflow is errors.ContextOverflow
    assert dir(flashlite) == flashlite.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flashlite.nothing  # noqa: B018


def test_importing_flashlite_imports_nothing_heavy() -> None:
    script = "import sys, flashlite; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert not {"numpy", "tokenizers", "click", "jinja2", "blake3"} & set(ran.stdout.split())
