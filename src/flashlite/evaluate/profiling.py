"""From an artifact to its `Profile`: what is asked of the model, within which memory.

The prompt is text that people might write, in many languages and code, repeated as often as its
length needs; what follows it the model writes itself. So a split head, whose work depends on what
is likely, does what it does in use.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashlite.analyze.openings import OPENINGS
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_weights
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.codegen.target import Target
from flashlite.compress.work import packed_bytes
from flashlite.evaluate.limits import READ_BYTES, dot_rate, read_rate
from flashlite.evaluate.profile import Profile, profile_steps
from flashlite.evaluate.redundancy import layer_redundancy
from flashlite.runtime.library import MARK, MARKS, load_library
from flashlite.runtime.model import plan_model
from flashlite.runtime.prepare import Progress, compile_artifact
from flashlite.runtime.process import limit_data

__all__ = ["profile_artifact", "sample_prompt"]

_REDUNDANCY_TOKENS = 128


def profile_artifact(
    artifact: Artifact,
    target: Target,
    *,
    prompt_tokens: int = 512,
    decode: int = 64,
    depth: int = 512,
    threads: int,
    rounds: int = 3,
    max_mem: int | None = None,
    exact_head: bool = False,
    redundancy: bool = True,
    progress: Progress | None = None,
) -> Profile:
    """Measure where the time of a model goes on this machine.

    Args:
        artifact: what to measure; compiled here, twice, when it is not yet.
        target: the machine at hand, with the instruction set to use.
        prompt_tokens: length of the prompt whose prefill is measured.
        decode: steps of decoding.
        depth: tokens stored before the first of them.
        threads: of the engine.
        rounds: prompts, the median counts.
        max_mem: bytes this process keeps within, or None.
        exact_head: compute every logit, also where the model has a split head.
        redundancy: measure too how little each layer does, with NumPy.
        progress: called with (stage, done, total).

    Raises:
        UsageError: a number is outside its range.
        MemoryCeiling: it does not fit `max_mem`; every term is named.
        FlashliteError: compiling or opening failed.
    """

    def stage(name: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(name, done, total) if progress is not None else None

    room = min(max(prompt_tokens, depth + decode), artifact.spec.max_context)
    profiled = load_library(compile_artifact(artifact, target, profile=True))
    with limit_data(max_mem, threads):
        _, tokenizer, _ = plan_model(
            artifact,
            target,
            ceiling=max_mem,
            wanted=room,
            threads=threads,
            reserved={
                # Each mark is kept, and read as Python objects at the end.
                "profiled engine": int(profiled.describe(threads).scratch_bytes)
                + (room // 32 + 1) * int(profiled.info.page_bytes),
                "marks": (decode + 8) * 16 * artifact.spec.n_layers * threads * MARK.itemsize * 16
                + MARKS * MARK.itemsize,
                "measuring": max(READ_BYTES, _largest_layer(artifact) if redundancy else 0),
            },
        )
        read, dots = read_rate(target, threads), dot_rate(target, threads)
        weights = load_weights(artifact)
        ids = sample_prompt(tokenizer)
        prefill, decoding, lost = profile_steps(
            artifact,
            weights,
            target,
            ids,
            prompt_tokens=prompt_tokens,
            decode=decode,
            depth=depth,
            threads=threads,
            rounds=rounds,
            exact_head=exact_head,
            report=stage("profile"),
        )
        turned = None
        if redundancy:
            few = ids[: min(len(ids), _REDUNDANCY_TOKENS, artifact.spec.max_context)]
            turned = layer_redundancy(artifact, weights, few, stage("redundancy"))
    return Profile(
        artifact.name,
        artifact.digest,
        target.isa,
        threads,
        read,
        dots,
        lost,
        prefill,
        decoding,
        turned,
    )


def sample_prompt(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The beginning of a text in every language, one after another: some hundred tokens."""
    ids: list[int] = []
    for opening in OPENINGS:
        text = "\n".join((*opening.texts, *opening.questions))
        ids += tokenizer.encode(text + "\n") if ids else tokenizer.encode_prompt(text + "\n")
    return np.array(ids, np.int32)


def _largest_layer(artifact: Artifact) -> int:
    """Bytes of the largest matrix of a layer in floats, and of what is made on the way to it."""
    sizes = [
        packed_bytes("f32", *shape)
        for name, shape in artifact.spec.shapes()
        if name.startswith("layers.") and len(shape) == 2
    ]
    return 4 * max(sizes)
