"""Suites: small JSON files that name tasks, where their items come from and how many are taken.

    {"name": "benchmark_v3.1",
     "tasks": [{"name": "passages", "kind": "text", "loader": "core-passages",
                "items": {"quick": 24, "standard": 96, "full": null}}, ...]}

`kind` is `text`, `choice` or `generate`; null takes all items. A task whose loader begins with
`core-` reads what lies beside the suite; the others need FLASHLITE_DATA.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flashlite.errors import EvaluateError, UsageError
from flashlite.evaluate.items import Item
from flashlite.evaluate.loaders import LOADERS, load_items

__all__ = ["SIZES", "Drawn", "Suite", "Task", "draw_items", "find_suite"]

Kind = Literal["text", "choice", "generate"]
KINDS: tuple[Kind, ...] = ("text", "choice", "generate")
SIZES = ("quick", "standard", "full")
_SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Task:
    """One measurement of a suite."""

    name: str
    kind: Kind
    loader: str
    items: Mapping[str, int | None]  # how many by size of the run; None: all


@dataclass(frozen=True)
class Suite:
    """The tasks of one suite file."""

    name: str
    folder: Path
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Drawn:
    """A task with the items that were drawn for it."""

    task: Task
    items: Sequence[Item]


def find_suite(name: str) -> Suite:
    """A built-in suite by name, or the one whose file this is.

    Raises:
        UsageError: there is no such suite.
        EvaluateError: its file is malformed.
    """
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise UsageError(f"there is no suite {name}")
    else:
        path = _SUITES / name / "suite.json"
        if "/" in name or not path.is_file():
            known = ", ".join(sorted(p.name for p in _SUITES.iterdir() if p.is_dir()))
            raise UsageError(f"there is no suite {name!r}, known are {known}, or a suite's .json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluateError(f"{path}: is no suite: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("tasks"), list):
        raise EvaluateError(f"{path}: is no suite: an object of name and tasks is expected")
    tasks = tuple(_task(path, entry) for entry in data["tasks"])
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise EvaluateError(f"{path}: tasks need names of their own")
    return Suite(str(data.get("name", path.stem)), path.parent, tasks)


def draw_items(suite: Suite, size: str, seed: int) -> tuple[list[Drawn], list[str]]:
    """The items of every task that can be read here, and the names of the sets that cannot.

    Items are drawn without replacement, the same number from each language as far as it has them,
    so that languages compare.

    Raises:
        EvaluateError: a set is there and cannot be read.
    """
    data = os.environ.get("FLASHLITE_DATA")
    drawn, absent = [], []
    for task in suite.tasks:
        if task.loader.startswith("core-"):
            folder = suite.folder
        else:
            folder = Path(data or "") / task.loader
            if data is None or not folder.is_dir():
                absent.append(task.loader)
                continue
        items = load_items(task.loader, folder)
        if not items:
            raise EvaluateError(f"{folder}: holds nothing that task {task.name} could use")
        drawn.append(Drawn(task, _spread(items, task.items[size], seed)))
    return drawn, absent


def _spread(items: Sequence[Item], most: int | None, seed: int) -> list[Item]:
    if most is None or len(items) <= most:
        return list(items)
    rng = np.random.default_rng(seed)
    queues: dict[str, list[int]] = {}
    for index in rng.permutation(len(items)):
        queues.setdefault(items[index].language, []).append(int(index))
    chosen: list[int] = []
    while len(chosen) < most:
        for language in sorted(queues):
            if queues[language] and len(chosen) < most:
                chosen.append(queues[language].pop())
    return [items[i] for i in sorted(chosen)]


def _task(path: Path, entry: Any) -> Task:
    expected = {"name", "kind", "loader", "items"}
    if not isinstance(entry, dict) or set(entry) != expected:
        raise EvaluateError(f"{path}: a task is not an object of {', '.join(sorted(expected))}")
    name, kind, loader, items = (entry[key] for key in ("name", "kind", "loader", "items"))
    if not isinstance(name, str) or not name:
        raise EvaluateError(f"{path}: a task has the name {name!r}")
    if kind not in KINDS:
        raise EvaluateError(f"{path}: task {name} is of kind {kind!r}, known: {', '.join(KINDS)}")
    if loader not in LOADERS:
        raise EvaluateError(
            f"{path}: task {name} wants loader {loader!r}, known: {', '.join(LOADERS)}"
        )
    if not isinstance(items, dict) or set(items) != set(SIZES):
        raise EvaluateError(f"{path}: task {name} needs items for {', '.join(SIZES)}")
    for size, n in items.items():
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise EvaluateError(f"{path}: task {name} takes {n!r} items when {size}")
    return Task(name, kind, loader, dict(items))
