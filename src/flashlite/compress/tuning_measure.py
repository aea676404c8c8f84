"""How good a tuned model is on texts it did not learn from, with the whole head.

A label of a domain counts as found when greedy decoding writes it: freely, or held to the labels
that the domain has. Both are read from one pass over the right answer: decoding leaves it at the
first row whose largest score lies elsewhere, and never before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.tail import Tail
from flashlite.compress.tail_cache import Cache, head_rows
from flashlite.compress.tuning_texts import Answers, batches
from flashlite.model.differentiable import Tensor, require_torch

__all__ = ["Domain", "Quality", "bucketed_divergence", "domain", "exact", "states_of"]


@dataclass(frozen=True)
class Quality:
    """Against the source, on every row of some texts.

    Attributes:
        kl: KL(source || model) in nats per token, over the whole vocabulary.
        top1: share of rows whose likeliest token is the source's.
        perplexity: of the texts.
        rows: how many were measured.
    """

    kl: float
    top1: float
    perplexity: float
    rows: int

    def to_json(self) -> dict[str, float]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Domain:
    """On the answers of a domain.

    Attributes:
        loss: cross-entropy of the answers, nats per token.
        accuracy: share of chats whose last answer greedy decoding writes, held to the labels.
        free: the same without being held to them.
        chats: how many were measured.
    """

    loss: float
    accuracy: float
    free: float
    chats: int

    def to_json(self) -> dict[str, float]:
        """A JSON object."""
        return asdict(self)


def states_of(tail: Tail, cache: Cache, group: Sequence[int]) -> Tensor:
    """What the head reads at the rows of these texts that count."""
    torch = require_torch("fine-tuning")
    where, _ = cache.learned(group)
    states = tail.states(cache.padded(group))
    return states.reshape(-1, states.shape[-1])[torch.from_numpy(where)]


def exact(
    tail: Tail,
    cache: Cache,
    table: Tensor,
    source_table: Callable[[], NDArray[np.float32]],
) -> Quality:
    """Divergence over the whole vocabulary.

    Args:
        tail: the model's last layers.
        cache: the texts, with the source's states.
        table: the model's head.
        source_table: reads the source's.
    """
    torch = require_torch("fine-tuning")
    theirs = torch.from_numpy(np.ascontiguousarray(source_table()))
    kl = agreed = loss = 0.0
    rows = 0
    step = max(8, head_rows(tail.spec) // 2)
    for group in _groups(cache):
        with torch.no_grad():
            states = states_of(tail, cache, group)
            hidden = torch.from_numpy(cache.hidden.get(cache.rows(group)))
            following = torch.from_numpy(cache.learned(group)[1])
            for start in range(0, len(states), step):
                part = slice(start, start + step)
                q = torch.log_softmax(states[part] @ table.T, -1)
                p = torch.log_softmax(hidden[part] @ theirs.T, -1)
                agreed += float((q.argmax(-1) == p.argmax(-1)).sum())
                loss -= float(q.gather(1, following[part, None]).sum())
                kl += float((p.exp() * (p - q)).sum())
        rows += len(states)
    return Quality(kl / rows, agreed / rows, math.exp(min(loss / rows, 80.0)), rows)


def bucketed_divergence(tail: Tail, cache: Cache, table: Tensor, most: int) -> float:
    """Divergence over the source's likeliest tokens and one bucket for the rest, nats per token.

    At most the exact one; the source's head is not needed. Only the first texts with `most` rows
    together are looked at.
    """
    torch = require_torch("fine-tuning")
    total, rows = 0.0, 0
    step = head_rows(tail.spec)
    for group in _groups(cache, most):
        at = cache.rows(group)
        with torch.no_grad():
            states = states_of(tail, cache, group)
            for start in range(0, len(states), step):
                part = at[start : start + step]
                q = torch.log_softmax(states[start : start + step] @ table.T, -1)
                ids = torch.from_numpy(cache.top_ids[part].astype(np.int64))
                logs = torch.from_numpy(cache.top_logs[part])
                rest = torch.from_numpy(cache.rest_logs[part])
                mine = q.gather(1, ids)
                mine_rest = torch.logsumexp(q.scatter_(1, ids, float("-inf")), -1).clamp_min(-80.0)
                total += float((logs.exp() * (logs - mine)).sum())
                total += float((rest.exp() * (rest - mine_rest)).sum())
        rows += len(states)
    return total / rows


def domain(
    tail: Tail, cache: Cache, table: Tensor, labels: Answers, most: int | None = None
) -> Domain:
    """Cross-entropy and accuracy of the answers, of the first chats with `most` rows together."""
    torch = require_torch("fine-tuning")
    loss, rows, found, free, n = 0.0, 0, 0, 0, 0
    for group in _groups(cache, most):
        n += len(group)
        with torch.no_grad():
            states = states_of(tail, cache, group)
        at = 0
        for i in group:
            text = cache.texts[i]
            targets = text.ids[np.flatnonzero(text.learn) + 1]
            with torch.no_grad():
                q = torch.log_softmax(states[at : at + len(targets)] @ table.T, -1).numpy()
            at += len(targets)
            loss -= float(q[np.arange(len(targets)), targets].sum())
            rows += len(targets)
            answer = _last(text.learn)
            free += bool((q[-answer:].argmax(-1) == targets[-answer:]).all())
            found += _kept(q[-answer:], targets[-answer:], labels)
    return Domain(loss / rows, found / n, free / n, n)


def _kept(q: NDArray[np.float32], targets: NDArray[np.int32], labels: Answers) -> bool:
    """Whether greedy decoding among the labels writes this one."""
    path = [int(i) for i in targets]
    for j, token in enumerate(path):
        allowed = labels.following.get(tuple(path[:j]), (token,))
        if token not in allowed or allowed[int(q[j, list(allowed)].argmax())] != token:
            return False
    return True


def _last(learn: NDArray[np.bool_]) -> int:
    """How many rows the last answer has."""
    rows = np.flatnonzero(learn)
    breaks = np.flatnonzero(np.diff(rows) > 1)
    return len(rows) - (int(breaks[-1]) + 1 if len(breaks) else 0)


def _groups(cache: Cache, most: int | None = None) -> list[list[int]]:
    """The texts in batches; no more of them than have `most` rows together, but one at least."""
    chosen = len(cache.texts)
    if most is not None:
        rows = np.cumsum([int(text.learn.sum()) for text in cache.texts])
        chosen = max(1, int(np.searchsorted(rows, most, side="right")))
    return batches([len(text) for text in cache.texts[:chosen]], 2048)
