"""Rows, gates and the JSON that benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

import common
from common import Gate, Row
from flashlite.evaluate.speed import Figures


def options(**more: object) -> argparse.Namespace:
    return argparse.Namespace(**{"rounds": 5, "threads": 2} | more)


ROWS = [
    common.speed_row("decoding", "tok/s", 300.0, {"llama.cpp": 100.0}, "llama.cpp", Gate(2.2)),
    common.speed_row("prefill", "tok/s", 1234.5678901, {"openvino": 1000.0}, "openvino", Gate(1.4)),
    Row("cold", "s", 0.31, {"llama.cpp": 0.5}, gate=Gate(0.35, less=True, aim=0.25)),
    Row("reopen", "ms", 61.0, gate=Gate(60, less=True)),
    Row("free", "tok/s", 5.0, {"without": 2.5}, "without", 2.0),
]


def test_a_ratio_is_judged_where_there_is_one_and_the_figure_where_there_is_none() -> None:
    assert [row.judged for row in ROWS] == pytest.approx([3.0, 1.23457, 0.31, 61.0, 2.0], rel=1e-4)
    assert [row.held for row in ROWS] == [True, False, True, False, None]


def test_gates_hold_at_their_limit_and_in_their_direction() -> None:
    assert Gate(2.0).held(2.0)
    assert not Gate(2.0).held(1.999)
    assert Gate(2.0).held(1e9)
    assert Gate(2.0, less=True).held(2.0)
    assert not Gate(2.0, less=True).held(2.001)
    assert Gate(2.0, less=True).held(0.0)


def test_without_the_peer_there_is_nothing_to_judge() -> None:
    row = common.speed_row("decoding", "tok/s", 300.0, {"openvino": 9.0}, "llama.cpp", Gate(2.2))
    assert (row.ratio, row.gate, row.held) == (None, None, None)


def test_json_holds_what_was_measured_where_and_on_what(
    capsys: pytest.CaptureFixture[str],
) -> None:
    common.finish("speed", options(), ROWS, samples={"x": [1.0, 2.0]})
    printed = capsys.readouterr().out.splitlines()
    data = json.loads(printed[-1])
    assert data["benchmark"] == "speed"
    assert data["rounds"] == 5
    assert data["machine"]["threads"] == 2
    assert data["machine"]["cpu"]
    assert "commit" in data
    assert data["samples"] == {"x": [1.0, 2.0]}
    assert [row["held"] for row in data["rows"]] == [True, False, True, False, None]
    read = [common.row_from_json(row) for row in data["rows"]]
    assert read[0] == ROWS[0]
    assert read[1].ours == 1234.57
    assert [row.gate for row in read] == [row.gate for row in ROWS]
    assert printed[0].split() == (
        "measure unit flashlite llama.cpp openvino beside ratio gate aim held".split()
    )


def test_the_table_says_ratio_gate_and_verdict() -> None:
    lines = common.format_rows(ROWS).splitlines()
    assert lines[1].split() == "decoding tok/s 300 100 3.00x llama.cpp >= 2.2x yes".split()
    assert lines[2].split() == "prefill tok/s 1,235 1,000 1.23x openvino >= 1.4x NO".split()
    assert lines[3].split() == "cold s 0.310 0.500 <= 0.35 s <= 0.25 s yes".split()
    assert lines[4].split() == "reopen ms 61.0 <= 60 ms NO".split()
    assert lines[5].split() == "free tok/s 5.00 2.50 2.00x without".split()
    end = lines[0].index("llama.cpp") + len("llama.cpp")
    assert lines[1][:end].endswith("      100")  # figures stand below each other


def test_medians_are_split_into_ours_and_theirs() -> None:
    figures = {
        "flashlite": Figures(0.1, 1, {"pp512": [1.0, 9.0, 2.0]}),
        "llama.cpp": Figures(0.1, 1, {"pp512": [4.0]}),
    }
    assert common.rows_of(figures, "pp512") == (2.0, {"llama.cpp": 4.0})


def test_options_are_read_and_wrong_ones_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(*words: str) -> argparse.Namespace:
        monkeypatch.setattr("sys.argv", ["speed.py", *words])
        return common.arguments(common.make_parser("What is asked.", peers="llama.cpp"))

    monkeypatch.setenv("FLASHLITE_ISA", "avx2")
    found = parse()
    assert (found.rounds, found.threads, found.peers) == (5, 2, "llama.cpp")
    assert os.environ["FLASHLITE_ISA"] == "avx2"  # left as it was
    found = parse("--rounds", "1", "--threads", "4", "--peers", "", "--isa", "plain")
    assert (found.rounds, found.threads, found.peers) == (1, 4, "")
    assert os.environ["FLASHLITE_ISA"] == "plain"
    for words in (("--rounds", "0"), ("--rounds", "many"), ("--isa", "fp32"), ("--threads", "-1")):
        with pytest.raises(SystemExit) as ended:
            parse(*words)
        assert ended.value.code == 2
        assert words[0] in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    assert "What is asked." in capsys.readouterr().out


def test_saved_prefixes_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLITE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    with common.own_prefixes() as prefixes:
        assert not prefixes.exists()
        assert Path(os.environ["FLASHLITE_CACHE"]) == prefixes.parent
        assert (prefixes.parent / "builds").resolve() == (tmp_path / "cache/builds").resolve()
    assert os.environ["FLASHLITE_CACHE"] == str(tmp_path / "cache")
    assert not prefixes.parent.exists()
    assert (tmp_path / "cache/builds").is_dir()
