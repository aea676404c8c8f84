"""The whole on a tiny model: what it finds, that it goes on where it ended, that it is the same."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import MODEL, Tiny, calibration, formats, tiny

from flashlite.analyze import pipeline
from flashlite.analyze.analysis import Analysis, write_analysis
from flashlite.analyze.pipeline import Settings, analyze
from flashlite.analyze.sensitivity import Formats
from flashlite.analyze.state import State
from flashlite.analyze.units import units_of
from flashlite.errors import UsageError

PLAIN = Settings(("coarse",), gradients=False)


def run(model: Tiny, folder: Path, settings: Settings = PLAIN, **changes: Any) -> Analysis:
    arguments = {"formats": formats(), **changes}
    return analyze(
        MODEL,
        model.spec,
        model.read,
        calibration(model),
        arguments["formats"],
        settings,
        State(folder, {"a": 1}),
        arguments.get("progress"),
    )


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_it_measures_every_unit(family: str, gradients: bool, tmp_path: Path) -> None:
    if gradients:
        pytest.importorskip("torch")
    model = tiny(family, texts=20)
    settings = Settings(("coarse", "fine"), gradients, positions=200)
    found = run(model, tmp_path / "s", settings)
    assert Analysis.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert [unit.name for unit in found.units] == [unit.name for unit in units_of(model.spec)]
    tensors = [name for name, shape in model.spec.shapes() if len(shape) == 2]
    assert sorted(loss.name for loss in found.tensors) == sorted(tensors)
    assert sum(unit.parameters for unit in found.units) == sum(
        w.size for w in model.weights.values() if w.ndim == 2
    )
    for unit in found.units:
        coarse, fine = unit.formats["coarse"], unit.formats["fine"]
        assert coarse.kl == coarse.exact_kl
        assert coarse.kl > fine.kl > 0
        assert coarse.bytes == unit.parameters // 2
    assert found.proxy is not None
    assert found.proxy.gradients is gradients
    assert found.proxy.spearman is not None
    assert found.proxy.spearman > (0.8 if gradients else 0.5)
    assert 0.5 < found.proxy.additivity["fine"] < 2
    assert found.embedding is not None
    assert (found.embedding["fine"].head is None) is (not model.spec.tied_head)
    heads = [(head.layer, head.head) for head in found.heads]
    assert heads == [(i, h) for i in range(model.spec.n_layers) for h in range(model.spec.n_heads)]
    assert sum(head.exact_kl is not None for head in found.heads) == round(0.3 * len(heads))
    assert all(head.importance > 0 for head in found.heads)
    assert len(found.kv_groups) == model.spec.n_layers * model.spec.n_kv_heads
    assert len(found.neurons[0].blocks) == -(-model.spec.d_ff // 32)
    assert len(found.layers) == model.spec.n_layers


def test_what_is_not_run_is_scaled_by_what_is(tmp_path: Path) -> None:
    found = run(tiny("llama"), tmp_path / "s")
    for unit in found.units[1:]:
        coarse, fine = unit.formats["coarse"], unit.formats["fine"]
        assert fine.exact_kl is None
        assert coarse.exact_kl is not None
        ratio = coarse.exact_kl / coarse.predicted_kl
        assert fine.kl == pytest.approx(fine.predicted_kl * ratio)


def test_weights_on_the_grid_already_lose_nothing(tmp_path: Path) -> None:
    kept = Formats(("same",), lambda name, w, fmt: w, lambda shape, fmt: 1)
    found = run(tiny("llama"), tmp_path / "s", replace(PLAIN, exact=("same",)), formats=kept)
    assert all(unit.formats["same"].kl == 0 for unit in found.units)
    assert found.proxy is not None
    assert found.proxy.spearman is None
    assert found.proxy.additivity == {}


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("gradients", [False, True])
def test_an_interrupted_run_ends_in_the_same_file(
    gradients: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gradients:
        pytest.importorskip("torch")
    monkeypatch.setattr(pipeline, "_KEPT_EVERY", 2)
    model, settings = tiny("gemma3"), replace(PLAIN, gradients=gradients)
    write_analysis(run(model, tmp_path / "whole", settings), tmp_path / "whole.json")
    calls = 0

    def killing(after: int) -> Any:
        left = after

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal left, calls
            calls += 1
            left -= 1
            if left < 0:
                raise Killed

        return progress

    for after in (2, 7, 3, 12, 20, 18):
        with pytest.raises(Killed):
            run(model, tmp_path / "parts", settings, progress=killing(after))
    again: list[str] = []
    for name in ("gradient_sums", "plain_sums"):  # statistics were kept
        monkeypatch.setattr(pipeline, name, lambda *_, name=name: again.append(name))
    found = run(model, tmp_path / "parts", settings)
    assert again == []
    write_analysis(found, tmp_path / "parts.json")
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_damaged_parts_are_measured_again(tmp_path: Path) -> None:
    model = tiny("llama")
    first = run(model, tmp_path / "s")
    for path in (tmp_path / "s").iterdir():
        if path.name != "key.json":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "s" / "unit-embed.json").write_text('{"predicted": 1}')
    assert run(model, tmp_path / "s") == first


def test_a_state_of_other_settings_is_emptied_and_a_strange_folder_is_not(tmp_path: Path) -> None:
    state = State(tmp_path / "s", {"a": 1})
    state.save("x", [1])
    state.save_arrays("y", {"z": np.ones(3)})
    again = State(tmp_path / "s", {"a": 1})
    assert again.load("x") == [1]
    assert (again.load_arrays("y") or {})["z"].sum() == 3
    assert State(tmp_path / "s", {"a": 2}).load("x") is None
    State(tmp_path / "s", {"a": 2}).save("x", 1)
    assert State(tmp_path / "s", {"a": 2}, fresh=True).load("x") is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="holds no analysis"):
        State(tmp_path / "mine", {"a": 1})
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_without_torch_gradients_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Exception, match=r"flashlite\[train\]"):
        run(tiny("llama"), tmp_path / "s", replace(PLAIN, gradients=True))
