"""What a run of fine-tuning is told, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from flashlite.compress.tuning_measure import Domain, Quality
from flashlite.compress.tuning_texts import Text
from flashlite.errors import CompressError

__all__ = ["Material", "Outcome", "Report", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How a run goes; the defaults are the documented recipe."""

    layers: int = 3
    steps: int = 220
    rate: float = 1e-4
    tokens: int = 2048  # of a step
    replay: float = 0.25  # of a domain's step: the share, in tokens and in weight, of other texts
    seed: int = 0
    measure_every: int = 20
    measure_rows: int = 1024  # at most, during training; before and after it is all of them
    patience: int = 4  # measurements without a gain before it ends
    search_every: int = 100
    save_every: int = 20
    max_seconds: float | None = None

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            CompressError: a value is outside its range.
        """
        for name, low, high in (
            ("layers", 1, 1024), ("steps", 1, 1_000_000), ("tokens", 16, 1 << 20),
            ("measure_every", 1, 1 << 20), ("patience", 1, 1 << 20),
            ("search_every", 1, 1 << 20), ("save_every", 1, 1 << 20),
            ("measure_rows", 1, 1 << 30), ("seed", 0, (1 << 63) - 1),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise CompressError(f"{name} is {getattr(self, name)}, allowed {low} to {high}")
        if not 0 < self.rate <= 1 or not 0 < self.replay < 1:
            raise CompressError(f"rate {self.rate} or replay {self.replay} is not between 0 and 1")


@dataclass(frozen=True)
class Material:
    """Texts to learn from, and texts to measure on.

    Attributes:
        texts: the source's opinion of these is learned.
        held: their like, held back: training ends when it no longer gains on them.
        chats: the domain's; empty: healing alone.
        held_chats: the domain's, held back.
        others: more texts that are only measured, by name.
    """

    texts: Sequence[Text]
    held: Sequence[Text]
    chats: Sequence[Text] = ()
    held_chats: Sequence[Text] = ()
    others: Mapping[str, Sequence[Text]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """One look at a run."""

    stage: str  # "read", "tune" or "measure"
    done: int
    total: int
    loss: float | None = None
    held: float | None = None  # divergence, or the domain's loss, on what is held back


@dataclass(frozen=True)
class Outcome:
    """What a run made.

    Attributes:
        arrays: the tuned tensors as an artifact stores them, by stored name.
        before, after: quality by set of texts; "held-out" is `Material.held`.
        domain_before, domain_after: on `Material.held_chats`.
        steps: of the state that was kept.
        stopped: "steps", "patience" or "time".
        history: (step, loss, what is held back) at each measurement.
    """

    arrays: dict[str, NDArray[Any]]
    before: dict[str, Quality]
    after: dict[str, Quality]
    domain_before: Domain | None
    domain_after: Domain | None
    steps: int
    stopped: str
    history: list[tuple[int, float, float]]

    @property
    def better(self) -> bool:
        """Whether what is held back got better: the domain's loss, or the divergence."""
        if self.domain_before is not None and self.domain_after is not None:
            return self.domain_after.loss < self.domain_before.loss
        return self.after["held-out"].kl < self.before["held-out"].kl
