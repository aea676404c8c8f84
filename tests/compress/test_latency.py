"""What a step has to do, and how long it is predicted to take."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashlite.compress.latency import part_seconds, predict_latency
from flashlite.compress.machine_profile import MachineProfile, Rates
from flashlite.compress.plan import PACKED, Format, Plan
from flashlite.compress.screen import Cut, Screen
from flashlite.compress.work import PARTS, Matrix, Part, packed_bytes, step_parts
from flashlite.errors import CompressError
from flashlite.model.spec import ModelSpec

SPEC = ModelSpec(
    family="llama", n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96,
    vocab_size=100, max_context=512, norm_eps=1e-5, rope_theta=1e4, tied_head=True,
    activation="silu",
)  # fmt: skip
RATES = Rates(
    threads=2,
    read_gb_s=20.0,
    dot_gmac_s=200.0,
    gather_gb_s=3.0,
    kv_gb_s=4.0,
    gemv_gb_s=dict.fromkeys(PACKED, 10.0),
    gemm_gmac_s={fmt: {2: 10.0, 8: 40.0, 32: 160.0} for fmt in PACKED},
    fixed_us={"qkv": 2.0, "call": 5.0},
    element_ns={"embed": (1.0, 0.5)},
    attend_ns=((1.0, 0.5), (0.2, 0.1)),
)
MACHINE = MachineProfile("cpu", "avx2", "abc", (replace(RATES, threads=1), RATES))


def plan(fmt: Format = "q8") -> Plan:
    formats: dict[str, Format] = {
        name: "f32" if len(shape) == 1 else fmt for name, shape in SPEC.shapes()
    }
    return Plan("test", formats)


def test_parts_come_in_order_and_hold_every_matrix_once() -> None:
    parts = step_parts(SPEC, plan())
    layer = [part for part in PARTS if part not in ("embed", "head", "sampling")]
    expected = ["embed", *layer, *layer, "head", "sampling"]
    assert [part.name for part in parts] == expected
    names = [matrix.name for part in parts for matrix in part.matrices]
    matrices = [name for name, shape in SPEC.shapes() if len(shape) == 2]
    assert sorted(names) == sorted(matrices)  # the tied table as the head


def test_packed_bytes_are_codes_scales_and_mins() -> None:
    assert packed_bytes("q8", 17, 33) == 2 * 2 * (512 + 32)
    assert packed_bytes("q4", 16, 32) == 256 + 32
    assert packed_bytes("q4m", 16, 32) == 256 + 64
    assert packed_bytes("f16", 3, 5) == 30
    assert packed_bytes("f32", 3, 5) == 60


def test_a_window_limits_what_is_seen() -> None:
    part = Part("attention", 0, heads=2, kv_heads=1, head_dim=16, window=10)
    assert part.head_positions(0, 3) == 2 * (1 + 2 + 3)
    assert part.head_positions(8, 4) == 2 * (9 + 10 + 10 + 10)
    assert replace(part, window=0).head_positions(8, 2) == 2 * (9 + 10)
    assert part.macs(1, 6) == 2 * 2 * 16 * 7
    assert part.kv_bytes(2) == 3 * (2 * 16 + 2 * 2)


def test_a_streaming_head_sees_the_first_page_and_the_last_ones() -> None:
    part = Part("attention", 0, heads=6, kv_heads=2, head_dim=16, streams=(3, 1))
    per_head = 2 * 16 + 2 * 2
    assert part.head_positions(255, 1) == 6 * 256
    # Position 1,000 sees page 0 and pages 23 to 31, the last of them as far as itself.
    streamed = 32 + 1001 - 23 * 32
    assert part.head_positions(1000, 1) == 3 * 1001 + 3 * streamed
    assert part.kv_bytes(1000) == per_head * (1001 + streamed)


def test_a_split_head_reads_less_and_exactly_what_it_reports() -> None:
    screen = Screen(32, Cut(8.0, 50), Cut(5.0, 5), {"rows_estimated": 20.0, "blocks_exact": 2.0})
    split = plan().with_screen(screen, SPEC)

    def head(**settings: Any) -> Part:
        return next(part for part in step_parts(SPEC, split, **settings) if part.name == "head")

    first, rest, sure = head().matrices
    assert (first.rows, first.cols, first.format) == (100, 32, "q4")
    assert (rest.rows, sure.rows) == (20, 32)
    assert [m.rows for m in head(screened=(7, 1)).matrices] == [100, 7, 16]
    assert [m.name for m in head(exact_head=True).matrices] == ["embed"]


def test_one_token_takes_bytes_over_gemv() -> None:
    part = Part("qkv", 0, (Matrix("q", "q8", 16, 32), Matrix("k", "q8", 16, 32)))
    assert part_seconds(part, RATES, 1, 0) == pytest.approx(2e-6 + 2 * 544 / 10e9)


def test_what_lies_apart_has_rates_of_its_own() -> None:
    rows = Matrix("screen.rest", "q4", 10, 320, "rows")
    # 160 bytes of codes touch three lines or four, 20 of scales one or two.
    assert rows.lines_bytes == 10 * 5 * 64
    assert part_seconds(Part("head", None, (rows,)), RATES, 1, 0) == pytest.approx(3200 / 3e9)
    blocks = Matrix("embed", "q8", 32, 64, "blocks")
    assert part_seconds(Part("head", None, (blocks,)), RATES, 1, 0) == pytest.approx(
        blocks.nbytes / 4e9
    )


def test_several_tokens_take_products_over_gemm() -> None:
    part = Part("o", 0, (Matrix("o", "q4", 64, 64),))
    products = 64 * 64
    assert part_seconds(part, RATES, 8, 0) == pytest.approx(products * 8 / 40e9)
    # Between sizes on a logarithmic scale; outside of them as at the nearest.
    assert part_seconds(part, RATES, 4, 0) == pytest.approx(products * 4 / 20e9)
    assert part_seconds(part, RATES, 64, 0) == pytest.approx(products * 64 / 160e9)


def test_elements_and_attention_have_rates_of_one_token_and_of_several() -> None:
    embed = Part("embed", elements=100)
    assert part_seconds(embed, RATES, 1, 0) == pytest.approx(100e-9)
    assert part_seconds(embed, RATES, 10, 0) == pytest.approx(500e-9)
    attention = Part("attention", 0, heads=6, kv_heads=3, head_dim=16)
    # Two threads, three KV heads: one of them has two.
    computed = 6 * 100 * (1.0 + 0.5 * 16) * 1e-9
    one = (computed + attention.kv_bytes(99) / 4e9) * 2 / 3
    assert part_seconds(attention, RATES, 1, 99) == pytest.approx(one)
    many = 6 * (100 + 101) * (0.2 + 0.1 * 16) * 1e-9
    assert part_seconds(attention, RATES, 2, 99) == pytest.approx(many)


def test_prediction_adds_the_parts_up() -> None:
    parts = step_parts(SPEC, plan())
    found = predict_latency(SPEC, plan(), MACHINE, depth=30, prompt_tokens=300)
    decode = 5e-6 + sum(part_seconds(part, RATES, 1, 30) for part in parts)
    assert found.decode_seconds == pytest.approx(decode)
    prefill = 0.0
    for first, tokens in ((0, 256), (256, 44)):
        prefill += 5e-6
        for part in parts:
            if part.name not in ("head", "sampling"):
                prefill += part_seconds(part, RATES, tokens, first)
    prefill += sum(part_seconds(p, RATES, 1, 256) for p in parts if p.name == "head")
    assert found.prefill_tokens_s == pytest.approx(300 / prefill)


def test_fewer_bits_are_predicted_faster() -> None:
    q8, q4 = (predict_latency(SPEC, plan(fmt), MACHINE) for fmt in ("q8", "q4"))
    assert q4.decode_seconds < q8.decode_seconds


def test_what_was_not_measured_is_named() -> None:
    without = replace(RATES, gemv_gb_s={"q8": 1.0}, gemm_gmac_s={"q8": {2: 1.0}})
    with pytest.raises(CompressError, match="not measured with q4, the format of layers.0.q"):
        predict_latency(SPEC, plan("q4"), MachineProfile("c", "i", "k", (without,)))
    with pytest.raises(CompressError, match="not measured with 7 threads, only with 1, 2"):
        predict_latency(SPEC, plan(), MACHINE, threads=7)


# The file


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(MACHINE.to_json()))
    assert MachineProfile.read(path) == MACHINE


def spoil(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    at: Any = data
    for key in parents:
        at = at[int(key) if isinstance(at, list) else key]
    at[int(last) if isinstance(at, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("more", 1, "an object of"),
        ("version", 2, "version 2"),
        ("cpu", 3, "text as cpu"),
        ("rates", [], "list of rates"),
        ("rates/0/threads", 0, "threads"),
        ("rates/0/threads", True, "threads"),
        ("rates/0/threads", 2, "once"),
        ("rates/0/extra", 2, "rates of"),
        ("rates/0/read_gb_s", 0, "above 0 as read_gb_s"),
        ("rates/0/read_gb_s", "fast", "number as read_gb_s"),
        ("rates/0/dot_gmac_s", -1, "dot_gmac_s"),
        ("rates/0/gather_gb_s", None, "number as gather_gb_s"),
        ("rates/0/kv_gb_s", 0, "above 0 as kv_gb_s"),
        ("rates/0/gemv_gb_s", {}, "same formats"),
        ("rates/0/gemv_gb_s/q8", float("nan"), "gemv_gb_s of q8"),
        ("rates/0/gemm_gmac_s/q8", {}, "gemm_gmac_s of q8"),
        ("rates/0/gemm_gmac_s/q8", {"one": 1.0}, "numbers of tokens"),
        ("rates/0/fixed_us", [1], "object as fixed_us"),
        ("rates/0/fixed_us/qkv", -1, "fixed_us of qkv"),
        ("rates/0/element_ns/embed", [1.0], "two numbers"),
        ("rates/0/attend_ns", [[1, 1]], "two pairs"),
        ("rates/0/attend_ns/1", [1, None], "attend_ns"),
    ],
)
def test_a_bad_profile_is_refused(path: str, value: object, message: str) -> None:
    data = copy.deepcopy(MACHINE.to_json())
    spoil(data, path, value)
    with pytest.raises(CompressError, match=message):
        MachineProfile.from_json(data)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    with pytest.raises(CompressError, match=r"No such file.*profile --machine -o"):
        MachineProfile.read(path)
    path.write_text("{")
    with pytest.raises(CompressError, match=r"machine\.json: is no JSON"):
        MachineProfile.read(path)
    path.write_text("[]")
    with pytest.raises(CompressError, match=r"machine\.json: a machine profile has"):
        MachineProfile.read(path)
