"""`validate`: what a compressed model lost against its source, with how sure that is.

    suite -> items -> excerpts -> both models on the same tokens -> Validation -> card, report

Text tasks give KL divergence, agreement of the likeliest token and perplexity; choice tasks
(`choices`) accuracy and flips; generation (`writing`) is looked at for how it ends and repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import EvaluateError
from flashlite.evaluate.choices import Asked, ChoiceResult, choice_result, count, option_excerpts
from flashlite.evaluate.items import Passage, Prompt, Question
from flashlite.evaluate.scoring import Scored, compare
from flashlite.evaluate.statistics import Mean, bootstrap
from flashlite.evaluate.suites import Drawn
from flashlite.evaluate.teacher import Excerpt, Kept
from flashlite.evaluate.writing import Answered, Generate, answer_prompts
from flashlite.model.reference import Weights
from flashlite.model.spec import ModelSpec
from flashlite.runtime.engine import Engine

__all__ = ["DECADES", "TextResult", "Validation", "validate"]

Progress = Callable[[str, int, int], None]
_CONTEXT = 512  # tokens of a passage that are read
DECADES = tuple(10.0**power for power in range(-5, 1))
"""Nats between which tokens are counted: below the first, ..., from the last on."""


@dataclass(frozen=True)
class TextResult:
    """A text task, or one language of it, or all of them."""

    tokens: int
    kl: Mean
    kl_99: float  # nats below which 99 % of the tokens lie
    top1: Mean
    log_ratio: Mean  # ln of the model's perplexity over the source's, token by token
    source_perplexity: float
    model_perplexity: float

    def to_json(self) -> dict[str, Any]:
        """Numbers and intervals."""
        return {
            "tokens": self.tokens,
            "kl": self.kl.to_json(),
            "kl_99": round(self.kl_99, 6),
            "top1": self.top1.to_json(),
            "log_perplexity_ratio": self.log_ratio.to_json(),
            "source_perplexity": round(self.source_perplexity, 4),
            "model_perplexity": round(self.model_perplexity, 4),
        }


@dataclass(frozen=True)
class Validation:
    """Everything `validate` found."""

    suite: str
    size: str
    seed: int
    absent: tuple[str, ...]  # sets that the suite names and that were not there
    total: TextResult  # over all tokens of all text tasks
    decades: tuple[float, ...]  # share of these tokens by their KL, see DECADES
    texts: Mapping[str, TextResult]  # by task
    languages: Mapping[str, TextResult]  # of all text tasks with several languages, by language
    choices: Mapping[str, ChoiceResult]
    questions: ChoiceResult | None  # all of them; None without any
    generations: Mapping[str, Sequence[Answered]]

    @property
    def kl(self) -> float:
        """Nats per token, the mean over all text."""
        return self.total.kl.value

    @property
    def top1(self) -> float:
        """Agreement over all text."""
        return self.total.top1.value

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity over that of the source, over all text."""
        return math.exp(self.total.log_ratio.value)

    @property
    def worst_language(self) -> str | None:
        """The one with the highest KL; None unless English and others were measured."""
        if "en" not in self.languages or len(self.languages) < 2:
            return None
        return max(self.languages, key=lambda name: self.languages[name].kl.value)

    @property
    def language_ratio(self) -> float | None:
        """KL of the worst language over that of English; None without several languages."""
        worst = self.worst_language
        if worst is None:
            return None
        # An exact model has rounding noise alone, which no ratio should be made of.
        english = max(self.languages["en"].kl.value, 1e-6)
        return max(self.languages[worst].kl.value, 1e-6) / english

    @property
    def flips(self) -> float | None:
        """Share of all questions whose answer changed; None without any."""
        return None if self.questions is None else self.questions.flips.value

    @property
    def accuracy_drop(self) -> float | None:
        """Share of all questions that the source has right beyond the model; None without any."""
        return None if self.questions is None else 0.0 - self.questions.difference.value

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
            "worst_language": self.worst_language,
            "flips": rounded(self.flips),
            "accuracy_drop": rounded(self.accuracy_drop),
            "total": self.total.to_json(),
            "kl_decades": [round(share, 6) for share in self.decades],
            "texts": {name: result.to_json() for name, result in self.texts.items()},
            "languages": {name: result.to_json() for name, result in self.languages.items()},
            "choices": {name: result.to_json() for name, result in self.choices.items()},
            "questions": None if self.questions is None else self.questions.to_json(),
            "generations": {
                name: [one.to_json() for one in results]
                for name, results in self.generations.items()
            },
        }


