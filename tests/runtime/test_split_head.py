"""The split head: what it computes, what it may estimate, and when it computes everything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import make_gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from small import NO_TEXT, Small, all_logits, runs
from split import Floats, estimates, fit, states_of, with_screen

from flashlite.artifact.read import load_weights
from flashlite.artifact.write import quantize
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.codegen.target import ISAS
from flashlite.compress.pack import BLOCK_ROWS
from flashlite.compress.screen import Cut
from flashlite.compress.screen_trials import SURE
from flashlite.compress.split_head import Fitted
from flashlite.errors import EngineError
from flashlite.model.families import describe
from flashlite.model.metrics import kl_divergence
from flashlite.runtime import prepare
from flashlite.runtime.engine import Work
from flashlite.runtime.library import Need, load_library
from flashlite.runtime.model import make_ledger
from flashlite.runtime.prepare import artifact_path, compile_artifact, split_head

N = 120
MARGINS = 1e-3  # float sums in another order
REACH = 12.0  # nats; errors of this head's estimates are that large
NEEDS: tuple[Need, ...] = ("likely", "largest", "all", "likely", "largest")


INTEGER_ISAS = [isa for isa in ISAS if isa != "fp32" and runs(isa)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A random llama of 505 tokens: its last block of rows is not whole."""
    folder = tmp_path_factory.mktemp("odd")
    metadata, tensors = make_gguf.tiny_model(dtypes={"token_embd": "F32"})
    table = tensors["token_embd.weight"]
    cut = np.frombuffer(table.data, np.float32).reshape(table.shape)[:505]
    # Random rows and states make logits that all lie together; these lie apart.
    scale = np.random.default_rng(0).lognormal(0, 0.7, (505, 1)).astype(np.float32)
    tensors["token_embd.weight"] = make_gguf.encode(cut * scale, "F32")
    metadata["llama.vocab_size"] = 505
    path = make_gguf.write_gguf(folder / "odd.gguf", metadata, tensors)
    provenance = {"source": "", "sha256": "", "licence": ""}
    source = describe(open_checkpoint(path))
    made = quantize(source, NO_TEXT, folder / "odd.fl", "q8", name="odd", provenance=provenance)
    return Small(made, load_weights(made))


@pytest.fixture(scope="module")
def fitted(plain: Small) -> Fitted:
    return fit(plain)


