"""Small models for the tests of the engine, and the oracle of exactly their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_weights, tensor
from flashlite.artifact.write import quantize
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.tokenizer import SpecialTokens, TokenizerFiles
from flashlite.codegen.target import check_isa, host_target
from flashlite.errors import UnsupportedTarget
from flashlite.model.families import describe_any
from flashlite.model.reference import Reference
from flashlite.runtime.engine import Engine, Sequence, Work
from flashlite.runtime.library import MAX_BATCH, Need, load_library
from flashlite.runtime.prepare import compile_artifact

FAMILIES = sorted(p.name for p in (Path(__file__).parent.parent / "fixtures/families").iterdir())
NO_TEXT = TokenizerFiles(b"{}", None, SpecialTokens(None, (), False, ()))


@dataclass(frozen=True)
class Small:
    """One artifact, its weights in memory, and its oracle."""

    artifact: Artifact
    weights: NDArray[np.uint8]

    def reference(self) -> Reference:
        """The oracle; a tied model whose head is stored apart is untied to it."""
        tied = "head" not in self.artifact.plan.formats
        spec = replace(self.artifact.spec, tied_head=tied)
        return Reference(spec, lambda name: tensor(self.artifact, self.weights, name))

    def open(self, isa: str, **settings: Any) -> Engine:
        library = load_library(compile_artifact(self.artifact, host_target(isa)))
        return Engine(library, self.weights, **{"max_tokens": 512, "threads": 2} | settings)

    def ids(self, n: int, seed: int = 0) -> NDArray[np.int32]:
        rng = np.random.default_rng(seed)
        return rng.integers(0, self.artifact.spec.vocab_size, n).astype(np.int32)


def runs(isa: str) -> bool:
    """Whether this CPU does."""
    try:
        check_isa(isa)
    except UnsupportedTarget:
        return False
    return True


def quantize_small(path: Path, preset: str, folder: Path) -> Small:
    """The artifact `folder` of a checkpoint without a tokenizer."""
    source = describe_any(open_checkpoint(path))
    provenance = {"source": "", "sha256": "", "licence": ""}
    artifact = quantize(source, NO_TEXT, folder, preset, name="small", provenance=provenance)
    return Small(artifact, load_weights(artifact))


def all_logits(
    engine: Engine,
    sequence: Sequence,
    ids: NDArray[np.int32],
    chunk: int = MAX_BATCH,
    need: Need = "likely",
) -> NDArray[np.float32]:
    """Logits after every token, (n, vocab)."""
    parts = [
        engine.step([Work(sequence, ids[i : i + chunk], "all", need)]).copy()
        for i in range(0, len(ids), chunk)
    ]
    return np.concatenate(parts)
