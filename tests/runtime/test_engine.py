"""The compiled model against the NumPy oracle, and what an engine refuses."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small import FAMILIES, Small, all_logits, runs

from flashlite.codegen.target import ISAS
from flashlite.errors import (
    ContextOverflow,
    EngineError,
    MemoryCeiling,
    UsageError,
)
from flashlite.model.metrics import kl_divergence
from flashlite.runtime.engine import Work

HERE = Path(__file__).parent.parent


INTEGER_ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(not runs(isa), reason=f"this CPU lacks {isa}"))
    for isa in ISAS
    if isa != "fp32"
]


# The arithmetic of every family and preset


@pytest.mark.parametrize("preset", ["import", "hybrid", "q4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_every_family_equals_the_oracle(
    make_small: Callable[[Path, str], Small], family: str, preset: str
) -> None:
    small = make_small(HERE / "fixtures/families" / family, preset)
    ids = small.ids(min(70, small.artifact.spec.max_context))
    expected = small.reference().logits(ids)
    with small.open("fp32") as engine:
        got = all_logits(engine, engine.new_sequence(len(ids)), ids, chunk=33)
    assert kl_divergence(expected, got).max() <= 1e-5
    assert np.abs(expected - got).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("isa", INTEGER_ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_int8_every_family_stays_near_the_oracle(
    make_small: Callable[[Path, str], Small], family: str, isa: str
) -> None:
    small = make_small(HERE / "fixtures/families" / family, "import")
    ids = small.ids(min(70, small.artifact.spec.max_context))
    expected = small.reference().logits(ids)
    with small.open(isa) as engine:
        got = all_logits(engine, engine.new_sequence(len(ids)), ids)
    # Random weights make sharp logits; the figure that counts is measured on real models.
    scale = np.abs(expected).max()
    assert np.abs(expected - got).mean() <= 0.03 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_every_instruction_set_gives_the_same_bits(
    make_small: Callable[[Path, str], Small], family: str
) -> None:
    small = make_small(HERE / "fixtures/families" / family, "import")
    ids = small.ids(min(70, small.artifact.spec.max_context))
    logits = []
    for isa in filter(runs, ("plain", "avx2", "avx512")):
        with small.open(isa) as engine:
            logits.append(all_logits(engine, engine.new_sequence(len(ids)), ids))
    for other in logits[1:]:
        np.testing.assert_array_equal(logits[0], other)


@pytest.mark.parametrize("preset", ["q5", "q6"])
def test_every_instruction_set_runs_formats_between_four_and_eight_bits(
    make_small: Callable[[Path, str], Small], preset: str
) -> None:
    """Look-up table, matrices and head."""
    small = make_small(HERE / "fixtures/families/gemma3", preset)
    ids = small.ids(40)
    expected = small.reference().logits(ids)
    logits = {}
    for isa in filter(runs, ("fp32", "plain", "avx2", "avx512")):
        with small.open(isa) as engine:
            logits[isa] = all_logits(engine, engine.new_sequence(len(ids)), ids)
    assert np.abs(expected - logits["fp32"]).max() <= 2e-3 * np.abs(expected).max()
    for isa in logits.keys() - {"fp32"}:
        np.testing.assert_array_equal(logits["plain"], logits[isa])


@pytest.mark.parametrize("isa", INTEGER_ISAS)
def test_decode_equals_prefill(small: Small, isa: str) -> None:
    ids = small.ids(100)
    with small.open(isa) as engine:
        whole = all_logits(engine, engine.new_sequence(100), ids)
        single = all_logits(engine, engine.new_sequence(100), ids, chunk=1)
        odd = all_logits(engine, engine.new_sequence(100), ids, chunk=7)
    np.testing.assert_array_equal(single, whole)
    np.testing.assert_array_equal(odd, whole)


def test_threads_do_not_change_the_result(small: Small) -> None:
    ids = small.ids(50)
    results = []
    for threads in (1, 2, 3, 5, 16):  # with more than there are cores some soon sit out
        with small.open("plain", threads=threads) as engine:
            results.append(all_logits(engine, engine.new_sequence(50), ids))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_sequences_of_different_lengths_share_a_step(small: Small) -> None:
    a, b, c = small.ids(41, 1), small.ids(9, 2), small.ids(65, 3)
    with small.open("plain", max_sequences=3) as engine:
        alone = []
        for ids in (a, b, c):
            sequence = engine.new_sequence(80)
            alone.append(all_logits(engine, sequence, ids)[-1])
            sequence.release()
        rows = [engine.new_sequence(80) for _ in range(3)]
        engine.step([Work(rows[0], a[:40], "none"), Work(rows[2], c[:50], "none")])
        together = engine.step([Work(rows[0], a[40:]), Work(rows[1], b), Work(rows[2], c[50:])])
        for i, expected in enumerate(alone):
            np.testing.assert_allclose(together[i], expected, rtol=1e-4, atol=1e-4)


def test_released_pages_are_used_again_and_hold_nothing_old(small: Small) -> None:
    ids = small.ids(60)
    with small.open("plain", max_tokens=64) as engine:
        first = engine.new_sequence(60)
        expected = all_logits(engine, first, ids)
        first.release()
        first.release()  # doing it again gives nothing back twice
        engine.pool.check_integrity()
        other = engine.new_sequence(64)
        all_logits(engine, other, small.ids(64, 9))
        other.release()
        again = all_logits(engine, engine.new_sequence(60), ids)
    np.testing.assert_array_equal(expected, again)


# What is refused


def test_a_sequence_longer_than_the_context_is_fl_405(small: Small) -> None:
    with small.open("plain", max_tokens=64) as engine:
        with pytest.raises(ContextOverflow, match=r"FL-405: .*65 tokens.*holds 64"):
            engine.new_sequence(65)
        sequence = engine.new_sequence(10)
        with pytest.raises(ContextOverflow, match="11 tokens.*10"):
            engine.step([Work(sequence, small.ids(11))])


def test_pages_that_are_taken_are_refused_with_the_figure(small: Small) -> None:
    with small.open("plain", max_tokens=64) as engine:
        engine.new_sequence(33)
        with pytest.raises(MemoryCeiling, match="1 more KV pages.*0 of 2"):
            engine.new_sequence(32)


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(small: Small, bad: int) -> None:
    with small.open("plain") as engine, pytest.raises(EngineError, match="outside its range"):
        engine.step([Work(engine.new_sequence(4), [1, bad])])


def test_empty_and_oversized_steps_are_refused(small: Small) -> None:
    with small.open("plain") as engine:
        sequence = engine.new_sequence(400)
        for work in ([], [Work(sequence, [])], [Work(sequence, small.ids(257))]):
            with pytest.raises(EngineError):
                engine.step(work)


def test_a_closed_engine_says_so(small: Small) -> None:
    engine = small.open("plain")
    sequence = engine.new_sequence(4)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.step([Work(sequence, [1])])


@pytest.mark.parametrize(("name", "value"), [("threads", 0), ("threads", 65), ("max_sequences", 0)])
def test_settings_outside_their_range_are_refused(small: Small, name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        small.open("plain", **{name: value})


def test_weights_of_another_length_are_refused(small: Small) -> None:
    cut = Small(small.artifact, small.weights[:-64])
    with pytest.raises(EngineError, match="not this model's"):
        cut.open("plain")


def test_a_busy_machine_does_not_hang_the_pool(small: Small) -> None:
    """More threads than cores: the barrier must sleep, not spin for whole time slices."""
    with small.open("plain", threads=16) as engine:
        sequence = engine.new_sequence(40)
        for i in range(40):
            engine.step([Work(sequence, [i])])


def test_an_engine_that_is_never_closed_does_not_block_the_exit(small: Small) -> None:
    code = f"""
        from pathlib import Path
        from flashlite.artifact.read import load_weights, open_artifact
        from flashlite.codegen.target import host_target
        from flashlite.runtime.engine import Engine
        from flashlite.runtime.library import load_library
        from flashlite.runtime.prepare import compile_artifact
        artifact = open_artifact(Path({str(small.artifact.path)!r}))
        library = load_library(compile_artifact(artifact, host_target("plain")))
        engine = Engine(library, load_weights(artifact), max_tokens=64, threads=3)
        print("open")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "open\n"), done.stderr
