"""`flashlite finetune` and `flashlite delta`, from words to files, on stories260K in 4 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashlite.analyze.analysis import (
    AnalysedModel,
    Analysis,
    Calibration,
    Unit,
    UnitFormat,
    write_analysis,
)
from flashlite.analyze.digest import source_digest
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import open_artifact
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.cli.main import main
from flashlite.model.differentiable import Differentiable, as_tensors
from flashlite.model.families import describe
from flashlite.runtime import prepare

torch = pytest.importorskip("torch")

Call = Callable[..., tuple[int, dict[str, Any], str]]
QUICK = ["--steps", "30", "--rate", "1e-3", "--threads", "1"]


@pytest.fixture(scope="module")
def config(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `sensitive_layers.json` with texts that the model wrote."""
    source = describe(open_checkpoint(stories260k))
    forward = Differentiable(source.spec, as_tensors(source.tensor))
    generator = torch.Generator().manual_seed(0)
    ids = torch.ones((60, 1), dtype=torch.int64)
    with torch.no_grad():
        for _ in range(63):
            chances = torch.softmax(forward.logits(ids)[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    analysis = Analysis(
        AnalysedModel("stories", str(stories260k), source_digest(source), "llama", 260_032),
        Calibration("model", 0, ("en",), tuple(tuple(row) for row in ids.tolist())),
        (Unit("embed", None, ("embed",), 32_768, {"q8": UnitFormat(34_816, 0.0, None, 0.0)}),),
    )
    path = tmp_path_factory.mktemp("texts") / "sensitive_layers.json"
    write_analysis(analysis, path)
    return path


@pytest.fixture
def stories(stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHLITE_CACHE", str(tmp_path / "cache"))
    return prepare.make_artifact(pull(str(stories260k)), "q4", tmp_path / "stories.fl", head="off")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run one command line: exit code, its JSON, its stderr."""

    def run(*words: object) -> tuple[int, dict[str, Any], str]:
        code = main([*map(str, words), "--json"])
        shown = capsys.readouterr()
        lines = shown.out.strip().splitlines()
        return code, json.loads(lines[-1]) if lines else {}, shown.err

    return run


def files(artifact: Artifact) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(artifact.path.rglob("*")) if p.is_file()}


def test_heal_apply_list_and_roll_back(
    stories: Artifact, stories260k: Path, config: Path, call: Call, tmp_path: Path
) -> None:
    start = files(stories)
    words = ("finetune", stories.path, "--source", stories260k, "--config", config, *QUICK)
    code, told, _ = call(*words, "-o", "x.delta")
    assert code == 0
    before, after = told["before"]["held-out"], told["after"]["held-out"]
    assert after["kl"] < 0.75 * before["kl"]
    assert files(stories) == start
    assert (tmp_path / "x.delta").stat().st_size == told["bytes"]
    assert told["share"] == pytest.approx(told["bytes"] / stories.weights_size, abs=1e-4)
    assert not [p for p in (tmp_path / "cache/finetune").iterdir() if p.is_dir()]

    code, _, error = call(*words, "-o", "x.delta")
    assert code == 2
    assert "x.delta is there already" in error

    code, applied, _ = call("delta", "apply", stories.path, "x.delta")
    assert (code, applied["applied"]) == (0, 1)
    code, listed, _ = call("delta", "list", stories.path)
    (delta,) = listed["deltas"]
    assert delta["layers"] == 3
    assert delta["bytes"] == told["bytes"]
    assert delta["made"]["quality"]["held-out"][1]["kl"] == after["kl"]

    # What was promised is what the changed artifact has before it is tuned again.
    code, again, _ = call(
        "finetune", stories.path, "--source", stories260k, "--config", config, "--steps", "1",
        "--rate", "1e-9", "--threads", "1", "-o", "y.delta",
    )  # fmt: skip
    assert again["before"]["held-out"]["kl"] == pytest.approx(after["kl"], rel=1e-4)

    code, back, _ = call("delta", "rollback", stories.path)
    assert (code, back["applied"], back["digest"]) == (0, 0, stories.digest)
    assert files(stories) == start
    code, _, error = call("delta", "rollback", stories.path)
    assert (code, "it has 0" in error) == (2, True)


def test_what_gets_no_better_is_not_written(
    stories: Artifact, stories260k: Path, config: Path, call: Call, tmp_path: Path
) -> None:
    words = (
        "finetune", stories.path, "--source", stories260k, "--config", config, "--steps", "2",
        "--rate", "1", "--threads", "1", "-o", "bad.delta",
    )  # fmt: skip
    code, told, error = call(*words)
    assert code == 1
    assert told["delta"] is None
    assert "what was held back got no better; no delta was written" in error
    assert not (tmp_path / "bad.delta").exists()
    code, told, error = call(*words, "--force")
    assert (code, told["delta"]) == (0, "bad.delta")
    assert "because of --force" in error
    assert open_artifact(stories.path).digest == stories.digest


def chats(path: Path, n: int, seed: int) -> Path:
    """Who went where: the answer is the place, one of four."""
    rng = np.random.default_rng(seed)
    places = {"Tom": "park", "Lily": "shop", "Ben": "house", "Mia": "beach"}
    with path.open("w") as file:
        for _ in range(n):
            name = str(rng.choice(list(places)))
            age = int(rng.integers(3, 9))
            messages = [
                {"role": "user", "content": f"{name} is {age} and goes where?"},
                {"role": "assistant", "content": places[name]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def test_a_domain_is_learned_from_chats(
    stories: Artifact, stories260k: Path, config: Path, call: Call, tmp_path: Path
) -> None:
    data, held = chats(tmp_path / "who.jsonl", 100, 0), chats(tmp_path / "held.jsonl", 40, 1)
    code, told, _ = call(
        "finetune", stories.path, "--source", stories260k, "--config", config, "--data", data,
        "--eval", held, "--force", "--steps", "50", "--rate", "2e-3", "--threads", "1",
    )  # fmt: skip
    assert code == 0
    assert told["delta"] == "stories260k-who.delta"
    before, after = told["domain"]["before"], told["domain"]["after"]
    assert after["chats"] == 40
    assert after["accuracy"] >= before["accuracy"] + 0.2
    assert after["loss"] < before["loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heal", "--data", "x.jsonl"], "choose one"),
        (["--layers", "9"], "9 layers to tune, the model has 1 to 5"),
        (["--steps", "0"], "steps is 0, allowed 1 to"),
        (["--tokens", "0"], "--tokens is 0, allowed"),
        (["--threads", "0"], "--threads is 0, allowed"),
        (["--eval", "x.jsonl"], "--eval goes with --data"),
        (["--data", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--data", "empty.jsonl"], "empty.jsonl: holds no chat"),
        (["--data", "odd.jsonl"], "odd.jsonl, line 2: not JSON"),
        (["--data", "user.jsonl"], "user.jsonl, line 1: the chat must end with an assistant's"),
        (["--config", "odd.jsonl"], "odd.jsonl"),
        (["--source", "none.gguf"], "none.gguf"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], message: str, stories: Artifact, stories260k: Path, config: Path,
    call: Call, tmp_path: Path,
) -> None:  # fmt: skip
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "odd.jsonl").write_text(json.dumps(good) + "\n{")
    (tmp_path / "user.jsonl").write_text(json.dumps({"messages": good["messages"][:1]}))
    settled = [] if "--config" in words else ["--config", config]
    settled += [] if "--source" in words else ["--source", stories260k]
    code, _, error = call("finetune", stories.path, *settled, *words)
    assert code in (1, 2)
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.glob("*.delta"))


def test_an_artifact_of_unknown_source_asks_for_it(stories: Artifact, call: Call) -> None:
    code, _, error = call("finetune", stories.path)
    assert (code, "--source" in error) == (2, True)


def test_texts_of_another_model_are_refused(
    stories: Artifact, stories260k: Path, config: Path, call: Call, tmp_path: Path
) -> None:
    other = json.loads(config.read_text())
    other["model"]["digest"] = "blake3:" + "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(other))
    code, _, error = call(
        "finetune", stories.path, "--source", stories260k, "--config", tmp_path / "other.json"
    )
    assert (code, "is about another model" in error) == (2, True)


def test_another_source_is_refused(stories: Artifact, tiny_gguf: Path, call: Call) -> None:
    code, _, error = call("finetune", stories.path, "--source", tiny_gguf)
    assert (code, "was made from" in error) == (2, True)
