"""Tuning: it starts on the artifact's codes, heals, learns a domain, and goes on when killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tuning import QUICK, SPEC, material, some_texts, twin

from flashlite.compress.finetune import finetune
from flashlite.compress.pack import Packed, dequantize
from flashlite.compress.tail import Tail, tail_shapes
from flashlite.compress.tail_cache import Floats, Model, build_cache
from flashlite.compress.tuning import Material, Report
from flashlite.compress.tuning_texts import Text
from flashlite.errors import CompressError
from flashlite.model.metrics import kl_divergence, perplexity
from flashlite.model.reference import Reference

pytest.importorskip("torch")


class Killed(Exception):
    pass


def test_a_tail_starts_as_the_artifact_has_it() -> None:
    made = twin("q4m")
    arrays = Tail(made.source, made.student, made.packed, 2).arrays()
    assert set(made.matrices) - {"embed"} > {n[:-6] for n in arrays if n.endswith(".codes")}
    for name, _ in tail_shapes(SPEC, 2):
        if name in made.matrices:
            stored = made.matrices[name]
            np.testing.assert_array_equal(arrays[f"{name}.codes"], stored.codes)
            np.testing.assert_array_equal(arrays[f"{name}.scales"], stored.scales)
        else:
            np.testing.assert_array_equal(arrays[name], made.student.weights(name))


@pytest.mark.parametrize("fmt", ["q4", "q4m", "q8"])
def test_healing_brings_the_model_nearer_to_its_source(fmt: str, tmp_path: Path) -> None:
    # Only the tuned layers are coarse: what they lost is theirs to bring back.
    made = twin(fmt, layers=(1, 2))
    out = finetune(made.source, made.student, made.packed, material(), tmp_path, QUICK)
    assert out.before["held-out"].kl > 0
    if fmt != "q8":  # there is next to nothing to heal
        assert out.after["held-out"].kl < 0.9 * out.before["held-out"].kl
        assert out.after["other"].kl < out.before["other"].kl
        assert out.better
    assert out.after["held-out"].kl <= out.before["held-out"].kl


def test_the_figures_are_those_of_the_oracle(tmp_path: Path) -> None:
    made = twin("q4")
    told = material()
    out = finetune(made.source, made.student, made.packed, told, tmp_path, QUICK)

    def healed(name: str) -> Floats:
        if name in out.arrays:
            return np.asarray(out.arrays[name], np.float32)
        if f"{name}.codes" in out.arrays:
            packed = Packed(
                made.matrices[name].format,
                out.arrays[f"{name}.codes"],
                out.arrays[f"{name}.scales"],
                out.arrays.get(f"{name}.mins"),
            )
            return dequantize(packed, *dict(SPEC.shapes())[name])
        return made.student.weights(name)

    for weights, quality in ((made.student.weights, out.before), (healed, out.after)):
        rows, p, q = [], [], []
        for text in told.held:
            p.append(Reference(SPEC, made.source.weights).logits(text.ids)[:-1])
            q.append(Reference(SPEC, weights).logits(text.ids)[:-1])
            rows.append(text.ids[1:])
        theirs, ours, following = np.concatenate(p), np.concatenate(q), np.concatenate(rows)
        found = quality["held-out"]
        assert found.kl == pytest.approx(kl_divergence(theirs, ours).mean(), rel=2e-3)
        assert found.perplexity == pytest.approx(perplexity(ours, following), rel=1e-3)
        assert found.rows == len(following)


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    made = twin("q4m")
    whole = finetune(made.source, made.student, made.packed, material(), tmp_path / "1", QUICK)

    def kill(at: int) -> None:
        def progress(report: Report) -> None:
            if report.stage == "tune" and report.done == at:
                raise Killed

        finetune(
            made.source, made.student, made.packed, material(), tmp_path / "2", QUICK, progress
        )

    for step in (7, 25, 44):  # before a checkpoint, and after scales were searched again
        with pytest.raises(Killed):
            kill(step)
    seen: list[int] = []
    resumed = finetune(
        made.source, made.student, made.packed, material(), tmp_path / "2", QUICK,
        lambda report: seen.append(report.done) if report.stage == "tune" else None,
    )  # fmt: skip
    assert seen[0] == 41
    assert resumed.history[1:] == whole.history[1:]
    assert resumed.after == whole.after
    assert set(resumed.arrays) == set(whole.arrays)
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], array)


def domain_chats(n: int, seed: int) -> list[Text]:
    """The answer names the first id of the question: one of four labels of two ids."""
    rng = np.random.default_rng(seed)
    chats = []
    for _ in range(n):
        which = int(rng.integers(4))
        ids = [10 + which, *(int(i) for i in rng.integers(20, 40, 5)), 50, 60 + which, 70 + which]
        learn = np.zeros(len(ids), np.bool_)
        learn[-3:-1] = True
        chats.append(Text(np.array(ids, np.int32), learn, f"label{which}"))
    return chats


def test_a_domain_is_learned_and_the_rest_is_kept(tmp_path: Path) -> None:
    made = twin("q4m")
    told = replace(material(), chats=domain_chats(80, 5), held_chats=domain_chats(40, 6))
    out = finetune(
        made.source, made.student, made.packed, told, tmp_path, replace(QUICK, steps=80, rate=5e-3)
    )
    assert out.domain_before is not None
    assert out.domain_after is not None
    assert out.domain_after.accuracy > out.domain_before.accuracy + 0.3
    assert out.domain_after.loss < 0.7 * out.domain_before.loss
    assert out.domain_after.free <= out.domain_after.accuracy
    assert out.better


def test_a_short_time_ends_a_run_with_what_it_has(tmp_path: Path) -> None:
    made = twin("q4m")
    out = finetune(
        made.source, made.student, made.packed, material(), tmp_path, replace(QUICK, max_seconds=0)
    )
    assert out.stopped == "time"
    assert len(out.history) == 2


def test_inputs_of_any_size_are_kept_in_half_precision(tmp_path: Path) -> None:
    made = twin("q8")
    texts = some_texts(5, 8)

    def huge(name: str) -> Floats:  # residuals beyond 65504
        values: Floats = made.student.weights(name)
        return np.multiply(values, 1e5 if name == "embed" else 1, dtype=np.float32)

    cache = build_cache(tmp_path, texts, None, Model(SPEC, huge), 2, lambda done, total: None)
    oracle = Reference(SPEC, huge)
    expected = oracle.layer(0, oracle.embed(texts[3].ids))
    found = cache.padded([3])[0]
    assert np.abs(expected).max() > 65504
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 4}, "4 layers to tune, the model has 1 to 3"),
        ({"steps": 0}, "steps is 0, allowed 1 to"),
        ({"rate": 2.0}, "is not between 0 and 1"),
    ],
)
def test_impossible_settings_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = twin("q4m")
    with pytest.raises(CompressError, match=message):
        finetune(
            made.source, made.student, made.packed, material(), tmp_path, replace(QUICK, **change)
        )


def test_no_texts_are_refused(tmp_path: Path) -> None:
    made = twin("q4m")
    with pytest.raises(CompressError, match="no texts to learn from"):
        finetune(made.source, made.student, made.packed, Material([], []), tmp_path, QUICK)
