"""Checkpoints for the tests of `flashlite.model`: stored fixtures, and arrays in a plain file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.checkpoint.base import Checkpoint, TensorInfo
from flashlite.checkpoint.open import open_checkpoint
from flashlite.model.families import describe
from flashlite.model.source import SourceModel

Arrays = dict[str, NDArray[np.float32]]
Plain = Callable[[Literal["gguf", "safetensors"], str, Mapping[str, object], Arrays], Checkpoint]

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
CASES = sorted(folder.name for folder in FAMILIES.iterdir())


@dataclass(frozen=True)
class Case:
    """A stored checkpoint and what transformers computed with it."""

    name: str
    folder: Path
    source: SourceModel
    ids: NDArray[np.int32]
    logits: NDArray[np.float32]


@pytest.fixture(scope="session")
def cases() -> Mapping[str, Case]:
    """Every fixture of `benchmarks/fixtures/make_family_fixtures.py`, by name."""
    found = {}
    for name in CASES:
        stored = np.load(FAMILIES / name / "expected.npz")
        source = describe(open_checkpoint(FAMILIES / name))
        found[name] = Case(name, FAMILIES / name, source, stored["ids"], stored["logits"])
    return found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, cases: Mapping[str, Case]) -> Case:
    """Each of `cases` in turn."""
    return cases[request.param]


@pytest.fixture
def plain_checkpoint(tmp_path: Path) -> Plain:
    """Write float32 arrays one after another into a file, and describe them as a checkpoint."""

    def write(
        fmt: Literal["gguf", "safetensors"],
        architecture: str,
        metadata: Mapping[str, object],
        arrays: Arrays,
    ) -> Checkpoint:
        path = tmp_path / "tensors.bin"
        tensors: dict[str, TensorInfo] = {}
        with path.open("wb") as file:
            for name, array in arrays.items():
                data = np.ascontiguousarray(array, dtype="<f4")
                tensors[name] = TensorInfo(name, data.shape, "F32", path, file.tell(), data.nbytes)
                file.write(data.tobytes())
        return Checkpoint(path, fmt, architecture, metadata, tensors)

    return write


@pytest.fixture
def gguf_metadata() -> dict[str, Any]:
    """Keys of a two-layer llama."""
    return {
        "llama.embedding_length": 16,
        "llama.block_count": 2,
        "llama.feed_forward_length": 24,
        "llama.context_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100.0,
    }


@pytest.fixture
def gguf_arrays() -> Arrays:
    """Random tensors for `gguf_metadata`."""
    d, q, kv, ff = 16, 16, 8, 24
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, d), "output_norm.weight": (d,)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (d,),
            f"blk.{i}.attn_q.weight": (q, d),
            f"blk.{i}.attn_k.weight": (kv, d),
            f"blk.{i}.attn_v.weight": (kv, d),
            f"blk.{i}.attn_output.weight": (d, q),
            f"blk.{i}.ffn_norm.weight": (d,),
            f"blk.{i}.ffn_gate.weight": (ff, d),
            f"blk.{i}.ffn_up.weight": (ff, d),
            f"blk.{i}.ffn_down.weight": (d, ff),
        }
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
