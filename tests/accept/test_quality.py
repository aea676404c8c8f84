"""Real models: the compiled one against the NumPy oracle and against llama.cpp, in nats.

Text: wikitext-2 valid, windows of the given size, each from position 0 and begun as the model asks
(Gemma wants its BOS: without one it is far outside what it was trained on).
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights, tensor
from flashlite.checkpoint.pull import pull
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.codegen.target import host_isa, host_target
from flashlite.evaluate.peers import PEERS, peer_python
from flashlite.model.metrics import kl_divergence, top1_agreement
from flashlite.model.reference import Reference
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.prepare import compile_artifact, find_artifact

pytestmark = pytest.mark.accept

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A model, how many tokens, in windows of how many; fp32 is slow and takes fewer."""

    model: str
    tokens: int
    window: int
    fp32_tokens: int


CASES = [
    Case("smollm2-135m-instruct", 4096, 512, 1024),
    Case("gemma-3-270m", 4096, 1024, 1024),  # beyond its sliding window of 512
    Case("qwen2.5-coder-1.5b-instruct", 512, 512, 64),
]


@dataclass(frozen=True)
class Ready:
    case: Case
    artifact: Artifact
    weights: NDArray[np.uint8]
    ids: NDArray[np.int32]

    def windows(self, tokens: int) -> list[NDArray[np.int32]]:
        size = min(self.case.window, tokens)
        return [self.ids[i : i + size] for i in range(0, tokens, size)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model)
def ready(request: pytest.FixtureRequest, flashlite_data: Path) -> Ready:
    case: Case = request.param
    artifact = find_artifact(case.model)
    text = (flashlite_data / "wikitext-2/valid.txt").read_text(encoding="utf-8")
    ids = Tokenizer(load_texts(artifact)).encode(text[: case.tokens * 8])
    tokens = artifact.tokens
    begin = [tokens.bos] if tokens.add_bos and tokens.bos is not None else []
    step = case.window - len(begin)
    windows = [begin + ids[i : i + step] for i in range(0, len(ids), step)]
    ids = [token for window in windows for token in window][: case.tokens]
    return Ready(case, artifact, load_weights(artifact), np.array(ids, np.int32))


def compiled_logits(ready: Ready, isa: str, ids: NDArray[np.int32]) -> Floats:
    library = load_library(compile_artifact(ready.artifact, host_target(isa)))
    with Engine(library, ready.weights, max_tokens=len(ids), threads=2, exact_head=True) as engine:
        sequence = engine.new_sequence(len(ids))
        return np.concatenate(
            [
                engine.step([Work(sequence, ids[i : i + MAX_BATCH], "all")]).copy()
                for i in range(0, len(ids), MAX_BATCH)
            ]
        )


def oracle_logits(ready: Ready, ids: NDArray[np.int32]) -> Floats:
    held: dict[str, Floats] = {}  # the tied table is asked for twice

    def weights(name: str) -> Floats:
        if name not in held:
            held[name] = tensor(ready.artifact, ready.weights, name)
        return held[name]

    return Reference(ready.artifact.spec, weights).logits(ids)


def test_int8_activations_and_kv_cost_at_most_five_millinats(ready: Ready) -> None:
    divergences, agreements = [], []
    for ids in ready.windows(ready.case.tokens):
        expected, got = oracle_logits(ready, ids), compiled_logits(ready, host_isa(), ids)
        divergences.append(kl_divergence(expected, got))
        agreements.append(top1_agreement(expected, got))
    mean, top1 = float(np.concatenate(divergences).mean()), float(np.mean(agreements))
    print(f"\n{ready.case.model}: KL {mean:.5f} nats, top-1 {100 * top1:.2f} %")
    assert mean <= 0.005
    assert top1 >= 0.96


def test_in_fp32_the_arithmetic_is_the_oracles(ready: Ready) -> None:
    worst = 0.0
    for ids in ready.windows(ready.case.fp32_tokens):
        expected, got = oracle_logits(ready, ids), compiled_logits(ready, "fp32", ids)
        worst = max(worst, float(kl_divergence(expected, got).mean()))
    print(f"\n{ready.case.model}: FP32 KL {worst:.2e} nats")
    assert worst <= 1e-5


def test_llama_cpp_on_the_same_file_is_near(ready: Ready, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ready.ids)
    script = Path(__file__).with_name("llama_cpp_logits.py")
    command: list[str | Path] = [
        peer_python(PEERS["llama.cpp"]),
        script,
        pull(ready.case.model, offline=True).path,
        tmp_path / "ids.npy",
        tmp_path / "logits.npy",
        str(ready.case.window),
    ]
    subprocess.run(command, check=True, capture_output=True)
    theirs = np.load(tmp_path / "logits.npy", mmap_mode="r")
    divergences = []
    for i, ids in enumerate(ready.windows(ready.case.tokens)):
        rows = slice(i * ready.case.window, i * ready.case.window + len(ids))
        ours = compiled_logits(ready, host_isa(), ids)
        divergences.append(kl_divergence(np.asarray(theirs[rows]), ours))
    mean = float(np.concatenate(divergences).mean())
    print(f"\n{ready.case.model}: KL to llama.cpp {mean:.5f} nats")
    assert mean <= 0.010
