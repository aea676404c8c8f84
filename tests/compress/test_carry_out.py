"""From an allocation to matrices, on small models: budgets kept, text followed, work resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_analysis import analysis_of

from flashlite.analyze.analysis import Analysis, Calibration
from flashlite.checkpoint.open import open_checkpoint
from flashlite.compress import walk
from flashlite.compress.carry_out import Carried, Limits, carry_out
from flashlite.compress.differential import (
    check_units,
    items_of,
    migrate,
    plan_of,
    split_sequences,
)
from flashlite.compress.gptq import weights_of
from flashlite.compress.quantize import quantize_matrix
from flashlite.compress.roundings import stored_bytes
from flashlite.compress.walk import Rounded, Rounding, quantize_layers
from flashlite.compress.workspace import Workspace
from flashlite.errors import CompressError
from flashlite.model.families import describe
from flashlite.model.reference import Reference
from flashlite.model.source import SourceModel

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
F32 = NDArray[np.float32]


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen2"])
def source(request: pytest.FixtureRequest) -> SourceModel:
    return describe(open_checkpoint(FAMILIES / request.param))


@pytest.fixture(scope="module")
def llama() -> SourceModel:
    return describe(open_checkpoint(FAMILIES / "llama"))


def loss_of(source: SourceModel, analysis: Analysis) -> Callable[[Callable[[str], F32]], float]:
    """Mean square error of the final states on held-back text: quick, and falls with the KL."""
    _, held = split_sequences(analysis.calibration)
    exact = [Reference(source.spec, source.tensor).hidden(ids) for ids in held]

    def loss(weights: Callable[[str], F32]) -> float:
        reference = Reference(source.spec, weights)
        pairs = zip(held, exact, strict=True)
        return float(np.mean([np.square(reference.hidden(i) - e).mean() for i, e in pairs]))

    return loss


def carried(
    source: SourceModel, analysis: Analysis, limits: Limits, folder: Path, swaps: int = 3
) -> Carried:
    def workspace(formats: Mapping[str, Sequence[str]]) -> Workspace:
        return Workspace(folder / str(abs(hash(str(formats)))))

    loss = loss_of(source, analysis)
    return carry_out(
        source, analysis, limits, measure=loss, workspace=workspace, swaps=swaps, seconds=60
    )


def test_a_budget_is_kept_and_every_matrix_is_there(source: SourceModel, tmp_path: Path) -> None:
    analysis = analysis_of(source)
    items = items_of(analysis, source.spec)
    least = sum(min(c.cost for c in item.choices) for item in items)
    most = sum(max(c.cost for c in item.choices) for item in items)
    budget = least + 0.4 * (most - least)
    found = carried(source, analysis, Limits(budget=budget), tmp_path)
    plan = plan_of(analysis, source.spec, found.formats, preset="size")
    shapes = {name: shape for name, shape in source.spec.shapes() if len(shape) == 2}
    assert set(found.ready) == set(shapes)
    size = sum(stored_bytes((s[0], s[1]), plan.formats[name]) for name, s in shapes.items())
    assert size == found.cost <= budget
    assert all(matrix.format == plan.formats[name] for name, matrix in found.ready.items())
    assert len(set(found.formats.values())) > 1

    def weights(name: str) -> F32:
        if name not in found.ready:
            return source.tensor(name)
        return weights_of(found.ready[name], shapes[name][1])

    assert loss_of(source, analysis)(weights) == pytest.approx(found.measured_kl, rel=1e-4)


def test_a_loss_is_kept_by_the_smallest_that_was_found(llama: SourceModel, tmp_path: Path) -> None:
    analysis = analysis_of(llama)
    loss = loss_of(llama, analysis)
    coarse = loss(lambda n: _plain(llama, n, "q4"))
    found = carried(llama, analysis, Limits(max_kl=0.2 * coarse), tmp_path, swaps=0)
    assert found.measured_kl <= 0.2 * coarse
    finer = carried(llama, analysis, Limits(max_kl=0.02 * coarse), tmp_path, swaps=0)
    assert finer.measured_kl <= 0.02 * coarse
    assert found.cost < finer.cost
    with pytest.raises(CompressError, match=r"cannot be reached|was not reached"):
        carried(llama, analysis, Limits(max_kl=1e-12), tmp_path, swaps=0)


def _plain(source: SourceModel, name: str, fmt: str) -> F32:
    original = source.tensor(name)
    if original.ndim == 1:
        return original
    return weights_of(quantize_matrix(original, fmt), original.shape[1])


def test_swaps_never_raise_the_loss(llama: SourceModel, tmp_path: Path) -> None:
    analysis = analysis_of(llama)
    items = items_of(analysis, llama.spec)
    budget = 1.3 * sum(min(c.cost for c in item.choices) for item in items)
    without = carried(llama, analysis, Limits(budget=budget), tmp_path, swaps=0)
    with_swaps = carried(llama, analysis, Limits(budget=budget), tmp_path, swaps=12)
    assert with_swaps.tried >= with_swaps.kept > 0
    assert with_swaps.measured_kl < without.measured_kl
    assert with_swaps.cost <= budget


def layers_of(
    source: SourceModel, analysis: Analysis, rounding: Rounding, store: Workspace | None = None
) -> dict[str, Rounded]:
    fit, held = split_sequences(analysis.calibration)
    names = [n for n, s in source.spec.shapes() if len(s) == 2 and n.startswith("layers.")]
    found: dict[str, Rounded] = {}
    layers = quantize_layers(
        source.spec, source.tensor, {name: ["q4", "q8"] for name in names}, fit, held,
        rounding=rounding, done=(lambda i: None) if store is None else store.layer,
    )  # fmt: skip
    for i, layer in enumerate(layers):
        if store is not None:
            store.save(i, layer)
        found |= {rounded.name: rounded for rounded in layer}
    return found


def hidden_error(source: SourceModel, found: Mapping[str, Rounded], analysis: Analysis) -> float:
    def weights(name: str) -> F32:
        original = source.tensor(name)
        if name not in found:
            return original
        return weights_of(found[name].matrices["q4"], original.shape[1])

    return loss_of(source, analysis)(weights)


def test_rounding_for_the_text_beats_plain_rounding(source: SourceModel) -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, source.spec.vocab_size // 4, (40, 48)).tolist()
    analysis = analysis_of(source, text)
    plain = hidden_error(source, layers_of(source, analysis, Rounding(())), analysis)
    found = layers_of(source, analysis, Rounding())
    assert hidden_error(source, found, analysis) < 0.6 * plain
    steps = {rounded.steps["q4"] for rounded in found.values()}
    assert "descent" in steps
    for rounded in found.values():
        errors = rounded.errors["q4"]
        assert errors[rounded.steps["q4"]] == min(errors.values())
        assert 0 < rounded.left("q4") < 1


def test_long_text_is_run_twice_instead_of_kept(
    llama: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = analysis_of(llama)
    kept = layers_of(llama, analysis, Rounding())
    monkeypatch.setattr(walk, "_KEPT_BYTES", 0)
    for name, rounded in layers_of(llama, analysis, Rounding()).items():
        assert np.array_equal(rounded.matrices["q4"].codes, kept[name].matrices["q4"].codes)


def test_an_interrupted_walk_goes_on_where_it_was(llama: SourceModel, tmp_path: Path) -> None:
    analysis = analysis_of(llama)
    whole = layers_of(llama, analysis, Rounding())
    store = Workspace(tmp_path)
    first = layers_of(llama, analysis, Rounding(), store)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"layer-{i}.npz" for i in range(llama.spec.n_layers)
    ]
    last = store._path(llama.spec.n_layers - 1)
    last.write_bytes(last.read_bytes()[:100])  # cut
    assert store.layer(llama.spec.n_layers - 1) is None
    (tmp_path / "layer-9.npz.new").write_bytes(b"half")
    again = layers_of(llama, analysis, Rounding(), Workspace(tmp_path))
    assert not (tmp_path / "layer-9.npz.new").exists()
    for name, rounded in whole.items():
        for other in (first[name], again[name]):
            assert np.array_equal(rounded.matrices["q4"].codes, other.matrices["q4"].codes)
            assert np.array_equal(rounded.matrices["q8"].scales, other.matrices["q8"].scales)
    with pytest.raises(CompressError, match="is not there"):
        store.matrix("layers.0.q", "q5")


# ---- configs that do not fit --------------------------------------------------------------------


def test_a_config_of_another_model_is_refused(llama: SourceModel) -> None:
    analysis = analysis_of(llama)
    check_units(analysis, llama.spec)
    unit = analysis.units[0]
    ghost = replace(unit, tensors=("layers.99.q", *unit.tensors[1:]))
    with pytest.raises(CompressError, match=r"names tensor 'layers\.99\.q', which the model does"):
        check_units(replace(analysis, units=(ghost, *analysis.units[1:])), llama.spec)
    other = replace(unit, parameters=unit.parameters + 1)
    with pytest.raises(CompressError, match="made for other shapes"):
        check_units(replace(analysis, units=(other, *analysis.units[1:])), llama.spec)
    with pytest.raises(CompressError, match="no unit for tensor embed"):
        check_units(replace(analysis, units=analysis.units[1:]), llama.spec)
    with pytest.raises(CompressError, match="in two units"):
        check_units(replace(analysis, units=(*analysis.units, unit)), llama.spec)


def test_a_plan_migrates_where_shapes_match(llama: SourceModel) -> None:
    analysis = analysis_of(llama)
    smaller = replace(llama.spec, n_layers=llama.spec.n_layers - 1)
    moved, odd = migrate(analysis, smaller)
    check_units(moved, smaller)
    assert len(odd) == 4
    assert odd[0] == f"layers.{smaller.n_layers}.qkv: this model has no such part"
    deeper = replace(llama.spec, n_layers=llama.spec.n_layers + 1)
    moved, odd = migrate(analysis, deeper)
    check_units(moved, deeper)
    assert len(odd) == 4
    assert all("counted like the worst of its kind" in line for line in odd)
    kept = {unit.name: unit for unit in moved.units}
    assert kept["layers.0.qkv"] == analysis.units[1]
    wide = replace(llama.spec, vocab_size=llama.spec.vocab_size + 32, d_ff=llama.spec.d_ff * 2)
    moved, odd = migrate(analysis, wide)
    check_units(moved, wide)
    assert any("embed" in line for line in odd)
    with pytest.raises(CompressError, match="analyze it instead"):
        migrate(
            replace(analysis, units=analysis.units[:1]),
            replace(llama.spec, d_model=llama.spec.d_model * 2),
        )


def calibration(count: int) -> Calibration:
    return Calibration("model", 0, (), ((1, 2),) * count)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CompressError, match="holds 1 calibration sequences, at least 2"):
        split_sequences(calibration(1))
    for given, expected in ((9, (8, 1)), (2, (1, 1)), (16, (14, 2))):
        fit, held = split_sequences(calibration(given))
        assert (len(fit), len(held)) == expected
    fit, held = split_sequences(replace(calibration(3), held_back=((4, 5),)))
    assert (len(fit), [list(ids) for ids in held]) == (3, [[4, 5]])
