"""What tuning minimises, and how far the head is computed for it.

Distillation: 0.9 KL(source || model) over the source's 64 likeliest tokens and one bucket for the
rest, + 0.1 cross-entropy of the token that follows, + 0.1 squared distance of the last hidden
states relative to the source's, so that a right output does not hide a drift inside.
A domain: cross-entropy of its answers.

The head of a small model is most of its work (Gemma-3-270M: 262,144 rows). In training a row of
logits has the source's 64 tokens, the token that follows, and 512 others drawn for the whole batch:
half of them uniformly, half as often as the cached opinions name them. Weighted by one over their
chance, the others estimate the mass of the rest without bias (importance sampling, Bengio and
Senecal 2003).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.model.differentiable import Tensor, require_torch

__all__ = ["DISTILL", "Loss", "Negatives", "Opinion", "Sampler", "answer_loss", "distill_loss"]

DISTILL = (0.9, 0.1, 0.1)  # weights of divergence, cross-entropy and distance
_CHUNK = 256  # rows whose 64 own tokens are gathered at once


@dataclass(frozen=True)
class Opinion:
    """What the source says about some rows, as `Cache` holds it."""

    top_ids: Tensor  # int64 [rows, 64]
    top_logs: Tensor  # float32 [rows, 64]
    rest_logs: Tensor  # float32 [rows]
    hidden: Tensor  # float32 [rows, d_model]


@dataclass(frozen=True)
class Negatives:
    """Tokens drawn for a whole batch."""

    ids: Tensor  # int64 [n], each once
    logs: Tensor  # float32 [n], log of how many tokens each stands for


class Sampler:
    """Draws the tokens that stand for all others."""

    def __init__(self, top_ids: NDArray[np.int32], vocab_size: int, count: int = 512) -> None:
        """Count how often each token is among the likeliest of the cached rows."""
        self._vocab, self._count = vocab_size, count
        seen = np.bincount(top_ids.ravel(), minlength=vocab_size).astype(np.float64)
        named = seen / seen.sum() if seen.any() else np.full(vocab_size, 1 / vocab_size)
        self._chance = (named + 1 / vocab_size) / 2
        self._until = np.cumsum(self._chance)

    def draw(self, seed: tuple[int, int]) -> Negatives:
        """The tokens of one step; all of them where the vocabulary is small."""
        torch = require_torch("fine-tuning")
        if self._vocab <= 4 * self._count:
            return Negatives(torch.arange(self._vocab), torch.zeros(self._vocab))
        points = np.random.default_rng(seed).random(self._count) * self._until[-1]
        found, times = np.unique(np.searchsorted(self._until, points), return_counts=True)
        found = np.minimum(found, self._vocab - 1)
        logs = np.log(times / (self._count * self._chance[found])).astype(np.float32)
        return Negatives(torch.from_numpy(found.astype(np.int64)), torch.from_numpy(logs))


@dataclass(frozen=True)
class Loss:
    """The loss of some rows."""

    value: float  # mean over the rows
    divergence: float  # KL in nats, mean; nan where no source was asked
    gradient: Tensor  # of the mean, to the states: float32 [rows, d_model]


def distill_loss(
    table: Tensor, states: Tensor, opinion: Opinion, following: Tensor, negatives: Negatives
) -> Loss:
    """The distillation loss of some rows.

    Args:
        table: the head [vocab, d_model], frozen.
        states: what the head reads, [rows, d_model].
        opinion: the source's, of the same rows.
        following: int64 [rows], the tokens that follow.
        negatives: for all rows.
    """
    torch = require_torch("fine-tuning")
    rows = len(states)
    others = table[negatives.ids]
    place = torch.full((len(table),), -1, dtype=torch.int64)
    place[negatives.ids] = torch.arange(len(negatives.ids))
    value = divergence = 0.0
    gradient = torch.empty_like(states)
    for start in range(0, rows, _CHUNK):
        part = slice(start, start + _CHUNK)
        state = states[part].detach().requires_grad_()
        own = torch.cat([opinion.top_ids[part], following[part, None]], dim=1)
        scores = torch.einsum("rjd,rd->rj", table[own], state)
        top, next_score = scores[:, :-1], scores[:, -1]
        rest = state @ others.T + negatives.logs
        # What is among a row's own tokens must not count twice.
        at = place[own[:, :-1]]
        hit = at >= 0
        mask = torch.zeros_like(rest, dtype=torch.bool)
        mask[torch.arange(len(at))[:, None].expand_as(at)[hit], at[hit]] = True
        rest_mass = torch.logsumexp(rest.masked_fill(mask, -1e30), -1)
        whole = torch.logaddexp(torch.logsumexp(top, -1), rest_mass)
        logs, rest_log = opinion.top_logs[part], opinion.rest_logs[part]
        apart = (logs.exp() * (logs - top + whole[:, None])).sum(-1)
        apart = apart + rest_log.exp() * (rest_log - rest_mass + whole)
        entropy = whole - next_score
        target = opinion.hidden[part]
        distance = ((state - target) ** 2).mean(-1) / (target**2).mean(-1).clamp_min(1e-12)
        loss = DISTILL[0] * apart + DISTILL[1] * entropy + DISTILL[2] * distance
        mean = loss.sum() / rows
        mean.backward()
        gradient[part] = state.grad
        value += mean.item()
        divergence += apart.sum().item() / rows
    return Loss(value, divergence, gradient)


def answer_loss(table: Tensor, states: Tensor, following: Tensor, negatives: Negatives) -> Loss:
    """Mean cross-entropy of the tokens that follow.

    Every token that follows a row of the batch is scored for all rows, the rest is estimated.
    """
    torch = require_torch("fine-tuning")
    named, where = torch.unique(following, return_inverse=True)
    state = states.detach().requires_grad_()
    scores = state @ table[named].T
    place = torch.zeros(len(table), dtype=torch.bool)
    place[named] = True
    rest = state @ table[negatives.ids].T + negatives.logs
    rest = rest.masked_fill(place[negatives.ids], -1e30)
    whole = torch.logsumexp(torch.cat([scores, rest], dim=1), -1)
    loss = (whole - scores.gather(1, where[:, None])[:, 0]).mean()
    loss.backward()
    return Loss(loss.item(), float("nan"), state.grad)
