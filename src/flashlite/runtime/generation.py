"""One request on its way through the scheduler, and the pieces of text that come out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.tokenizer import StreamDecoder
from flashlite.errors import EngineError
from flashlite.runtime.engine import Sequence
from flashlite.runtime.grammar import Guide
from flashlite.runtime.library import Need
from flashlite.runtime.sampler import Drawn, Sampler
from flashlite.runtime.sampling import SamplingParams, StopStrings
from flashlite.runtime.speculate import Drafter

__all__ = ["FinishReason", "Generation", "Piece"]

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added: text that is final (it may be empty, or hold several tokens')."""

    text: str
    drawn: Drawn | None  # None in the piece that only flushes held-back text
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Generation:
    """One request on its way: fixed inputs first, then its state."""

    prompt: NDArray[np.int32]
    params: SamplingParams
    room: int  # tokens it may generate
    sampler: Sampler
    decoder: StreamDecoder
    stops: StopStrings
    client: str = ""
    guide: Guide | None = None  # its place in the grammar
    opening: tuple[int, ...] = ()  # what the grammar puts before the first draw
    sequence: Sequence | None = None
    pending: list[int] | None = None  # drawn or forced, not yet in the KV cache; never empty
    drafter: Drafter | None = None  # from its first decode step, when drafts are allowed
    generated: list[int] = field(default_factory=list)
    pieces: deque[Piece] = field(default_factory=deque)  # for the caller to take
    finish_reason: FinishReason | None = None
    error: EngineError | None = None  # why the reason is "error"
    cached_tokens: int = 0  # of the prompt: found stored instead of computed
    drafted_tokens: int = 0  # guessed, and checked in a step
    accepted_tokens: int = 0  # of these: as the sampler drew them
    forced_tokens: int = 0  # of the answer: the grammar left no other text
    submitted: float = 0.0  # seconds of time.perf_counter
    first_token: float | None = None
    last_token: float | None = None

    @property
    def prefilled(self) -> int:
        """Prompt tokens in the KV cache."""
        return 0 if self.sequence is None else min(self.sequence.length, len(self.prompt))

    @property
    def need(self) -> Need:
        """Which logits may not be estimates; all where a grammar may leave any token alone."""
        return "all" if self.guide is not None else self.params.need
