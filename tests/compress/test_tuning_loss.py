"""The losses against plain formulas; what is drawn estimates the rest without bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashlite.compress.tuning_loss import (
    DISTILL,
    Negatives,
    Opinion,
    Sampler,
    answer_loss,
    distill_loss,
)

torch = pytest.importorskip("torch")

VOCAB, D, ROWS, TOP = 600, 16, 300, 64


def setting(seed: int = 0) -> tuple[Any, Any, Opinion, Any]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCAB, D, generator=generator) * 0.5
    states = torch.randn(ROWS, D, generator=generator)
    theirs = states + 0.3 * torch.randn(ROWS, D, generator=generator)
    logs = torch.log_softmax(theirs @ table.T, -1)
    top = logs.topk(TOP, -1)
    rest = torch.logsumexp(logs.scatter(1, top.indices, float("-inf")), -1)
    following = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return table, states, Opinion(top.indices, top.values, rest, theirs), following


def plain(table: Any, states: Any, opinion: Opinion, following: Any) -> tuple[Any, Any]:
    q = torch.log_softmax(states @ table.T, -1)
    mine = q.gather(1, opinion.top_ids)
    rest = torch.log1p(-mine.exp().sum(-1))
    kl = (opinion.top_logs.exp() * (opinion.top_logs - mine)).sum(-1)
    kl = kl + opinion.rest_logs.exp() * (opinion.rest_logs - rest)
    entropy = -q.gather(1, following[:, None])[:, 0]
    distance = ((states - opinion.hidden) ** 2).mean(-1) / (opinion.hidden**2).mean(-1)
    return (DISTILL[0] * kl + DISTILL[1] * entropy + DISTILL[2] * distance).mean(), kl.mean()


def everything() -> Negatives:
    return Negatives(torch.arange(VOCAB), torch.zeros(VOCAB))


def test_with_every_token_the_loss_is_the_plain_one() -> None:
    table, states, opinion, following = setting()
    found = distill_loss(table, states, opinion, following, everything())
    leaf = states.clone().requires_grad_()
    loss, divergence = plain(table, leaf, opinion, following)
    loss.backward()
    assert found.value == pytest.approx(loss.item(), rel=1e-5)
    assert found.divergence == pytest.approx(divergence.item(), rel=1e-4)
    torch.testing.assert_close(found.gradient, leaf.grad, rtol=1e-3, atol=1e-7)


def test_answers_with_every_token_are_the_cross_entropy() -> None:
    table, states, _, following = setting()
    found = answer_loss(table, states, following, everything())
    leaf = states.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf @ table.T, following)
    loss.backward()
    assert found.value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found.gradient, leaf.grad, rtol=1e-3, atol=1e-7)


def test_drawn_tokens_estimate_the_gradient_without_bias() -> None:
    table, states, opinion, following = setting()
    sampler = Sampler(opinion.top_ids.numpy().astype(np.int32), VOCAB, count=100)
    exact = distill_loss(table, states, opinion, following, everything())
    drawn = [
        distill_loss(table, states, opinion, following, sampler.draw((0, i))) for i in range(60)
    ]
    mean = torch.stack([loss.gradient for loss in drawn]).mean(0)
    one = (drawn[0].gradient - exact.gradient).norm() / exact.gradient.norm()
    many = (mean - exact.gradient).norm() / exact.gradient.norm()
    assert one < 0.5
    assert many < 0.35 * one
    mass = np.mean([float(torch.logsumexp(sampler.draw((1, i)).logs, 0)) for i in range(60)])
    assert mass == pytest.approx(np.log(VOCAB), abs=0.05)


def test_a_draw_is_a_function_of_its_seed() -> None:
    sampler = Sampler(np.zeros((1, 4), np.int32), 100_000)
    one, two, three = sampler.draw((0, 1)), sampler.draw((0, 1)), sampler.draw((0, 2))
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, three.ids)
    assert len(one.ids) == len(set(one.ids.tolist())) <= 512
