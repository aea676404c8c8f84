"""A machine measured with probes small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from flashlite.codegen.target import host_target
from flashlite.compress.latency import predict_latency
from flashlite.compress.machine_profile import BATCHES, MachineProfile
from flashlite.compress.plan import PACKED
from flashlite.evaluate import calibrate, limits
from flashlite.evaluate.probe_model import make_probe
from flashlite.model.spec import ModelSpec


def spec(head_dim: int, d_model: int, layers: int) -> ModelSpec:
    return ModelSpec(
        family="llama", n_layers=layers, d_model=d_model, n_heads=2, n_kv_heads=1,
        head_dim=head_dim, d_ff=96, vocab_size=80, max_context=1024, norm_eps=1e-5,
        rope_theta=1e4, tied_head=True, activation="silu",
    )  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    def shapes() -> dict[str, tuple[ModelSpec, Sequence[str]]]:
        return {
            "wide": (spec(32, 64, len(PACKED)), PACKED),
            "narrow": (spec(32, 64, 2), PACKED[:1]),
            "broad": (spec(64, 64, 2), PACKED[:1]),
            "tiny": (spec(32, 32, 2), PACKED[:1]),
        }

    monkeypatch.setattr(calibrate, "_probe_shapes", shapes)
    monkeypatch.setattr(calibrate, "_REPEATS", dict.fromkeys(BATCHES, 2))
    monkeypatch.setattr(calibrate, "read_rate", lambda target, threads: 10.0 * threads)
    monkeypatch.setattr(calibrate, "gather_rate", lambda target, threads: 5.0)
    monkeypatch.setattr(calibrate, "dot_rate", lambda target, threads: None)


@pytest.mark.usefixtures("few")
def test_a_profile_has_every_format_and_predicts() -> None:
    target = host_target()
    said: list[tuple[int, int]] = []
    machine = calibrate.measure_machine(target, [1, 2], lambda *done: said.append(done))
    assert said[-1] == (8, 8)
    assert machine.isa == target.isa
    assert [rates.threads for rates in machine.rates] == [1, 2]
    for rates in machine.rates:
        assert set(rates.gemv_gb_s) == set(rates.gemm_gmac_s) == set(PACKED)
        assert all(rate > 0 for rate in rates.gemv_gb_s.values())
        assert all(set(table) == set(BATCHES) for table in rates.gemm_gmac_s.values())
        assert rates.attend_ns != ((0, 0), (0, 0))
        assert rates.fixed_us["call"] > 0
    assert MachineProfile.from_json(json.loads(json.dumps(machine.to_json()))) == machine
    probe = make_probe("other", spec(32, 64, 4), PACKED)
    latency = predict_latency(probe.artifact.spec, probe.plan, machine, depth=64, prompt_tokens=64)
    assert 1e-7 < latency.decode_seconds < 1
    assert latency.prefill_tokens_s > 1


def test_limits_of_the_machine_are_positive() -> None:
    for isa in ("plain", None):
        target = host_target(isa)
        assert limits.read_rate(target, 1, nbytes=1 << 20, seconds=0.01) > 0
        assert limits.gather_rate(target, 1, seconds=0.01) > 0
        dots = limits.dot_rate(target, 2, seconds=0.01)
        assert dots is None if target.isa == "plain" else dots is None or dots > 0
