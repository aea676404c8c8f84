"""The plots of docs/."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib import pyplot

import plot

MACHINE = {"cpu": "Abacus", "threads": 2, "isa": "avx2"}
BASE = {"commit": "abc", "machine": MACHINE, "rounds": 5, "rows": []}


def run(monkeypatch: pytest.MonkeyPatch, results: Path, out: Path) -> None:
    monkeypatch.setattr(
        sys, "argv", ["plot.py", "--results", str(results), "--out", str(out / "docs")]
    )
    plot.main()


def test_all_plots_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = {"tokens": [512, 8128], "tok_s": [100.0, 50.0]}
    depth = {"prefill": {"flashlite": curve}, "decode": {"flashlite": curve, "other": curve}}
    together = {"flashlite": {"together": [1, 16], "tok_s": [100.0, 500.0]}}
    for name, curves in (("depth", depth), ("concurrency", together)):
        text = json.dumps({**BASE, "benchmark": name, "curves": curves})
        (tmp_path / f"{name}.json").write_text(text)
    loss = {name: {"bits": [4.5, 5.5], "kl": [0.1, 0.0]} for name in ("flashlite", "uniform")}
    text = json.dumps({**BASE, "benchmark": "curve", "model": "abacus", "curves": loss})
    (tmp_path / "curve.json").write_text(text)
    run(monkeypatch, tmp_path, tmp_path)
    for name in ("context", "concurrency", "loss"):
        assert (tmp_path / f"docs/{name}.png").read_bytes()[1:4] == b"PNG"


def test_labels_name_units_machine_and_commit() -> None:
    curve = {"together": [1, 16], "tok_s": [100.0, 500.0]}
    figure = plot.draw_concurrency({**BASE, "curves": {"flashlite": curve, "llama.cpp": curve}})
    (axis,) = figure.axes
    assert "tokens per second" in axis.get_ylabel()
    assert "sequences" in axis.get_xlabel()
    assert axis.get_legend_handles_labels()[1] == ["flashlite", "llama.cpp"]
    assert axis.get_legend() is not None
    assert figure.get_supxlabel() == "Abacus, 2 threads, avx2, commit abc; median of 5 rounds"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "16"]
    pyplot.close(figure)


def test_a_missing_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--run depth"):
        run(monkeypatch, tmp_path, tmp_path)
