"""Validation: two models on the same tokens, choices, generation, suites, the card, exit codes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
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
from flashlite.evaluate import teacher
from flashlite.evaluate.choices import Asked, ChoiceResult, choice_result, count
from flashlite.evaluate.items import Passage, Prompt, Question
from flashlite.evaluate.loaders import LOADERS, load_items
from flashlite.evaluate.scoring import Scored, compare
from flashlite.evaluate.statistics import Mean, bootstrap
from flashlite.evaluate.suites import draw_items, find_suite
from flashlite.evaluate.teacher import Excerpt, Kept, walk_blocks
from flashlite.evaluate.validation import TextResult, Validation
from flashlite.evaluate.validation_report import render_validation, table_rows
from flashlite.evaluate.writing import Answered, is_json, loops, repetition
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


def test_the_bootstrap_by_hand() -> None:
    """Two chunks of one value each: the mean of a draw is 0, 1/2 or 1, with 1/4, 1/2, 1/4."""
    mean = bootstrap([np.array([0.0]), np.array([1.0])])
    assert (mean.value, mean.low, mean.high) == (0.5, 0, 1)
    # A chunk of 64 beside one of 2 weighs as its tokens: means are 0, 2 / 66 and 1.
    mean = bootstrap([np.array([0.0] * 64 + [1.0] * 2)])
    assert mean.value == pytest.approx(2 / 66)
    assert (mean.low, mean.high) == (0, 1)


def test_a_paired_interval_is_narrow_where_both_vary_together() -> None:
    rng = np.random.default_rng(1)
    source = rng.normal(3, 2, 64 * 50)
    model = source + 0.01
    paired = bootstrap([model - source])
    alone = bootstrap([model])
    assert paired.value == pytest.approx(0.01)
    assert paired.high - paired.low < 1e-6 < alone.high - alone.low


def scored(source: list[float], model: list[float], rivals: bool = False) -> list[Scored]:
    """Losses of the options of one question: an excerpt each, or all in one."""
    nothing = np.zeros(1, np.float32)
    none = np.zeros(0, np.float32)
    s, m = np.array(source, np.float32), np.array(model, np.float32)
    if rivals:
        return [Scored(nothing, nothing > 1, s[:1], m[:1], s, m)]
    return [
        Scored(nothing, nothing > 1, s[i : i + 1], m[i : i + 1], none, none)
        for i in range(len(source))
    ]


@pytest.mark.parametrize("rivals", [False, True])
def test_choices_count_right_answers_and_changed_ones(rivals: bool) -> None:
    question = Question("en", "x", (" aa", " bb"), 0)
    long = Question("en", "x", (" aaaaaaaaaaaaaaaa", " bb"), 0)
    cases = [
        (question, [1.0, 2.0], [1.0, 2.0]),  # right, right
        (question, [1.0, 2.0], [3.0, 2.0]),  # right, wrong
        (long, [4.0, 2.0], [4.0, 2.0]),  # right by length, twice
        (question, [2.0, 1.0], [1.0, 2.0]),  # wrong, right: accuracy hides this and the second
    ]
    counted = []
    for one, source, model in cases:
        parts = scored(source, model, rivals)
        counted.append(count(Asked("t", one, range(len(parts))), parts))
    result = choice_result(counted)
    assert result.questions == 4
    assert result.source_accuracy.value == 0.75
    assert result.model_accuracy.value == 0.75
    assert result.difference.value == 0
    assert result.flips.value == 0.5
    assert result.chance == 0.5


def test_options_of_one_token_cost_one_excerpt_and_score_alike(small: Small) -> None:
    ids = small.ids(20, seed=3)
    rivals = (5, 9, int(ids[-1]))
    apart = [Excerpt(np.append(ids[:-1], r).astype(np.int32), len(ids) - 1) for r in rivals]
    together = Excerpt(ids, len(ids) - 1, rivals)
    reference = small.reference()
    with small.open("plain") as engine:
        *each, one = compare(reference.spec, reference._weight, engine, [*apart, together])
    np.testing.assert_allclose(one.model_rivals, [e.model_loss[0] for e in each], rtol=1e-5)
    np.testing.assert_allclose(one.source_rivals, [e.source_loss[0] for e in each], rtol=1e-5)
    assert len(one.kl) == 1


def test_hidden_states_are_kept_and_a_damaged_file_is_made_again(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = small.reference()
    excerpts = [Excerpt(small.ids(n, seed=n), first) for n, first in ((40, 1), (30, 12), (9, 8))]
    monkeypatch.setattr(teacher, "_BLOCK_VALUES", 60 * reference.spec.d_model)
    asked = 0

    def weights(name: str) -> NDArray[np.float32]:
        nonlocal asked
        asked += 1
        values: NDArray[np.float32] = reference._weight(name)
        return values

    def states(digest: str) -> list[NDArray[np.float32]]:
        kept = Kept(digest, tmp_path / "teachers")
        return [hidden for _, hidden in walk_blocks(reference.spec, weights, excerpts, kept)]

    first = states("a")
    files = sorted((tmp_path / "teachers").iterdir())
    assert len(files) == 2  # two blocks
    assert [len(rows) for rows in first] == [39, 18, 1]
    for excerpt, rows in zip(excerpts, first, strict=True):
        np.testing.assert_array_equal(rows, reference.hidden(excerpt.ids)[excerpt.first - 1 : -1])
    walked, asked = asked, 0
    for old, new in zip(first, states("a"), strict=True):
        np.testing.assert_array_equal(old, new)
    assert asked == 0
    states("another source")
    assert asked == walked
    asked = 0
    data = bytearray(files[0].read_bytes())
    data[100] ^= 1
    files[0].write_bytes(data)
    for old, new in zip(first, states("a"), strict=True):
        np.testing.assert_array_equal(old, new)
    assert 0 < asked < walked
    monkeypatch.setattr(teacher, "_KEPT_BYTES", 0)
    states("a third source")
    assert len(list((tmp_path / "teachers").iterdir())) == 1  # the last one alone


def test_loops_repetition_and_json_are_recognized() -> None:
    assert loops([1, 2] * 16)
    assert not loops(list(range(64)))
    assert not loops([*range(8)] * 3)
    assert repetition(list(range(64))) == 0
    assert repetition([7] * 14) == pytest.approx(10 / 11)
    assert repetition([1, 2]) == 0
    assert is_json('```json\n{"a": [1, 2]}\n```')
    assert not is_json("The answer is 4.")


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


@pytest.mark.parametrize(
    ("loader", "file", "content"),
    [
        ("core-passages", "passages.jsonl", '{"language": "en"}'),
        ("core-passages", "passages.jsonl", '{"language": "en", "text": 7}'),
        ("core-questions", "questions.jsonl", "[1, 2]"),
        ("core-questions", "questions.jsonl",
         '{"language": "en", "prompt": "p", "options": ["a", "b"], "answer": 2}'),
        ("core-prompts", "prompts.jsonl", "not JSON"),
        ("exams_qa", "dev.jsonl.tar.gz", "no archive"),
        ("xquad_dev", "xquad.en.json", '{"data": 1}'),
        ("glue/RTE", "train.tsv", "a\tb\n1\t2\n"),
        ("babi", "a.json", "[{}]"),
        ("jsonschemabench", "a.json", "[]"),
        ("xcopa", "val.it.jsonl", "null"),
    ],
)  # fmt: skip
def test_a_set_that_is_something_else_is_told_in_one_line(
    tmp_path: Path, loader: str, file: str, content: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(EvaluateError, match=f"is not the set {loader}: "):
        load_items(loader, tmp_path)


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
    ratio = Mean(math.log(1.05), 0, 0.1)
    text = TextResult(100, mean, 0.1, Mean(0.95, 0.9, 1), ratio, 10.0, 10.5)
    worse = TextResult(100, Mean(3 * kl, kl, 4 * kl), 0.1, Mean(0.9, 0.8, 1), ratio, 10.0, 10.5)
    choice = ChoiceResult(
        10, 0.5, Mean(0.6, 0.5, 0.7), Mean(0.5, 0.4, 0.6), Mean(-0.1, -0.2, 0), Mean(0.2, 0, 0.4)
    )
    answered = Answered(4, 0.0, 0.5, 0.25, 0.125, None)
    return Validation(
        "<b>suite", "quick", 0, ("xcopa",), text, (0.5, 0.25, 0, 0, 0.25, 0, 0),
        {"<i>text": text, "other": text}, {"de": worse, "en": text},
        {"c": choice}, choice, {"g": [answered]},
    )  # fmt: skip


def test_the_page_says_everything_and_loads_nothing() -> None:
    verdicts = {"kl at most 0.05": True, "top1 at least 0.99": False}
    page = render_validation(some_validation(), "model", "source.gguf", verdicts)
    for part in (
        "0.0200 nats", "95.00 %", "worst language / English", "xcopa", "-10.00 points",
        "<li class=kept>kl at most 0.05", "<li class=missed>top1 at least 0.99", "50.0 %", "12.5",
    ):  # fmt: skip
        assert part in page
    assert page.count("<svg") == 4
    assert "<b>suite" not in page
    assert "<i>text" not in page
    assert "http" not in page
    assert "src=" not in page


def test_limits_are_judged() -> None:
    none = dict.fromkeys(flag for flag, *_ in verb._LIMITS)
    given = {
        "max_kl": 0.05, "max_language_ratio": 2.0, "min_top1": 0.94, "max_accuracy_drop": 0.1,
        "max_ppl_ratio": 1.04,
    }  # fmt: skip
    assert verb._judge(some_validation(), none | given) == {
        "kl 0.0200, at most 0.05": True,
        "top1 0.9500, at least 0.94": True,
        "perplexity_ratio 1.0500, at most 1.04": False,
        "language_ratio 3.0000, at most 2": False,
        "accuracy_drop 0.1000, at most 0.1": True,
    }
    alone = replace(some_validation(), languages={})
    with pytest.raises(UsageError, match="--max-language-ratio: this suite does not measure it"):
        verb._judge(alone, none | {"max_language_ratio": 2.0})


def test_tables_have_a_row_for_everything_together() -> None:
    tables = table_rows(some_validation())
    assert [row[0] for row in tables["Texts"][1]] == ["<i>text", "other", "all"]
    assert all(len(row) == len(headers) for headers, rows in tables.values() for row in rows)


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
