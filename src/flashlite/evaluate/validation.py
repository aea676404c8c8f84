"""`validate`: what a compressed model lost against its source, with how sure that is.

    suite -> items -> excerpts -> both models on the same tokens -> Validation -> card, report

Text tasks give KL divergence, agreement of the likeliest token and perplexity; choice tasks give
accuracy and flips (answers that changed, right or wrong: "Accuracy is not all you need", arXiv
2407.09141); generation is looked at for repetition, for ending, and for JSON where it was asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import EvaluateError
from flashlite.evaluate.items import Passage, Prompt, Question
from flashlite.evaluate.scoring import Excerpt, Scored, compare
from flashlite.evaluate.statistics import Mean, bootstrap
from flashlite.evaluate.suites import Drawn
from flashlite.model.reference import Weights
from flashlite.model.spec import ModelSpec
from flashlite.runtime.engine import Engine

__all__ = ["Answered", "ChoiceResult", "Generate", "TextResult", "Validation", "validate"]

Generate = Callable[[str, float, int], tuple[Sequence[int], str, bool]]
"""(prompt, temperature, most tokens) -> (ids, text, whether the model ended by itself)."""

Progress = Callable[[str, int, int], None]
_CONTEXT = 512  # tokens of a passage that are read
_GENERATED = 64  # tokens
_TEMPERATURES = (0.0, 0.7)
_REPEATS = 4  # a stretch of 8 tokens seen so often is a loop
_STRETCH = 8


@dataclass(frozen=True)
class TextResult:
    """A text task, or one language of it."""

    tokens: int
    kl: Mean
    kl_99: float  # nats below which 99 % of the tokens lie
    top1: Mean
    source_perplexity: float
    model_perplexity: float

    @property
    def log_ratio(self) -> float:
        """Ln of the ratio of perplexities."""
        return math.log(self.model_perplexity / self.source_perplexity)

    def to_json(self) -> dict[str, Any]:
        """Numbers and intervals."""
        data = asdict(self) | {"kl": self.kl.to_json(), "top1": self.top1.to_json()}
        return data | {"log_perplexity_ratio": round(self.log_ratio, 6)}


@dataclass(frozen=True)
class ChoiceResult:
    """A choice task."""

    questions: int
    chance: float
    source_accuracy: Mean
    model_accuracy: Mean
    flips: Mean  # share of the answers that changed

    def to_json(self) -> dict[str, Any]:
        """Numbers and intervals."""
        means = {
            name: getattr(self, name).to_json()
            for name in ("source_accuracy", "model_accuracy", "flips")
        }
        return {"questions": self.questions, "chance": round(self.chance, 4), **means}


@dataclass(frozen=True)
class Answered:
    """A generation task at one temperature, of the compressed model alone."""

    prompts: int
    temperature: float
    ended: float  # share that came to an end by itself
    looping: float  # share in which 8 tokens in a row came 4 times or more
    json_valid: float | None  # of those that asked for JSON; None: none did

    def to_json(self) -> dict[str, Any]:
        """Shares."""
        return asdict(self)


@dataclass(frozen=True)
class Validation:
    """Everything `validate` found."""

    suite: str
    size: str
    seed: int
    absent: tuple[str, ...]  # sets that the suite names and that were not there
    texts: Mapping[str, TextResult]  # by task
    languages: Mapping[str, TextResult]  # of all text tasks with several languages, by language
    choices: Mapping[str, ChoiceResult]
    generations: Mapping[str, Sequence[Answered]]

    @property
    def kl(self) -> float:
        """Mean over all tokens of all text tasks."""
        total = sum(r.kl.value * r.tokens for r in self.texts.values())
        return total / sum(r.tokens for r in self.texts.values())

    @property
    def top1(self) -> float:
        """Agreement over all tokens of all text tasks."""
        total = sum(r.top1.value * r.tokens for r in self.texts.values())
        return total / sum(r.tokens for r in self.texts.values())

    @property
    def perplexity_ratio(self) -> float:
        """Geometric mean over all tokens."""
        total = sum(r.log_ratio * r.tokens for r in self.texts.values())
        return math.exp(total / sum(r.tokens for r in self.texts.values()))

    @property
    def language_ratio(self) -> float | None:
        """KL of the worst language over that of English; None without several languages."""
        if "en" not in self.languages or len(self.languages) < 2:
            return None
        worst = max(result.kl.value for result in self.languages.values())
        return worst / max(self.languages["en"].kl.value, 1e-12)

    @property
    def flips(self) -> float | None:
        """Share of all questions whose answer changed; None without any."""
        n = sum(r.questions for r in self.choices.values())
        return sum(r.flips.value * r.questions for r in self.choices.values()) / n if n else None

    def to_json(self) -> dict[str, Any]:
        """What goes into the card and behind --json."""

        def rounded(value: float | None) -> float | None:
            return None if value is None else round(value, 6)

        return {
            "suite": self.suite,
            "size": self.size,
            "seed": self.seed,
            "absent": list(self.absent),
            "kl": rounded(self.kl),
            "top1": rounded(self.top1),
            "perplexity_ratio": rounded(self.perplexity_ratio),
            "language_ratio": rounded(self.language_ratio),
            "flips": rounded(self.flips),
            "texts": {name: result.to_json() for name, result in self.texts.items()},
            "languages": {name: result.to_json() for name, result in self.languages.items()},
            "choices": {name: result.to_json() for name, result in self.choices.items()},
            "generations": {
                name: [one.to_json() for one in results]
                for name, results in self.generations.items()
            },
        }


def validate(
    suite: str,
    drawn: Sequence[Drawn],
    absent: Sequence[str],
    spec: ModelSpec,
    weights: Weights,
    engine: Engine,
    tokenizer: Tokenizer,
    begin: Sequence[int],
    generate: Generate,
    *,
    size: str = "standard",
    seed: int = 0,
    progress: Progress | None = None,
) -> Validation:
    """Measure a compressed model against its source.

    Args:
        suite: its name, for the report.
        drawn: the tasks and their items.
        absent: sets that could not be read.
        spec: of the source.
        weights: of the source, float32 by canonical name.
        engine: the compressed model, open for 512 tokens or its whole context if that is less.
        tokenizer: of both.
        begin: what every text begins with (the BOS where the model wants one).
        generate: writes text with the compressed model.
        size: which size was drawn.
        seed: what it was drawn with.
        progress: called with (stage, done, of how many).

    Raises:
        EvaluateError: no item of the suite can be used.
    """
    most = min(_CONTEXT, spec.max_context)
    excerpts: list[Excerpt] = []
    texts: list[tuple[str, str, int]] = []  # task, language, excerpt
    options: list[tuple[str, Question, list[int]]] = []  # task, question, an excerpt per option
    for one in drawn:
        for item in one.items:
            if isinstance(item, Passage):
                ids = [*begin, *tokenizer.encode(item.text)][:most]
                if len(ids) > len(begin) + 8:
                    texts.append((one.task.name, item.language, len(excerpts)))
                    excerpts.append(Excerpt(np.array(ids, np.int32)))
            elif isinstance(item, Question):
                made = _options(tokenizer, begin, item, most)
                if made:
                    options.append(
                        (one.task.name, item, [*range(len(excerpts), len(excerpts) + len(made))])
                    )
                    excerpts += made
    if not texts:
        raise EvaluateError(f"suite {suite} has no text that can be scored")

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("score", done, total)

    scored = compare(spec, weights, engine, excerpts, report)
    by_task = _gather(texts, scored, lambda task, _: task)
    several = {task for task, _, _ in texts if len({x for t, x, _ in texts if t == task}) > 1}
    by_language = _gather(
        [entry for entry in texts if entry[0] in several], scored, lambda _, language: language
    )
    prompts = {
        one.task.name: [item for item in one.items if isinstance(item, Prompt)]
        for one in drawn
        if one.task.kind == "generate"
    }
    return Validation(
        suite,
        size,
        seed,
        tuple(absent),
        {task: _text_result(parts) for task, parts in by_task.items()},
        {language: _text_result(parts) for language, parts in sorted(by_language.items())},
        _choice_results(options, scored),
        _generations(prompts, generate, progress),
    )


def _options(
    tokenizer: Tokenizer, begin: Sequence[int], question: Question, most: int
) -> list[Excerpt]:
    """The prompt with each option; empty when one does not fit."""
    prompt = [*begin, *tokenizer.encode(question.prompt)]
    made = []
    for option in question.options:
        ids = [*begin, *tokenizer.encode(question.prompt + option)]
        # Tokens may join across the border: what differs from the prompt alone is the option.
        first = next(
            (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt)
        )
        if len(ids) > most or not 1 <= first < len(ids):
            return []
        made.append(Excerpt(np.array(ids, np.int32), first))
    return made


def _gather(
    texts: Sequence[tuple[str, str, int]],
    scored: Sequence[Scored],
    key: Callable[[str, str], str],
) -> dict[str, list[Scored]]:
    groups: dict[str, list[Scored]] = {}
    for task, language, index in texts:
        groups.setdefault(key(task, language), []).append(scored[index])
    return groups


def _text_result(parts: Sequence[Scored]) -> TextResult:
    kl = np.concatenate([part.kl for part in parts])

    def perplexity(name: str) -> float:
        return float(np.exp(np.concatenate([getattr(part, name) for part in parts]).mean()))

    return TextResult(
        len(kl),
        bootstrap([part.kl for part in parts]),
        float(np.quantile(kl, 0.99)),
        bootstrap([part.same_top.astype(np.float64) for part in parts]),
        perplexity("source_loss"),
        perplexity("model_loss"),
    )


def _choice_results(
    options: Sequence[tuple[str, Question, list[int]]], scored: Sequence[Scored]
) -> dict[str, ChoiceResult]:
    groups: dict[str, list[tuple[bool, bool, bool, float]]] = {}
    for task, question, indexes in options:
        # Per character of the option, so that long options are not at a disadvantage.
        lengths = np.array([max(1, len(option.strip())) for option in question.options])
        source, model = (
            int(np.argmin(np.array([loss(scored[i]).sum() for i in indexes]) / lengths))
            for loss in (attrgetter("source_loss"), attrgetter("model_loss"))
        )
        groups.setdefault(task, []).append(
            (source == question.answer, model == question.answer, source != model, 1 / len(indexes))
        )
    results = {}
    for task, rows in groups.items():
        columns = np.array(rows, np.float64).T
        single = [[column[i : i + 1] for i in range(len(column))] for column in columns[:3]]
        results[task] = ChoiceResult(
            len(rows), float(columns[3].mean()), *(bootstrap(parts) for parts in single)
        )
    return results


def _generations(
    prompts: Mapping[str, Sequence[Prompt]], generate: Generate, progress: Progress | None
) -> dict[str, list[Answered]]:
    total, done = sum(map(len, prompts.values())) * len(_TEMPERATURES), 0
    results: dict[str, list[Answered]] = {}
    for task, asked in prompts.items():
        for temperature in _TEMPERATURES:
            ended, looping, valid = 0, 0, []
            for prompt in asked:
                ids, text, over = generate(prompt.text, temperature, _GENERATED)
                ended += over
                looping += _loops(ids)
                if prompt.kind == "json":
                    valid.append(_is_json(text))
                done += 1
                if progress is not None:
                    progress("generate", done, total)
            n = len(asked)
            share = sum(valid) / len(valid) if valid else None
            results.setdefault(task, []).append(
                Answered(n, temperature, ended / n, looping / n, share)
            )
    return results


def _loops(ids: Sequence[int] | NDArray[np.int32]) -> bool:
    seen: dict[tuple[int, ...], int] = {}
    for i in range(len(ids) - _STRETCH + 1):
        stretch = tuple(ids[i : i + _STRETCH])
        seen[stretch] = seen.get(stretch, 0) + 1
        if seen[stretch] >= _REPEATS:
            return True
    return False


def _is_json(text: str) -> bool:
    """Whether the answer is a JSON value, a fence of Markdown around it allowed."""
    text = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
