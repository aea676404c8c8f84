"""`flashlite validate` from words to files, on a tiny model of random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_gguf
import pytest

from flashlite.artifact.format import Artifact
from flashlite.checkpoint.pull import pull
from flashlite.cli.main import main
from flashlite.codegen.target import Target, host_target
from flashlite.runtime import prepare

Call = Callable[..., tuple[int, dict[str, Any], str]]

_TEXT = "The ferry leaves at nine and comes back at noon, when the wind has gone to sleep. "


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of one's own: two languages, questions, prompts, and a set that is not there."""
    folder = tmp_path_factory.mktemp("suite")
    rows: dict[str, list[dict[str, object]]] = {
        "passages": [{"language": x, "text": f"{x}: {_TEXT * 3}"} for x in ("de", "en", "es")],
        "questions": [
            {"language": "en", "prompt": f"{i}. {_TEXT}The boat is", "options": [" far", " near"],
             "answer": i % 2}
            for i in range(6)
        ],
        "prompts": [{"language": "en", "text": "Say it in JSON.", "kind": "json"}],
    }  # fmt: skip
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    kinds = {"passages": "text", "questions": "choice", "prompts": "generate"}
    items = {"quick": 2, "standard": None, "full": None}
    tasks = [
        {"name": n, "kind": k, "loader": f"core-{n}", "items": items} for n, k in kinds.items()
    ]
    tasks.append({"name": "wiki", "kind": "text", "loader": "wikitext-2", "items": items})
    path = folder / "mine.json"
    path.write_text(json.dumps({"name": "mine", "tasks": tasks}), encoding="utf-8")
    return path


@pytest.fixture
def call(
    suite: Path,
    tmp_path: Path,
    own_prefixes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """Run it on an artifact: exit code, its JSON, its stderr."""
    monkeypatch.delenv("FLASHLITE_DATA", raising=False)

    def run(*words: object, json_too: bool = True) -> tuple[int, dict[str, Any], str]:
        given = ["validate", *map(str, words), "--dataset", str(suite), "--threads", "1"]
        code = main([*given, "--json"] if json_too else given)
        shown = capsys.readouterr()
        lines = shown.out.strip().splitlines()
        return code, json.loads(lines[-1]) if json_too and lines else {}, shown.out + shown.err

    return run


def make(source: Path, preset: str, folder: Path) -> Path:
    prepare.make_artifact(pull(str(source)), preset, folder, head="off")
    return folder


def test_the_same_model_loses_nothing_and_keeps_every_limit(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_gguf, "HIDDEN", 192)  # so that every matrix fits blocks of 32
    model = make_gguf.tiny_model(dtypes={"ffn_down": "Q8_0"})
    source = make_gguf.write_gguf(tmp_path / "exact.gguf", *model)
    artifact = make(source, "import", tmp_path / "same.fl")
    compiled = prepare.compile_artifact

    def in_fp32(artifact: Artifact, target: Target | None = None) -> Path:
        return compiled(artifact, host_target("fp32"))

    monkeypatch.setattr(prepare, "compile_artifact", in_fp32)
    limits = ["--max-kl", "1e-6", "--min-top1", "0.999", "--max-flips", "0", "--max-ppl-ratio",
              "1.001", "--max-accuracy-drop", "0"]  # fmt: skip
    code, found, said = call(artifact, "--source", source, *limits)
    assert code == 0, said
    assert found["held"] is True
    assert abs(found["kl"]) < 1e-6
    assert found["flips"] == found["accuracy_drop"] == 0
    assert found["top1"] > 0.999
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-3)
    assert found["absent"] == ["wikitext-2"]
    assert "FLASHLITE_DATA has it not: wikitext-2" in said
    assert found["questions"]["questions"] == 6
    assert set(found["languages"]) == {"de", "en", "es"}
    assert len(found["verdicts"]) == 5


def test_four_bits_lose_something_and_a_missed_limit_is_exit_code_1(
    tiny_gguf: Path, tmp_path: Path, call: Call
) -> None:
    artifact = make(tiny_gguf, "q4", tmp_path / "q4.fl")
    page = tmp_path / "page.html"
    words = [artifact, "--source", tiny_gguf, "--max-kl", "1e-5", "--max-ppl-ratio", "100"]
    code, found, said = call(*words, "--report", page)
    assert code == 1
    assert "1 of 2 limits not kept: kl" in said
    assert "at most 1e-05" in said
    assert found["held"] is False
    assert found["kl"] > 1e-4
    assert found["total"]["kl"]["low"] <= found["kl"] <= found["total"]["kl"]["high"]
    assert sum(found["kl_decades"]) == pytest.approx(1, abs=1e-5)
    assert found["generations"]["prompts"][0]["json_valid"] in (0.0, 1.0)
    assert math.isfinite(found["perplexity_ratio"])
    card = json.loads((artifact / "card.json").read_text())
    assert card["measured"]["validation"]["kl"] == found["kl"]
    text = page.read_text(encoding="utf-8")
    assert "<li class=missed>kl" in text
    assert "wikitext-2" in text
    assert "http" not in text
    # Again: the source's part comes from the cache, and every figure is the same.
    kept = list(Path(own_cache(), "teachers").iterdir())
    assert len(kept) == 1
    code, again, said = call(*words[:3], "--quick", "--report", page, json_too=False)
    assert code == 0, said
    assert "of the source" in said  # the tables
    code, again, _ = call(*words, "--report", page)
    assert {k: again[k] for k in ("kl", "top1", "flips", "texts", "choices")} == {
        k: found[k] for k in ("kl", "top1", "flips", "texts", "choices")
    }


def own_cache() -> Path:
    from flashlite import paths

    return paths.cache_dir()


def test_another_model_as_source_is_refused(
    tiny_gguf: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make(tiny_gguf, "q4", tmp_path / "q4.fl")
    monkeypatch.setattr(make_gguf, "LAYERS", make_gguf.LAYERS + 1)
    other = make_gguf.write_gguf(tmp_path / "other.gguf", *make_gguf.tiny_model())
    code, _, said = call(artifact, "--source", other)
    assert code == 2
    assert "it is another model" in said
    assert not (tmp_path / "q4.html").exists()
