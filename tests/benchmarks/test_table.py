"""Results kept and shown in one table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import table

SCRIPT = """
import json, sys
print("a table for people")
print(json.dumps({{"benchmark": "{name}", "words": sys.argv[1:]}}))
sys.exit({code})
"""


def document(name: str, *rows: dict[str, Any], commit: str = "abc") -> dict[str, Any]:
    machine = {"cpu": "Abacus", "threads": 2, "isa": "avx2"}
    return {
        "benchmark": name, "commit": commit, "machine": machine, "rounds": 5, "rows": list(rows)
    }  # fmt: skip


def row(measure: str, ratio: float, limit: float | None) -> dict[str, Any]:
    gate = None if limit is None else {"limit": limit, "less": False, "aim": None}
    return {
        "measure": measure, "unit": "tok/s", "ours": 10.0, "peers": {"llama.cpp": 10.0 / ratio},
        "against": "llama.cpp", "ratio": ratio, "gate": gate, "held": None,
    }  # fmt: skip


def write(folder: Path, name: str, code: int = 0, said: str | None = None) -> None:
    (folder / f"{name}.py").write_text(SCRIPT.format(name=said or name, code=code))


def test_the_last_line_of_a_script_is_kept(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write(tmp_path, "speed")
    assert table.run("speed", ["--rounds", "3"], results, tmp_path)
    assert json.loads((results / "speed.json").read_text()) == {
        "benchmark": "speed",
        "words": ["--rounds", "3"],
    }
    assert [path.name for path in results.iterdir()] == ["speed.json"]


@pytest.mark.parametrize("how", ["fails", "another", "silent", "absent"])
def test_a_script_that_fails_leaves_the_old_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    (tmp_path / "results").mkdir()
    kept = tmp_path / "results/speed.json"
    kept.write_text("old")
    if how == "fails":
        write(tmp_path, "speed", code=3)
    elif how == "another":
        write(tmp_path, "speed", said="memory")
    elif how == "silent":
        (tmp_path / "speed.py").write_text("print('nothing to say')")
    assert not table.run("speed", [], tmp_path / "results", tmp_path)
    assert kept.read_text() == "old"
    assert "speed: failed" in capsys.readouterr().err


def test_one_table_of_several_results() -> None:
    text, held = table.render(
        [document("speed", row("decoding", 3, 2), row("prefill", 1, 2)),
         document("depth", row("long", 1, None))]
    )  # fmt: skip
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["measure", "decoding", "prefill", "long"]
    assert lines[5:] == ["1 of 2 gates held", "Abacus, 2 threads, avx2, commit abc, 5 rounds"]
    assert not held
    text, held = table.render(
        [document("speed", row("decoding", 3, 2)), document("depth", commit="def")]
    )
    assert held
    assert text.splitlines()[-2:] == [
        "speed: Abacus, 2 threads, avx2, commit abc, 5 rounds",
        "depth: Abacus, 2 threads, avx2, commit def, 5 rounds",
    ]


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["table.py", *words])
    try:
        table.main()
    except SystemExit as end:
        return end.code
    return 0


def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--results", str(tmp_path)]
    assert "nothing was measured" in str(ended(monkeypatch, *where))
    (tmp_path / "speed.json").write_text(json.dumps(document("speed", row("decoding", 1, 2))))
    assert ended(monkeypatch, *where) == 0
    shown = capsys.readouterr()
    assert "0 of 1 gates held" in shown.out
    assert "memory: not measured yet" in shown.err
    assert ended(monkeypatch, *where, "--strict") == 1
    assert ended(monkeypatch, *where, "speeed") == 2
    assert "known are speed" in capsys.readouterr().err
    (tmp_path / "speed.json").write_text(json.dumps(document("speed", row("decoding", 2, 2))))
    assert ended(monkeypatch, *where, "--strict") == 0


def test_a_failed_run_is_told_by_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def run(name: str, words: list[str], results: Path) -> bool:
        asked.append((name, words))
        return name != "kernels"

    monkeypatch.setattr(table, "run", run)
    (tmp_path / "speed.json").write_text(json.dumps(document("speed")))
    words = ["--results", str(tmp_path), "--run", "--rounds", "7"]
    assert ended(monkeypatch, *words, "speed") == 0
    assert asked == [("speed", ["--rounds", "7"])]
    assert ended(monkeypatch, *words, "speed", "kernels") == 1
    assert asked[-1][1][-2:] == ["--rounds", "7"]


def test_every_benchmark_is_a_script_that_explains_itself() -> None:
    for name in table.BENCHMARKS:
        text = Path(table.__file__).with_name(f"{name}.py").read_text()
        assert text.startswith('"""')
        assert f"python benchmarks/{name}.py" in text
        assert f'common.finish(\n        "{name}"' in text or f'common.finish("{name}"' in text
