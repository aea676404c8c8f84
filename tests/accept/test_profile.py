"""The profiler on real models: what marks cost, what they cover, and how well a machine's profile
predicts. Run it on an idle machine.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.codegen.target import host_target
from flashlite.compress.latency import predict_latency
from flashlite.compress.machine_profile import MachineProfile
from flashlite.evaluate.calibrate import measure_machine
from flashlite.evaluate.profile import profile_steps
from flashlite.evaluate.profiling import sample_prompt
from flashlite.evaluate.steps import Runner
from flashlite.runtime.engine import Engine, default_threads
from flashlite.runtime.library import load_library
from flashlite.runtime.prepare import compile_artifact, find_artifact

pytestmark = pytest.mark.accept

SMOLLM2, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
THREADS = int(os.environ.get("FLASHLITE_THREADS") or default_threads())
DEPTH, PROMPT, STEPS = 512, 512, 64


def text_of(artifact: Artifact, n: int) -> NDArray[np.int32]:
    """A prompt: what a split head does depends on what is likely."""
    prompt = sample_prompt(Tokenizer(load_texts(artifact), name=artifact.name))
    return np.resize(prompt, n).astype(np.int32)


def measure(artifact: Artifact, exact_head: bool) -> tuple[float, float]:
    """Seconds of a step at DEPTH and tokens/s of prefill, by the normal library: the best of
    several blocks, since whatever else runs only adds.
    """
    ids = text_of(artifact, PROMPT)
    library = load_library(compile_artifact(artifact))
    weights = load_weights(artifact)
    with Engine(
        library, weights, max_tokens=1024, threads=THREADS, exact_head=exact_head
    ) as engine:
        runner = Runner(engine)
        runner.prefill(ids)
        runs = [runner.prefill(ids) for _ in range(8)]
        prefill = min(run[-1].end - run[0].start for run in runs) / 1e9
        timeline = engine.new_sequence(DEPTH + STEPS)
        runner.append(timeline, ids[:DEPTH], None)
        written = runner.write(timeline, int(ids[0]), STEPS - 1, runner.sampler())
        timeline.truncate(DEPTH)
        steps = runner.decode(timeline, np.array(written, np.int32), runner.sampler())
        blocks = [steps[i : i + 8] for i in range(0, STEPS, 8)]
        decode = min(block[-1].end - block[0].start for block in blocks) / 8e9
    return decode, PROMPT / prefill


def test_marks_cost_little_and_leave_no_gap() -> None:
    artifact = find_artifact(SMOLLM2)
    weights = load_weights(artifact)
    found = []
    for _ in range(3):  # whatever else runs only adds to one side or the other
        prefill, decode, lost = profile_steps(
            artifact,
            weights,
            host_target(),
            text_of(artifact, PROMPT),
            prompt_tokens=PROMPT,
            decode=STEPS,
            depth=DEPTH,
            threads=THREADS,
            rounds=5,
        )
        assert lost == 0
        for phase in (prefill, decode):
            print(
                f"\n{phase.name}: {phase.normal * 1e6:.1f} us per token, with marks "
                f"{phase.overhead - 1:+.1%}, parts add up to {phase.covered:.1%}"
            )
            assert phase.covered >= 0.95
        found.append((prefill.overhead, decode.overhead))
    for overheads in zip(*found, strict=True):
        assert sorted(overheads)[1] <= 1.03


@pytest.fixture(scope="module")
def machine() -> MachineProfile:
    return measure_machine(host_target(), [THREADS])


@pytest.mark.parametrize(
    ("model", "preset", "exact_head"),
    [
        (SMOLLM2, "import", False),
        (SMOLLM2, "q8", False),
        (SMOLLM2, "q4", False),
        (GEMMA, "import", False),
        (GEMMA, "import", True),
        (GEMMA, "q4", True),
    ],
)
def test_a_plan_is_predicted_within_a_fifth(
    machine: MachineProfile, model: str, preset: str, exact_head: bool
) -> None:
    artifact = find_artifact(model, preset=preset, accept_license=model == GEMMA)
    decode, prefill = measure(artifact, exact_head)
    predicted = predict_latency(
        artifact.spec,
        artifact.plan,
        machine,
        depth=DEPTH + STEPS // 2,
        prompt_tokens=PROMPT,
        exact_head=exact_head,
    )
    print(
        f"\n{model} {preset}, {THREADS} threads{', exact head' * exact_head}: decoding "
        f"{decode * 1e3:.2f} ms, predicted {predicted.decode_seconds / decode - 1:+.1%}; prefill "
        f"{prefill:.0f} tokens/s, predicted {predicted.prefill_tokens_s / prefill - 1:+.1%}"
    )
    assert predicted.decode_seconds == pytest.approx(decode, rel=0.2)
    assert predicted.prefill_tokens_s == pytest.approx(prefill, rel=0.2)
