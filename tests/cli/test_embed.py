"""`flashlite embed`: vectors on stdout, everything else beside them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from flashlite.cli.main import main

BERT = str(Path(__file__).parents[1] / "fixtures/encoders/bert")
WORDS = ["embed", BERT, "--isa", "plain", "--threads", "1"]


def test_one_line_per_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts"
    file.write_text("the cat\n\na man\n", encoding="utf-8")
    assert main([*WORDS, "-p", "a man", "--file", str(file)]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [len(row) for row in rows] == [64] * 4
    assert rows[0] == rows[3] != rows[1]
    assert sum(value * value for value in rows[0]) == pytest.approx(1, abs=1e-6)


def test_json_holds_figures_and_vectors(capfd: pytest.CaptureFixture[str]) -> None:
    long = "the cat " * 100
    assert main([*WORDS, "-p", "a", "-p", long, "--truncate", "--json"]) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert (found["dimension"], found["tokens"], found["truncated"]) == (64, 3 + 64, [1])
    assert len(found["vectors"]) == 2
    assert "1 of 2 texts were cut" in captured.err


def test_texts_from_stdin(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\r\na man\r\n")))
    assert main([*WORDS, "--file", "-"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "there is no text; give -p TEXT or --file FILE"),
        (["-p", "the cat " * 100], 1, "FL-405: attention buffer overflow: 202 tokens"),
        (["--file", "/nowhere/texts"], 1, "/nowhere/texts"),
        (["-p", "a", "--max-mem", "1MB"], 1, "raise"),
    ],
)
def test_failures_are_one_line(
    words: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *words]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_file_that_is_not_utf8_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").write_bytes(b"caf\xe9\n")
    assert main([*WORDS, "--file", str(tmp_path / "texts")]) == 2
    assert "is not UTF-8 at byte 3" in capfd.readouterr().err


def test_inspect_says_that_it_is_an_encoder(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", BERT, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["architecture"], found["pooling"]) == ("bert (encoder)", "mean")


def test_quantize_has_nothing_to_say_of_a_split_head(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", BERT, "-o", str(tmp_path / "bert.fl")]) == 0
    assert "split head" not in capfd.readouterr().out
    assert main(["run", str(tmp_path / "bert.fl"), "-p", "a"]) == 1
    assert "bert is an encoder" in capfd.readouterr().err
