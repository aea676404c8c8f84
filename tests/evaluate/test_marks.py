"""The profiled library: the same answers, a mark for every part, nothing in the normal one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small import FAMILIES, Small, all_logits, quantize_small

from flashlite.codegen.emit import emit_model
from flashlite.codegen.target import host_target
from flashlite.codegen.toolchain import build_library
from flashlite.errors import EngineError
from flashlite.evaluate.marks import CALL, MarkReader, spans_of
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MARK, MARKS, load_library
from flashlite.runtime.prepare import compile_artifact

HERE = Path(__file__).parent.parent
LAYER = (
    "attn_norm",
    "qkv",
    "rope_store",
    "attention",
    "o",
    "ffn_norm",
    "gate_up",
    "activation",
    "gate_up",
    "down",
)

Make = Callable[[str], Small]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Small] = {}

    def of(family: str) -> Small:
        if family not in made:
            folder = tmp_path_factory.mktemp("small") / "small.fl"
            made[family] = quantize_small(HERE / "fixtures/families" / family, "import", folder)
        return made[family]

    return of


def open_profiled(small: Small, threads: int = 1, isa: str | None = None) -> Engine:
    path = compile_artifact(small.artifact, host_target(isa), profile=True)
    return Engine(load_library(path), small.weights, max_tokens=256, threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_normal_library_bit_for_bit(
    make: Make, family: str, threads: int
) -> None:
    small = make(family)
    ids = small.ids(40)

    def logits(engine: Engine) -> NDArray[np.float32]:
        """Of a prompt, and of single steps after it."""
        with engine:
            sequence = engine.new_sequence(len(ids))
            first = all_logits(engine, sequence, ids[:35], chunk=33)
            return np.concatenate([first, all_logits(engine, sequence, ids[35:], chunk=1)])

    path = compile_artifact(small.artifact, host_target())
    normal = logits(Engine(load_library(path), small.weights, max_tokens=256, threads=threads))
    assert np.array_equal(logits(open_profiled(small, threads)), normal)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_of_one_token_marks_each_part_of_each_layer_once(make: Make, threads: int) -> None:
    small = make("gemma3")
    with open_profiled(small, threads) as engine:
        reader = MarkReader(engine)
        sequence = engine.new_sequence(8)
        engine.step([Work(sequence, [1])])
        for thread, marks in enumerate(reader.take()):
            spans = spans_of(marks)
            layers = [(part, i) for i in range(small.artifact.spec.n_layers) for part in LAYER]
            expected: list[tuple[str, int | None]] = [("embed", None), *layers, ("head", None)]
            if thread == 0:
                expected.append((CALL, None))
            found = [(span.part, span.layer) for span in spans]
            # A thread that has no share of the hidden layer only waits there.
            if thread == 0:
                assert found == expected
            for before, after in itertools.pairwise(spans):
                assert before.end == after.start
                assert before.start <= before.end
        assert reader.take()[0].size == 0


def test_a_step_without_logits_has_no_head(make: Make) -> None:
    with open_profiled(make("llama")) as engine:
        reader = MarkReader(engine)
        engine.step([Work(engine.new_sequence(40), list(range(40)), "none")])
        names = [span.part for span in spans_of(reader.take()[0])]
        assert "head" not in names
        assert names[-1] == CALL


def test_marks_without_room_are_counted_and_the_next_are_kept(make: Make) -> None:
    with open_profiled(make("llama")) as engine:
        reader = MarkReader(engine)
        sequence = engine.new_sequence(8)
        engine.step([Work(sequence, [1])])
        each = len(reader.take()[0])
        assert reader.lost == 0
        steps = MARKS // each + 3
        for _ in range(steps):
            sequence.truncate(0)
            engine.step([Work(sequence, [1])])
        assert len(reader.take()[0]) == MARKS
        assert reader.lost == steps * each - MARKS
        sequence.truncate(0)
        engine.step([Work(sequence, [1])])
        assert len(spans_of(reader.take()[0])) == each - 1


def test_the_normal_library_knows_nothing_of_it(make: Make) -> None:
    small = make("llama")
    normal = load_library(compile_artifact(small.artifact, host_target()))
    profiled = load_library(compile_artifact(small.artifact, host_target(), profile=True))
    assert not normal.profiles
    assert profiled.profiles
    more = int(profiled.describe(3).scratch_bytes) - int(normal.describe(3).scratch_bytes)
    per_thread = MARKS * MARK.itemsize
    assert 3 * per_thread <= more <= 3 * (per_thread + 64)
    with (
        Engine(normal, small.weights, max_tokens=32) as engine,
        pytest.raises(EngineError, match="was not built to be profiled"),
    ):
        engine.read_marks(0, np.zeros(1, MARK))


def test_the_profiled_library_has_another_key(make: Make) -> None:
    artifact, target = make("llama").artifact, host_target("plain")
    text = emit_model(artifact, "plain")
    normal, profiled = build_library(text, target), build_library(text, target, profile=True)
    assert normal.parent != profiled.parent
    assert b"fl_profile_read" in profiled.read_bytes()
    assert b"fl_profile_read" not in normal.read_bytes()


def test_an_unknown_part_is_refused() -> None:
    marks = np.array([(10, 0, 0, 0), (20, 0, 99, 0)], MARK)
    with pytest.raises(EngineError, match="part 99"):
        spans_of(marks)


def test_a_step_whose_beginning_was_lost_is_left_out() -> None:
    marks = np.array([(10, 0, 3, 1), (20, 0, 0, 0), (25, 2, 1, 0)], MARK)
    (span,) = spans_of(marks)
    assert (span.part, span.start, span.end, span.waited) == ("embed", 20, 25, 2)
