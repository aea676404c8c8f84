"""Questions with options: what each model would choose, and how many choices changed.

An option's score is its log-likelihood after the prompt, per character, so that long options are
not at a disadvantage. Flips count answers that changed, right or wrong: "Accuracy is not all you
need" (arXiv 2407.09141) shows that accuracy hides them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.evaluate.items import Question
from flashlite.evaluate.scoring import Scored
from flashlite.evaluate.statistics import Mean, bootstrap
from flashlite.evaluate.teacher import Excerpt

__all__ = [
    "Asked",
    "ChoiceResult",
    "Counted",
    "choice_result",
    "count",
    "option_excerpts",
    "singles",
]


@dataclass(frozen=True)
class Asked:
    """A question of a task, and which excerpts hold its options: one each, or one with rivals."""

    task: str
    question: Question
    excerpts: range


@dataclass(frozen=True)
class Counted:
    """What came out of one question."""

    source_right: bool
    model_right: bool
    flipped: bool
    chance: float


@dataclass(frozen=True)
class ChoiceResult:
    """A choice task."""

    questions: int
    chance: float
    source_accuracy: Mean
    model_accuracy: Mean
    difference: Mean  # of the model's accuracy from the source's, question by question
    flips: Mean  # share of the answers that changed

    def to_json(self) -> dict[str, Any]:
        """Numbers and intervals."""
        names = ("source_accuracy", "model_accuracy", "difference", "flips")
        means = {name: getattr(self, name).to_json() for name in names}
        return {"questions": self.questions, "chance": round(self.chance, 4), **means}


def option_excerpts(
    tokenizer: Tokenizer, begin: Sequence[int], question: Question, most: int
) -> list[Excerpt]:
    """The prompt with each option; empty when one does not fit into `most` tokens.

    Where every option is one token after the same tokens, one excerpt has them all: its rivals are
    the options in their order.
    """
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
    one = made[0]
    if all(
        e.rows == 1 and e.first == one.first and np.array_equal(e.ids[:-1], one.ids[:-1])
        for e in made
    ):
        return [Excerpt(one.ids, one.first, tuple(int(e.ids[-1]) for e in made))]
    return made


def count(asked: Asked, scored: Sequence[Scored]) -> Counted:
    """Choose with both models; `scored` is indexed by `asked.excerpts`."""
    question, parts = asked.question, [scored[i] for i in asked.excerpts]
    if len(parts) == 1:
        source, model = (
            _choose(question, losses) for losses in (parts[0].source_rivals, parts[0].model_rivals)
        )
    else:
        source = _choose(question, [part.source_loss.sum() for part in parts])
        model = _choose(question, [part.model_loss.sum() for part in parts])
    answer = question.answer
    return Counted(source == answer, model == answer, source != model, 1 / len(question.options))


def choice_result(counted: Sequence[Counted]) -> ChoiceResult:
    """The figures of one task; at least one question."""

    def mean(value: Callable[[Counted], float]) -> Mean:
        return bootstrap(singles(value(one) for one in counted))

    return ChoiceResult(
        len(counted),
        float(np.mean([one.chance for one in counted])),
        mean(lambda one: one.source_right),
        mean(lambda one: one.model_right),
        mean(lambda one: float(one.model_right) - one.source_right),
        mean(lambda one: one.flipped),
    )


def singles(values: Iterable[float]) -> list[NDArray[np.float64]]:
    """Values that are drawn one by one in a bootstrap."""
    return [np.array([value], np.float64) for value in values]


def _choose(question: Question, losses: Sequence[float] | NDArray[np.float32]) -> int:
    lengths = np.array([max(1, len(option.strip())) for option in question.options])
    return int(np.argmin(np.asarray(losses, np.float64) / lengths))
