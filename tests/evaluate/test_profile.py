"""Phases of a small model: every moment has a part, and bytes and products are counted right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import Small, quantize_small

from flashlite.codegen.target import host_target
from flashlite.compress.work import PARTS
from flashlite.errors import UsageError
from flashlite.evaluate.profile import ORDER, Profile, profile_steps
from flashlite.evaluate.redundancy import layer_redundancy
from flashlite.evaluate.trace import trace_events

PROMPT, DECODE, DEPTH = 70, 9, 40


@pytest.fixture(scope="module")
def small(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return quantize_small(tiny_gguf, "import", tmp_path_factory.mktemp("small") / "small.fl")


@pytest.fixture(scope="module", params=[1, 2])
def profile(small: Small, request: pytest.FixtureRequest) -> Profile:
    prefill, decode, lost = profile_steps(
        small.artifact,
        small.weights,
        host_target(),
        small.ids(50),
        prompt_tokens=PROMPT,
        decode=DECODE,
        depth=DEPTH,
        threads=request.param,
        rounds=2,
    )
    return Profile(
        "small", small.artifact.digest, host_target().isa, request.param, 10.0, None, lost,
        prefill, decode,
    )  # fmt: skip


def test_the_parts_add_up_to_the_time(profile: Profile) -> None:
    assert profile.lost == 0
    for phase in (profile.prefill, profile.decode):
        assert 0.95 <= phase.covered <= 1.0001
        assert 0 < phase.overhead < 100
        names = [line.part for line in phase.by_part()]
        assert names == list(ORDER)
        layers = sum(line.seconds for line in phase.by_layer())
        outside = sum(line.seconds for line in phase.lines if line.layer is None)
        assert layers + outside == pytest.approx(sum(line.seconds for line in phase.lines))


def test_bytes_and_products_are_those_of_the_model(small: Small, profile: Profile) -> None:
    artifact = small.artifact
    spec = artifact.spec
    matrices = {name: shape for name, shape in spec.shapes() if len(shape) == 2 and name != "embed"}
    layer = sum(r * c for name, (r, c) in matrices.items() if name.startswith("layers.0."))
    head = spec.vocab_size * spec.d_model
    decode = {(line.part, line.layer): line for line in profile.decode.lines}
    products = sum(line.macs for line in decode.values() if line.layer == 0)
    # Queries see DEPTH + 1 .. DEPTH + DECODE positions, in the middle of them on the average.
    attended = decode["attention", 0].macs
    seen = attended / (2 * spec.n_heads * spec.head_dim)
    assert DEPTH + 1 <= seen <= DEPTH + DECODE
    assert products - attended == layer
    assert decode["head", None].macs == head
    stored = sum(
        entry.nbytes
        for name, entry in artifact.tensors.items()
        if name.startswith("layers.0.") and not name.endswith("_bias")
    )
    read = sum(line.weight_bytes for line in decode.values() if line.layer == 0)
    assert read == stored
    prefill = {(line.part, line.layer): line for line in profile.prefill.lines}
    # Per token of a prompt: weights are read once for all of it, its head for the last alone.
    assert prefill["gate_up", 0].weight_bytes * PROMPT == decode["gate_up", 0].weight_bytes
    assert prefill["head", None].macs * PROMPT == pytest.approx(head)
    assert prefill["attention", 0].macs * PROMPT == (
        2 * spec.n_heads * spec.head_dim * sum(range(1, PROMPT + 1))
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prompt_tokens": 10**7}, "prompt is 10000000, allowed 1 to 512"),
        ({"decode": 0}, "decode is 0"),
        ({"depth": 500, "decode": 13}, "depth \\+ decode is 513"),
    ],
)
def test_lengths_beyond_the_context_are_named(
    small: Small, sizes: dict[str, int], message: str
) -> None:
    usual: dict[str, Any] = {"prompt_tokens": 8, "decode": 8, "depth": 8}
    with pytest.raises(UsageError, match=message):
        profile_steps(
            small.artifact, small.weights, host_target(), small.ids(8), threads=1, **usual | sizes
        )


# The trace


def check_schema(trace: Mapping[str, Any]) -> None:
    """What Chrome's and Perfetto's readers ask of the JSON object format."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert isinstance(trace["otherData"], dict)
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert event["ph"] in ("X", "M")
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            continue
        assert isinstance(event["tid"], int)
        assert isinstance(event["cat"], str)
        for key in ("ts", "dur"):
            assert isinstance(event[key], float)
            assert event[key] >= 0


def test_the_trace_has_the_format_and_its_events_nest(profile: Profile) -> None:
    trace = trace_events(profile)
    check_schema(trace)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    # A pool that a busy machine keeps waiting is left out of steps.
    assert {0} <= {event["tid"] for event in events} <= set(range(profile.threads))
    assert {event["cat"] for event in events} == {"prefill", "decode"}
    steps = [event for event in events if ":" in event["name"]]
    assert [event["name"] for event in steps] == [
        f"prefill: {PROMPT} at 0",
        *(f"decode: 1 at {DEPTH + i}" for i in range(DECODE)),
    ]
    for thread in range(profile.threads):
        open_until: list[float] = []
        mine = [event for event in events if event["tid"] == thread]
        for event in sorted(mine, key=lambda event: (event["ts"], -event["dur"])):
            end = event["ts"] + event["dur"]
            while open_until and open_until[-1] <= event["ts"] + 1e-3:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-3  # no two overlap in part
            open_until.append(end)
    names = {event["name"] for event in events if event not in steps}
    assert names == {*PARTS, "call"}


# Redundancy


def test_redundancy_is_that_of_the_oracle(small: Small) -> None:
    ids = small.ids(20)
    found = layer_redundancy(small.artifact, small.weights, ids)
    reference = small.reference()
    x = reference.embed(ids)
    for i, value in enumerate(found):
        after = reference.layer(i, x)
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in zip(x[1:], after[1:], strict=True)
        ]
        assert value == pytest.approx(1 - np.mean(cosines), abs=1e-5)
        x = after
    assert len(found) == small.artifact.spec.n_layers
