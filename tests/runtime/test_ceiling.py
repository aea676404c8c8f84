"""The ceiling is kept: a process that loads a model with `max_mem` and fills it stays below."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import make_gguf
import pytest

from flashlite.errors import MemoryCeiling
from flashlite.runtime.memory import LOGPROB_BYTES, TOKEN_BYTES, parse_size
from flashlite.runtime.model import load
from flashlite.runtime.sampler import Drawn
from flashlite.runtime.scheduler import Piece

FILL = Path(__file__).with_name("fill_model.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def fill(model: str | Path, seconds: float = 0, **settings: Any) -> dict[str, Any]:
    """What `fill_model.py` reports."""
    done = subprocess.run(
        [sys.executable, FILL, str(model), json.dumps(settings), str(seconds)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]  # a kill would be negative
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("model", ["tiny", "smollm2-135m-instruct"])
def test_the_smallest_accepted_ceiling_is_kept(model: str, tiny_gguf: Path) -> None:
    """Four sequences share an arena that holds at least one of them at full length."""
    name = tiny_gguf if model == "tiny" else model
    load(name).close()  # quantized and compiled: that has a need of its own
    length = 128 if model == "tiny" else 256
    settings = {"max_sequences": 4, "max_sequence_length": length}
    said = fill(name, max_mem="1MB", **settings)["refused"]
    for term in ("weights", "KV cache", "scratch", "logits", "requests", "runtime", "1.0 MB"):
        assert term in said
    ceiling = parse_size(said.partition("raise max_mem to ")[2].split()[0])
    report = fill(name, max_mem=ceiling, **settings)
    assert report["peak"] <= report["total"] <= ceiling
    assert report["kv_pages_free"] == report["kv_pages"]
    # It is no wild guess either: most of what it counts is there.
    if model != "tiny":
        assert report["peak"] > 0.9 * report["total"]


def test_every_sequence_at_full_length_keeps_within_the_ledger() -> None:
    report = fill(
        "smollm2-135m-instruct", max_mem="400MB", max_sequences=3, max_sequence_length=512
    )
    assert report["arena_tokens"] == 3 * 512
    assert report["peak"] <= report["total"] <= 400_000_000


def test_a_model_that_cannot_even_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    copy = tmp_path / "other.gguf"
    make_gguf.write_gguf(copy, *make_gguf.tiny_model())
    # By its need, or before that: quantizing or compiling hits the limit.
    assert "max_mem" in fill(copy, max_mem="1MB")["refused"]


def test_a_ceiling_shortens_the_context_and_says_so(tiny_gguf: Path) -> None:
    with load(tiny_gguf) as model:
        needed, context = model.plan, model.plan.context
    assert needed.note is None
    terms = needed.terms
    spare = terms["KV cache"] + terms["requests"] + terms["tokenizing"]
    # What is held by now counts as runtime, so that this process cannot say what would be enough.
    for ceiling in range(needed.total - spare, needed.total + (200 << 20), 1 << 16):
        try:
            model = load(tiny_gguf, max_mem=ceiling)
        except MemoryCeiling:
            continue
        break
    with model:
        assert model.max_sequence_length < context
        assert model.plan.total <= ceiling
        assert model.plan.note is not None
        assert str(model.max_sequence_length) in model.plan.note


def test_a_request_that_can_never_fit_is_refused_with_a_figure(tiny_gguf: Path) -> None:
    with load(tiny_gguf, max_mem="2GB", max_sequence_length=512) as model:
        with pytest.raises(MemoryCeiling, match=r"to tokenize 16384 at once"):
            model.generate("x" * 16385)
        with pytest.raises(MemoryCeiling, match=r"to tokenize 16384 at once"):
            model.chat([{"role": "user", "content": "é" * 5000}] * 2)
        with pytest.raises(MemoryCeiling, match=r"500 tokens with 20 logprobs each would take"):
            model.generate("once", logprobs=20, max_tokens=500)
        assert model.generate("once", logprobs=5, max_tokens=20).completion_tokens <= 20
    with load(tiny_gguf, max_sequence_length=512) as model:  # no ceiling, no such limits
        assert len(model.tokenizer.encode("x" * 16385)) > 0
        assert model.generate("once", logprobs=20, max_tokens=500).completion_tokens <= 500


def test_what_a_request_holds_per_token_is_what_the_ledger_says() -> None:
    """Pieces that nobody has read yet, with their text, ids and log-probabilities."""
    n, logprobs = 2000, 20
    tracemalloc.start()
    try:
        taken = []
        for top in (0, logprobs):
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            held = [
                (
                    1000 + i,  # Generation.generated
                    Piece(
                        f" word {i}",
                        Drawn(
                            1000 + i, -0.5 - i, tuple((2000 + i + j, -1.5 * j) for j in range(top))
                        ),
                    ),
                )
                for i in range(n)
            ]
            taken.append((tracemalloc.get_traced_memory()[0] - before) / n)
            assert len(held) == n
            del held
    finally:
        tracemalloc.stop()
    engine_ids = 3 * 4  # prompt, history, ids of the sequence
    assert taken[0] + engine_ids <= TOKEN_BYTES
    assert (taken[1] - taken[0]) / logprobs <= LOGPROB_BYTES


def test_settings_that_say_nothing_of_memory_set_no_limit(tiny_gguf: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with load(tiny_gguf):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with load(tiny_gguf, max_mem="3GB") as model:
        assert 0 < resource.getrlimit(resource.RLIMIT_DATA)[0] < 5 * 10**9
        with pytest.raises(MemoryError):
            bytearray(6 * 10**9)
        assert model.generate("once", max_tokens=4).completion_tokens <= 4
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with pytest.raises(MemoryCeiling):
        load(tiny_gguf, max_mem="1MB")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
