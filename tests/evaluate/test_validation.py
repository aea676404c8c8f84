"""Validation: two models on the same tokens, choices, generation, suites, the card, exit codes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small import Small, quantize_small

from flashlite.artifact.read import open_artifact
from flashlite.artifact.write import record
from flashlite.cli import validate as verb
from flashlite.cli.main import main
from flashlite.errors import ArtifactError, EvaluateError, UsageError
from flashlite.evaluate.items import Passage, Prompt, Question
from flashlite.evaluate.loaders import LOADERS
from flashlite.evaluate.scoring import Excerpt, Scored, compare
from flashlite.evaluate.statistics import Mean, bootstrap
from flashlite.evaluate.suites import draw_items, find_suite
from flashlite.evaluate.validation import (
    Answered,
    ChoiceResult,
    TextResult,
    Validation,
    _choice_results,
    _is_json,
    _loops,
)
from flashlite.evaluate.validation_report import render_validation
from flashlite.model.metrics import kl_divergence, perplexity
from flashlite.model.reference import Reference

HERE = Path(__file__).parent.parent
TINY = HERE / "fixtures/artifacts/v1/tiny.fl"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("validation") / "small.fl"
    return quantize_small(HERE / "fixtures/families/llama", "q4", folder)


def test_an_engine_in_fp32_equals_its_own_weights(small: Small) -> None:
    """The walk over layers, the cut into rows and the losses, against the plain oracle."""
    reference = small.reference()
    excerpts = [Excerpt(small.ids(60)), Excerpt(small.ids(33, seed=1), first=20)]
    with small.open("fp32") as engine:
        scored = compare(reference.spec, reference._weight, engine, excerpts)
    for excerpt, found in zip(excerpts, scored, strict=True):
        logits = reference.logits(excerpt.ids)[excerpt.first - 1 : -1]
        assert len(found.kl) == len(excerpt.ids) - excerpt.first
        assert found.kl.max() < 1e-5
        assert found.same_top.all()
        expected = perplexity(logits, excerpt.ids[excerpt.first :])
        assert math.exp(found.source_loss.mean()) == pytest.approx(expected, rel=1e-5)
        assert found.model_loss == pytest.approx(found.source_loss, abs=1e-3)


def test_another_model_is_as_far_as_the_metric_says(small: Small) -> None:
    reference = small.reference()

    def noisy(name: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = reference._weight(name)
        rng = np.random.default_rng(len(name))
        return values + rng.normal(0, 0.05, values.shape).astype(np.float32)

    ids = small.ids(40)
    other = Reference(reference.spec, noisy)
    with small.open("fp32") as engine:
        (found,) = compare(reference.spec, noisy, engine, [Excerpt(ids)])
    expected = kl_divergence(other.logits(ids), reference.logits(ids))[:-1]
    assert expected.mean() > 1e-3
    np.testing.assert_allclose(found.kl, expected, rtol=1e-2, atol=1e-5)


def test_the_bootstrap_keeps_to_its_formula() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, 64 * 100)
    mean = bootstrap([values])
    assert mean.value == pytest.approx(values.mean())
    error = values.reshape(-1, 64).mean(axis=1).std() / 10  # of the mean of 100 chunks
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert bootstrap([values]) == mean
    assert bootstrap([np.full(10, 3.0)]) == Mean(3, 3, 3)


def test_choices_count_right_answers_and_changed_ones() -> None:
    def losses(*values: float) -> tuple[Scored, ...]:
        nothing = np.zeros(1, np.float32)
        one = [np.array([v], np.float32) for v in values]
        return tuple(
            Scored(nothing, nothing > 1, a, b) for a, b in zip(one[::2], one[1::2], strict=True)
        )

    question = Question("en", "x", (" aa", " bb"), 0)
    long = Question("en", "x", (" aaaaaaaaaaaaaaaa", " bb"), 0)
    # (source, model) of each option: right and right, right and wrong, by length right and right
    scored = [*losses(1, 1, 2, 2), *losses(1, 3, 2, 2), *losses(4, 4, 2, 2)]
    options = [("t", question, [0, 1]), ("t", question, [2, 3]), ("t", long, [4, 5])]
    result = _choice_results(options, scored)["t"]
    assert result.questions == 3
    assert result.source_accuracy.value == 1
    assert result.model_accuracy.value == pytest.approx(2 / 3)
    assert result.flips.value == pytest.approx(1 / 3)
    assert result.chance == 0.5


def test_loops_and_json_are_recognized() -> None:
    assert _loops([1, 2] * 16)
    assert not _loops(list(range(64)))
    assert not _loops([*range(8)] * 3)
    assert _is_json('```json\n{"a": [1, 2]}\n```')
    assert not _is_json("The answer is 4.")


def test_the_built_in_suite_is_whole() -> None:
    suite = find_suite("benchmark_v3.1")
    size = sum(file.stat().st_size for file in suite.folder.iterdir())
    assert size < 1 << 20
    by_kind = {kind: LOADERS[f"core-{kind}"](suite.folder) for kind in ("passages", "questions")}
    languages = {"ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh"}
    for items in by_kind.values():
        counts = {language: sum(i.language == language for i in items) for language in languages}
        assert {item.language for item in items} == languages
        assert len(set(counts.values())) == 1  # the same in every language
    for question in by_kind["questions"]:
        assert isinstance(question, Question)
        assert len(set(question.options)) == len(question.options) == 3
        assert question.answer in range(3)
    answers = [q.answer for q in by_kind["questions"] if isinstance(q, Question)]
    assert min(answers.count(i) for i in range(3)) > len(answers) / 5


def test_without_data_the_absent_sets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHLITE_DATA", raising=False)
    drawn, absent = draw_items(find_suite("benchmark_v3.1"), "quick", 0)
    assert {"wikitext-2", "xquad_dev", "glue/RTE"} <= set(absent)
    assert {one.task.name for one in drawn} == {"passages", "common sense", "prompts"}
    texts = next(one.items for one in drawn if one.task.kind == "text")
    assert len({item.language for item in texts}) == len(texts) == 12


def test_every_public_set_gives_items(flashlite_data: Path) -> None:
    suite = find_suite("benchmark_v3.1")
    for task in suite.tasks:
        if not task.loader.startswith("core-"):
            items = LOADERS[task.loader](flashlite_data / task.loader)
            kinds = {"text": Passage, "choice": Question, "generate": Prompt}
            assert len(items) > 50, task.loader
            assert all(isinstance(item, kinds[task.kind]) for item in items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "essay"}, r"kind 'essay', known: text, choice"),
        ({"loader": "nothing"}, r"wants loader 'nothing', known: core-passages"),
        ({"items": {"quick": 1}}, r"needs items for quick, standard, full"),
        ({"items": {"quick": 0, "standard": 1, "full": None}}, r"takes 0 items when quick"),
        ({"more": 1}, r"is not an object of"),
    ],
)
def test_a_malformed_suite_is_told_in_one_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    task = {
        "name": "a",
        "kind": "text",
        "loader": "core-passages",
        "items": {"quick": 1, "standard": 1, "full": None},
    }
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"name": "mine", "tasks": [task | change]}))
    with pytest.raises(EvaluateError, match=message):
        find_suite(str(path))
    with pytest.raises(UsageError, match=r"no suite 'other', known are benchmark_v3.1"):
        find_suite("other")


def test_the_card_takes_what_was_measured_and_all_else_stays(tmp_path: Path) -> None:
    folder = tmp_path / "tiny.fl"
    shutil.copytree(TINY, folder)
    before = open_artifact(folder)
    files = {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.name not in ("card.json", "manifest.json")
    }
    after = record(before, {"validation": {"kl": 0.5}})
    assert json.loads((folder / "card.json").read_text())["measured"]["validation"] == {"kl": 0.5}
    assert files == {name: (folder / name).read_bytes() for name in files}
    assert (
        open_artifact(folder, enable_integrity_check=True).digest == after.digest != before.digest
    )
    (folder / "card.json").write_text("{}")
    with pytest.raises(ArtifactError):
        record(after, {})
    assert (folder / "card.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.fl"]


def some_validation(kl: float = 0.02) -> Validation:
    mean = Mean(kl, kl / 2, kl * 2)
    text = TextResult(100, mean, 0.1, Mean(0.95, 0.9, 1), 10.0, 10.5)
    worse = TextResult(100, Mean(3 * kl, kl, 4 * kl), 0.1, Mean(0.9, 0.8, 1), 10.0, 10.5)
    choice = ChoiceResult(10, 0.5, Mean(0.6, 0.5, 0.7), Mean(0.5, 0.4, 0.6), Mean(0.2, 0, 0.4))
    answered = Answered(4, 0.0, 0.5, 0.25, None)
    return Validation(
        "<b>suite", "quick", 0, ("xcopa",), {"<i>text": text}, {"de": worse, "en": text},
        {"c": choice}, {"g": [answered]},
    )  # fmt: skip


def test_the_page_says_everything_and_loads_nothing() -> None:
    page = render_validation(some_validation(), "model", "source.gguf", ["kl 0.02: kept"])
    for part in ("0.0200 nats", "95.00 %", "worst language / English", "xcopa", "kl 0.02: kept"):
        assert part in page
    assert "<b>suite" not in page
    assert "<i>text" not in page
    assert "http" not in page
    assert "src=" not in page


def test_limits_are_judged() -> None:
    none = dict.fromkeys(flag for flag, *_ in verb._LIMITS)
    verdicts, missed = verb._judge(
        some_validation(), none | {"max_kl": 0.05, "max_language_ratio": 2.0, "min_top1": 0.94}
    )
    assert verdicts[0] == "kl 0.0200, at most 0.05: kept"
    assert verdicts[1] == "top1 0.9500, at least 0.94: kept"
    assert missed == ["language_ratio 3.0000, at most 2"]


def test_without_an_artifact_the_analysis_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["validate"]) == 2
    assert "no ARTIFACT given and no sensitive_layers.json" in capsys.readouterr().err
    config = tmp_path / "sensitive_layers.json"
    config.write_text(json.dumps({"model": {"path": "/m"}, "artifact": None}))
    assert main(["validate"]) == 2
    assert "names no artifact yet" in capsys.readouterr().err
    config.write_text(json.dumps({"model": {"path": "/m"}, "artifact": "base.fl"}))
    assert verb._from_config(config) == (tmp_path / "base.fl", "/m")
    config.write_text("[]")
    assert main(["validate"]) == 2
    assert "is not what `flashlite analyze` writes" in capsys.readouterr().err


def test_a_source_that_is_not_known_has_to_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny.fl"
    shutil.copytree(TINY, folder)
    assert main(["validate", str(folder)]) == 2
    assert "name it with --source" in capsys.readouterr().err
