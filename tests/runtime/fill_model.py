"""Runs in a process of its own: load a model under a ceiling, fill it, and say what it took.

    python fill_model.py MODEL SETTINGS SECONDS

SETTINGS is a JSON object of arguments of `flashlite.load`. Every sequence runs to the end of its
context, with what a request may ask for at most beside it, again and again for SECONDS. One JSON
object on stdout; a refusal is {"refused": TEXT}.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import flashlite
from flashlite.errors import ContextOverflow, FlashliteError, MemoryCeiling
from flashlite.runtime.memory import text_limit
from flashlite.runtime.model import Model
from flashlite.runtime.process import resident_bytes
from flashlite.runtime.sampling import SamplingParams

_ANSWER = 24  # tokens after a prompt that nearly fills the context


def fill(model: Model, seed: int) -> int:
    """Full contexts in every sequence and two more waiting; the pieces are read at the end, as a
    slow reader would. Returns the tokens that were stored."""
    rng = random.Random(seed)
    context, vocab = model.max_sequence_length, model.artifact.spec.vocab_size
    # logit_bias: as many as a request may name.
    bias = dict.fromkeys(rng.sample(range(vocab), min(vocab, 4096)), -1.0)
    params = SamplingParams(
        temperature=1.0,
        top_p=0.95,
        seed=seed,
        repetition_penalty=1.1,
        logit_bias=bias,
        logprobs=5,
        max_tokens=_ANSWER,
    )
    prompt = context - _ANSWER - 1
    generations = [
        model.submit([rng.randrange(vocab) for _ in range(prompt)], params)
        for _ in range(model.plan.ledger.sequences + 2)
    ]
    while not model.scheduler.idle:
        model.scheduler.step()
    assert all(g.finish_reason is not None for g in generations)
    return sum(len(g.prompt) + len(g.generated) for g in generations)


def tokenize(model: Model) -> None:
    """The text that takes the most memory, as long as it may be; a byte more is refused."""
    most = text_limit(model.max_sequence_length)
    digits = "".join(random.Random(1).choices("0123456789", k=most))
    model.tokenizer.encode(digits)
    try:
        model.tokenizer.encode(digits + "0")
    except MemoryCeiling:
        pass
    else:
        raise AssertionError("a text above the limit was taken")
    try:
        model.generate(digits)
    except ContextOverflow:
        pass
    else:
        raise AssertionError("a prompt longer than the context was taken")


def main() -> None:
    """As the module says."""
    name, settings, seconds = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
    report: dict[str, Any] = {}
    try:
        with flashlite.load(name, **settings) as model:
            end, tokens, seed = time.monotonic() + seconds, 0, 0
            tokenize(model)
            while not tokens or time.monotonic() < end:
                tokens += fill(model, seed)
                seed += 1
            tokenize(model)
            report = {"tokens": tokens, "open": resident_bytes(), **model.memory}
    except FlashliteError as error:
        report = {"refused": str(error)}
    report["peak"] = resident_bytes("VmHWM")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