@pytest.fixture(scope="module")
def split(plain: Small, fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("split") / "split.fl"
    return with_screen(plain, folder, fitted, coarse=Cut(0.2, 505), fine=Cut(0.0, 32))


@pytest.fixture(scope="module")
def screened(
    plain: Small, split: Small, fitted: Fitted, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[Need, Small]:
    """The same with cuts as one chooses them: the largest needs reach, 20 have it of themselves."""
    folder = tmp_path_factory.mktemp("reach") / "split.fl"
    far = with_screen(plain, folder, fitted, coarse=Cut(REACH, 505), fine=Cut(REACH, 32))
    return {"likely": split, "largest": far}


def logits(
    small: Small,
    ids: NDArray[np.int32],
    isa: str = "plain",
    *,
    threads: int = 2,
    exact_head: bool = False,
    need: Need = "likely",
) -> Floats:
    with small.open(isa, threads=threads, exact_head=exact_head) as engine:
        return all_logits(engine, engine.new_sequence(len(ids)), ids, need=need)


def exact_blocks(got: Floats, full: Floats) -> NDArray[np.bool_]:
    """[n, blocks] whether all 16 logits have the bits of the full head's."""
    same = np.pad(got == full, ((0, 0), (0, -full.shape[1] % BLOCK_ROWS)), constant_values=True)
    blocks: NDArray[np.bool_] = np.all(same.reshape(len(full), -1, BLOCK_ROWS), axis=2)
    return blocks


def test_exact_mode_has_the_bits_of_a_model_without_a_screen(plain: Small, split: Small) -> None:
    ids = split.ids(N)
    full = logits(plain, ids)
    assert np.array_equal(logits(split, ids, exact_head=True), full)
    assert not np.array_equal(logits(split, ids), full)


@pytest.mark.parametrize(("need", "certain"), [("likely", SURE), ("largest", 1)])
def test_it_computes_what_numpy_says_it_must(
    plain: Small, screened: Mapping[Need, Small], need: Need, certain: int
) -> None:
    split = screened[need]
    ids = split.ids(N)
    full, got = logits(plain, ids), logits(split, ids, need=need)
    expected = estimates(split, states_of(plain, ids), certain)
    sure = expected.nearest > MARGINS  # no block stands on a bar
    assert sure.mean() > 0.3
    exact = exact_blocks(got, full)
    assert 1 < expected.exact[sure].sum(axis=1).mean() < 0.9 * exact.shape[1]
    assert expected.exact[sure].sum() < 0.9 * expected.twice[sure].sum()
    assert np.array_equal(exact[sure], expected.exact[sure])
    estimated = ~np.repeat(expected.exact, BLOCK_ROWS, axis=1)[:, : full.shape[1]]
    estimated &= sure[:, None]
    assert np.abs(got - expected.final)[estimated].max() < MARGINS


@pytest.mark.parametrize("need", ["likely", "largest"])
def test_no_estimate_is_the_largest(
    plain: Small, screened: Mapping[Need, Small], need: Need
) -> None:
    split = screened[need]
    ids = split.ids(N)
    full, got = logits(plain, ids), logits(split, ids, need=need)
    best = got.argmax(axis=1)
    assert np.array_equal(got.max(axis=1), full[np.arange(N), best])  # an exact value
    # Where errors stay within their margins, so it is the full head's too.
    within = (full.max(axis=1) - got.max(axis=1)) <= 0
    assert within.mean() >= 0.99
    assert np.array_equal(best[within], full.argmax(axis=1)[within])
    if need == "likely":
        assert kl_divergence(full, got).mean() < 0.02


def test_the_largest_alone_takes_less(split: Small) -> None:
    counts = {}
    for need in NEEDS[:2]:
        with split.open("plain") as engine:
            all_logits(engine, engine.new_sequence(N), split.ids(N), need=need)
            counts[need] = engine.head_counts
    assert counts["largest"].estimated < 0.8 * counts["likely"].estimated
    assert counts["largest"].exact < 0.8 * counts["likely"].exact


def test_blocks_of_end_tokens_are_always_exact(plain: Small, split: Small) -> None:
    ids = split.ids(N)
    assert exact_blocks(logits(split, ids), logits(plain, ids))[:, 0].all()


@pytest.mark.parametrize("isa", INTEGER_ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_depend_on_neither_kernels_nor_threads(split: Small, isa: str, threads: int) -> None:
    ids = split.ids(N)
    assert np.array_equal(logits(split, ids, isa, threads=threads), logits(split, ids, threads=1))


def test_bits_do_not_depend_on_what_is_in_the_step(split: Small) -> None:
    texts = [split.ids(40, seed) for seed in range(5)]
    with split.open("plain", max_sequences=5) as engine:
        together = [engine.new_sequence(40) for _ in texts]
        rows: list[list[Floats]] = [[] for _ in texts]
        for at in range(0, 40, 4):
            # Some compute in full, and the others must not notice.
            work = [
                Work(s, ids[at : at + 4], "all", NEEDS[i])
                for i, (s, ids) in enumerate(zip(together, texts, strict=True))
            ]
            for i, row in enumerate(engine.step(work)):
                rows[i // 4].append(row.copy())
        for i, ids in enumerate(texts):
            sequence = engine.new_sequence(40)
            alone = [
                engine.step([Work(sequence, [token], need=NEEDS[i])])[0].copy() for token in ids
            ]
            assert np.array_equal(alone, rows[i])
            sequence.release()


def test_a_row_that_asks_for_it_is_exact(plain: Small, split: Small) -> None:
    ids = split.ids(N)
    with split.open("plain") as engine:
        sequence = engine.new_sequence(N)
        got = engine.step([Work(sequence, ids, "all", "all")]).copy()
        assert engine.head_counts.rows == 0
    assert np.array_equal(got, logits(plain, ids))


@pytest.mark.parametrize("cuts", [(Cut(0.2, 1), Cut(0, 32)), (Cut(0.2, 505), Cut(0, 1))])
def test_what_exceeds_a_limit_is_computed_in_full(
    plain: Small, fitted: Fitted, tmp_path: Path, cuts: tuple[Cut, Cut]
) -> None:
    small = with_screen(plain, tmp_path / "s.fl", fitted, coarse=cuts[0], fine=cuts[1])
    ids = small.ids(N)
    with small.open("plain") as engine:
        got = all_logits(engine, engine.new_sequence(N), ids)
        counts = engine.head_counts
    assert np.array_equal(got, logits(plain, ids))
    assert (counts.rows, counts.full, counts.exact) == (N, N, 0)


def test_a_screen_that_misleads_is_found_out(plain: Small, fitted: Fitted, tmp_path: Path) -> None:
    """Estimates of 24 blocks promise what no exact value of theirs keeps."""
    bias = fitted.arrays["screen.bias"].copy()
    bias[: 24 * BLOCK_ROWS] += 100
    wrong = Fitted(fitted.screen, {**fitted.arrays, "screen.bias": bias}, fitted.trials)
    small = with_screen(plain, tmp_path / "s.fl", wrong, coarse=Cut(0, 505), fine=Cut(0, 32))
    ids = small.ids(N)
    with small.open("plain") as engine:
        got = all_logits(engine, engine.new_sequence(N), ids)
        assert engine.head_counts.full == N
    assert np.array_equal(got, logits(plain, ids))


def test_counts_tell_what_was_done(split: Small) -> None:
    ids = split.ids(N)
    with split.open("plain") as engine:
        all_logits(engine, engine.new_sequence(N), ids)
        counts = engine.head_counts
    assert counts.rows == N
    assert counts.full < N / 10
    assert N <= counts.exact < counts.estimated


def test_hidden_states_have_a_row_for_each_of_the_logits(split: Small) -> None:
    ids = split.ids(8)
    states = np.empty((8, split.artifact.spec.d_model), np.float32)
    with split.open("plain") as engine:
        sequence = engine.new_sequence(8)
        engine.step([Work(sequence, ids, "all")], hidden=states)
        one = np.empty((1, states.shape[1]), np.float32)
        again = engine.new_sequence(8)
        for i, token in enumerate(ids):
            engine.step([Work(again, [token])], hidden=one)
            assert np.array_equal(one[0], states[i])
        third = engine.new_sequence(8)
        with pytest.raises(EngineError, match="the step has 8 rows"):
            engine.step([Work(third, ids, "all")], hidden=states[:2])


def test_the_ledger_names_the_screen(plain: Small, split: Small) -> None:
    def terms(small: Small) -> dict[str, int]:
        library = load_library(compile_artifact(small.artifact))
        return make_ledger(small.artifact, library, 2, 1).terms(64, 64)

    without, with_it = terms(plain), terms(split)
    assert "screen" not in without
    assert with_it["screen"] == split.artifact.screen_bytes > 0
    assert abs(with_it["weights"] - without["weights"]) < 4096  # padding
    assert with_it["scratch"] > without["scratch"]


def test_a_small_head_is_left_alone(plain: Small) -> None:
    assert split_head(plain.artifact, "auto") is plain.artifact
    assert split_head(plain.artifact, "off") is plain.artifact


def test_in_fp32_the_screen_works_too(split: Small, plain: Small) -> None:
    ids = split.ids(N)
    got, full = logits(split, ids, "fp32"), logits(plain, ids, "fp32")
    assert np.mean(got.argmax(axis=1) == full.argmax(axis=1)) >= 0.99


def test_artifacts_from_before_split_heads_are_made_anew(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = pull(str(tiny_gguf))
    now = artifact_path(pulled, "import")
    monkeypatch.setattr(prepare, "FORMAT_VERSION", 1)
    assert artifact_path(pulled, "import") != now