@dataclass(frozen=True)
class _Read:
    """A passage and the excerpt that holds it."""

    task: str
    language: str
    excerpt: int


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
    kept: Kept | None = None,
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
        kept: where the source's hidden states are kept for the next time.
        progress: called with (stage, done, of how many).

    Raises:
        EvaluateError: no text of the suite can be used.
    """
    most = min(_CONTEXT, spec.max_context)
    excerpts: list[Excerpt] = []
    texts: list[_Read] = []
    asked: list[Asked] = []
    prompts: dict[str, list[Prompt]] = {}
    for one in drawn:
        task = one.task.name
        for item in one.items:
            if isinstance(item, Passage):
                ids = [*begin, *tokenizer.encode(item.text)][:most]
                if len(ids) > len(begin) + 8:
                    texts.append(_Read(task, item.language, len(excerpts)))
                    excerpts.append(Excerpt(np.array(ids, np.int32)))
            elif isinstance(item, Question):
                made = option_excerpts(tokenizer, begin, item, most)
                if made:
                    where = range(len(excerpts), len(excerpts) + len(made))
                    asked.append(Asked(task, item, where))
                    excerpts += made
            else:
                prompts.setdefault(task, []).append(item)
    if not texts:
        raise EvaluateError(f"suite {suite} has no text that can be scored")

    def stage(name: str) -> Callable[[int, int], None]:
        return lambda done, total: None if progress is None else progress(name, done, total)

    scored = compare(spec, weights, engine, excerpts, stage("score"), kept)
    languages: dict[str, set[str]] = {}
    for text in texts:
        languages.setdefault(text.task, set()).add(text.language)
    several = [text for text in texts if len(languages[text.task]) > 1]
    answers = {(one.task, i): count(one, scored) for i, one in enumerate(asked)}
    everything = [scored[text.excerpt] for text in texts]
    return Validation(
        suite,
        size,
        seed,
        tuple(absent),
        _text_result(everything),
        _decades(everything),
        _text_results(texts, scored, lambda text: text.task),
        dict(sorted(_text_results(several, scored, lambda text: text.language).items())),
        {
            task: choice_result([one for (name, _), one in answers.items() if name == task])
            for task in dict.fromkeys(one.task for one in asked)
        },
        choice_result(list(answers.values())) if answers else None,
        answer_prompts(prompts, generate, stage("generate")),
    )


def _text_results(
    texts: Sequence[_Read], scored: Sequence[Scored], key: Callable[[_Read], str]
) -> dict[str, TextResult]:
    groups: dict[str, list[Scored]] = {}
    for text in texts:
        groups.setdefault(key(text), []).append(scored[text.excerpt])
    return {name: _text_result(parts) for name, parts in groups.items()}


def _text_result(parts: Sequence[Scored]) -> TextResult:
    kl = np.concatenate([part.kl for part in parts])

    def perplexity(name: str) -> float:
        return float(np.exp(np.concatenate([getattr(part, name) for part in parts]).mean()))

    return TextResult(
        len(kl),
        bootstrap([part.kl for part in parts]),
        float(np.quantile(kl, 0.99)),
        bootstrap([part.same_top.astype(np.float64) for part in parts]),
        # Paired: both losses are of the same token, so what they share moves neither end.
        bootstrap([part.model_loss.astype(np.float64) - part.source_loss for part in parts]),
        perplexity("source_loss"),
        perplexity("model_loss"),
    )


def _decades(parts: Sequence[Scored]) -> tuple[float, ...]:
    kl = np.concatenate([part.kl for part in parts])
    counts = np.bincount(np.searchsorted(DECADES, kl, side="right"), minlength=len(DECADES) + 1)
    return tuple(float(share) for share in counts / len(kl))
