"""Guess the next tokens from the text itself, so that one step can check several of them.

    the last tokens stood before  ->  what followed then is the draft  ->  one step over
    [pending, *draft]  ->  the sampler draws row by row  ->  tokens count as far as draft and draw
    agree, the rest is forgotten

The draws are those of single steps, bit for bit: the logits of a row do not depend on what is in
the step beside it, and a draw depends on its logits, its request and its number alone. So this
changes when tokens come, never which; at any temperature, under any penalty.

It pays where text repeats itself (summaries, edits, code) and costs a little where it does not, so
a draft is made only while its expected tokens per second exceed those of a plain step.

Source: A. Saxena, Prompt Lookup Decoding, 2023 (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_DRAFT", "Drafter", "Pace"]

MAX_DRAFT = 11  # with the token before it, two tiles of the kernels
DRAFT_BESIDE = 2  # while others decode: their next token waits for the longer step
MAX_DECODING = 3  # with more sequences decoding together, none drafts

_LENGTHS = (2, 5, MAX_DRAFT)  # few, so that the time of each is soon known
_GRAMS = (3, 2)  # tokens that must have stood before; the longer is tried first
_LONGEST = 16  # tokens looked back to see how much agrees
_BETTER = 1.05  # a draft must promise this much
_PRIOR = 0.5  # acceptance assumed before there is any, counted as one draft token
_FADE = 0.9  # weight of a draft's outcome after the next one
_PROBE = 64  # plain steps after which one short draft is tried whatever was measured
_MAX_PROBE = 512
_GUESSED = 0.1  # of a plain step, per token more, until it was measured


class Pace:
    """What drafts cost in one engine: the time of a step, in those of the step without them."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}  # seconds of a step of so many requests, at present
        self._ratio: dict[tuple[int, int], float] = {}  # by (requests, tokens)

    def restart(self) -> None:
        """Other requests decode from now on: plain steps take as long as their contexts ask for,
        which is measured anew. Ratios hardly depend on it.
        """
        self._plain.clear()

    def note(self, requests: int, tokens: int, seconds: float) -> None:
        """Learn from a decode step of so many requests and tokens."""
        if tokens == requests:
            self._plain[tokens] = _follow(self._plain.get(tokens), seconds)
        elif (plain := self._plain.get(requests)) is not None:
            at = (requests, tokens)
            self._ratio[at] = _follow(self._ratio.get(at), seconds / plain)

    def ratio(self, requests: int, tokens: int) -> float | None:
        """Time of a step of `tokens`, in plain ones; None before a plain one was measured."""
        if requests not in self._plain:
            return None
        return self._ratio.get((requests, tokens), 1 + _GUESSED * (tokens - requests))


def _follow(known: float | None, value: float) -> float:
    """A running mean; a higher value counts less, since other programs make steps slow and
    nothing makes them fast.
    """
    if known is None:
        return value
    return known + (value - known) * (0.5 if value < known else 0.1)


class Drafter:
    """The guesses of one request."""

    def __init__(self, ids: Sequence[int] | NDArray[np.int32]) -> None:
        """`ids`: the prompt and what was generated until now."""
        self._ids: list[int] = np.asarray(ids).tolist()
        # Where the token stands that last followed n tokens, for each n of _GRAMS.
        self._after = [_index(np.asarray(ids, np.int64), n) for n in _GRAMS]
        # By how much agreed before the guess: draft tokens that were right, and that ended one.
        self._right = [0.0] * 4
        self._wrong = [0.0] * 4
        self._agreed = 0
        self._plain = 0  # steps since the last draft in which one could have been made
        self._probe = _PROBE

    def push(self, token: int) -> None:
        """Append a token that was drawn."""
        ids = self._ids
        for n, after in zip(_GRAMS, self._after, strict=True):
            if len(ids) >= n:
                after[_key(ids[-n:])] = len(ids)
        ids.append(token)

    def propose(self, pace: Pace, limit: int, beside: int) -> list[int]:
        """What may come next; empty: a plain step is the better bet.

        Args:
            pace: what steps cost.
            limit: the most tokens to propose.
            beside: other tokens in the same step, of other requests.
        """
        at = self._find()
        if at is None or limit < 1:
            return []
        self._agreed = self._agreement(at)
        length = self._best_length(pace, limit, beside)
        self._plain += not length
        if not length and self._plain >= self._probe:
            length = min(_LENGTHS[0], limit)
        return self._copy(at, length)

    def learn(self, proposed: int, accepted: int) -> None:
        """How the last draft ended."""
        kind = _kind(self._agreed)
        self._right[kind] = self._right[kind] * _FADE + accepted
        self._wrong[kind] = self._wrong[kind] * _FADE + (accepted < proposed)
        if self._plain >= self._probe:  # it was a probe: a failed one makes the next rarer
            self._probe = _PROBE if accepted else min(self._probe * 2, _MAX_PROBE)
        self._plain = 0

    def _best_length(self, pace: Pace, limit: int, beside: int) -> int:
        kind = _kind(self._agreed)
        p = (self._right[kind] + _PRIOR) / (self._right[kind] + self._wrong[kind] + 1)
        best, length = _BETTER, 0
        for k in _LENGTHS:
            cost = pace.ratio(beside + 1, beside + 1 + k)
            if k > limit or cost is None:
                break
            tokens = (1 - p ** (k + 1)) / (1 - p)  # 1 + p + ... + p^k
            gain = (beside + tokens) / (beside + 1) / cost
            if gain > best:
                best, length = gain, k
        return length

    def _find(self) -> int | None:
        for n, after in zip(_GRAMS, self._after, strict=True):
            if len(self._ids) >= n and (at := after.get(_key(self._ids[-n:]))) is not None:
                return at
        return None

    def _agreement(self, at: int) -> int:
        """How many tokens before place `at` equal the last ones."""
        ids, n = self._ids, 0
        while n < _LONGEST and n < at and ids[at - 1 - n] == ids[-1 - n]:
            n += 1
        return n

    def _copy(self, at: int, length: int) -> list[int]:
        """What followed; where that reaches the end of the text, it goes on repeating."""
        ids, draft = self._ids, list[int]()
        for place in range(at, at + length):
            draft.append(ids[place] if place < len(ids) else draft[place - len(ids)])
        return draft


def _kind(agreed: int) -> int:
    """Guesses after 2, 3-4, 5-8 and more equal tokens are told apart: they differ in luck."""
    return 0 if agreed <= 2 else 1 if agreed <= 4 else 2 if agreed <= 8 else 3


def _key(gram: Sequence[int]) -> int:
    key = 0
    for token in gram:
        key = key << 21 | token
    return key


def _index(ids: NDArray[np.int64], n: int) -> dict[int, int]:
    """For every n tokens in a row that something follows: where the last such follower stands."""
    if len(ids) <= n:
        return {}
    keys = np.zeros(len(ids) - n, np.int64)
    for i in range(n):
        keys = keys << 21 | ids[i : len(ids) - n + i]
    return dict(zip(keys.tolist(), range(n, len(ids)), strict=True))
