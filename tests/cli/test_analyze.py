"""`flashlite analyze` on a tiny model that writes its own calibration."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flashlite.analyze import pipeline, sensitivity
from flashlite.analyze.analysis import read_analysis
from flashlite.cli import analyzing, main
from flashlite.compress.plan import PACKED


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "FLASHLITE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyzing, "_LENGTH", 128)
    monkeypatch.setattr(analyzing, "_HELD_BACK", 256)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("The ferry leaves at nine and comes back at noon. " * 150, encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main.main(["analyze", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_a_model_is_analyzed_into_the_working_folder(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    found = run(capsys, "--model", str(tiny_gguf), "--tokens", "600", "--report", "a.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "sensitive_layers.json"]
    analysis = read_analysis(Path("sensitive_layers.json"))
    assert found["gradients"] is True
    assert found["units"] == len(analysis.units)
    assert analysis.model.path == str(tiny_gguf.resolve())
    assert analysis.model.digest == found["digest"]
    assert analysis.calibration.source == "model"
    assert set(analysis.units[0].formats) == set(PACKED)
    assert found["peak_memory_bytes"] > 0
    assert main.main(["analyze", str(tiny_gguf), "--tokens", "600", "-o", "again.json"]) == 0
    assert "Spearman" in capsys.readouterr().out
    assert Path("again.json").read_bytes() == Path("sensitive_layers.json").read_bytes()


def test_without_torch_it_goes_on_and_says_so(
    tiny_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "a.json"
    words = [str(tiny_gguf), "-o", str(path), "--calibration", str(text)]
    assert main.main(["analyze", *words, "--tokens", "600"]) == 0
    assert "torch is not installed" in capsys.readouterr().err
    analysis = read_analysis(path)
    assert analysis.proxy is not None
    assert analysis.proxy.gradients is False
    assert analysis.calibration.source == "notes.txt"


def test_only_the_formats_asked_for(
    tiny_gguf: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    run(
        capsys, str(tiny_gguf), "-o", str(path), "--calibration", str(text), "--tokens", "600",
        "--formats", "q8,q4", "--exact", "q8", "--no-gradients",
    )  # fmt: skip
    unit = read_analysis(path).units[-1]
    assert list(unit.formats) == ["q8", "q4"]
    assert unit.formats["q8"].exact_kl is not None
    assert unit.formats["q4"].exact_kl is None


def test_an_interrupted_run_leaves_no_result_and_goes_on(
    tiny_gguf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [str(tiny_gguf), "--calibration", str(text), "--tokens", "600", "--no-gradients"]
    real, calls = sensitivity.measure_unit, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(pipeline, "measure_unit", interrupted)
    path = tmp_path / "a.json"
    assert main.main(["analyze", *words, "-o", str(path)]) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["a.json.partial"]
    run(capsys, *words, "-o", str(path))
    units = len(read_analysis(path).units)
    assert calls == units + 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    run(capsys, *words, "-o", str(tmp_path / "b.json"), "--fresh")
    assert (tmp_path / "b.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one model"),
        (["a", "--model", "b"], "name one model"),
        (["{model}", "--formats", "q8,q77"], "'q77', known are q8"),
        (["{model}", "--formats", "q8", "--exact", "q4"], "--exact names 'q4', known are q8"),
        (["{model}", "--formats", ","], "--formats is empty"),
        (["{model}", "--max-mem", "10MB"], "--max-mem is 10MB, an analysis needs"),
        (["{model}", "-o", "nowhere/a.json"], "there is no folder"),
        (["{model}", "--tokens", "1"], "--tokens"),
        (["{model}", "--seed", "-1"], "--seed"),
        (["{model}", "--calibration", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_words_are_one_line(
    tiny_gguf: Path, words: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main.main(["analyze", *[word.format(model=tiny_gguf) for word in words]]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
