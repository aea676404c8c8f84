"""Metrics against values worked out by hand and against the plain formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flashlite.errors import UsageError
from flashlite.model.metrics import kl_divergence, log_softmax, perplexity, top1_agreement


def test_log_softmax_by_hand() -> None:
    logs = log_softmax(np.array([[0.0, math.log(3.0)], [1e4, 1e4]], dtype=np.float32))
    np.testing.assert_allclose(np.exp(logs), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
    assert logs.dtype == np.float64


def test_kl_by_hand() -> None:
    p, q = np.log([[0.5, 0.5], [0.5, 0.5]]), np.log([[0.25, 0.75], [0.5, 0.5]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    np.testing.assert_allclose(kl_divergence(p, q), [expected, 0.0], atol=1e-12)
    assert kl_divergence(q, p)[0] != pytest.approx(expected)  # the first argument is the reference


def test_kl_ignores_a_shift_of_the_logits() -> None:
    p = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    assert np.abs(kl_divergence(p, p + np.float32(4096))).max() < 1e-6


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    p, q = rng.standard_normal((2, 23, 50))
    targets = rng.integers(0, 50, 23)
    whole = kl_divergence(p, q), perplexity(p, targets)
    monkeypatch.setattr("flashlite.model.metrics._CHUNK_VALUES", 150)
    np.testing.assert_allclose(kl_divergence(p, q), whole[0], rtol=1e-12)
    assert perplexity(p, targets) == pytest.approx(whole[1], rel=1e-12)


def test_top1_agreement() -> None:
    p = np.array([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert top1_agreement(p, p[:, ::-1]) == 0.0
    assert top1_agreement(p, np.array([[0.0, 9.0]] * 4)) == 0.75


def test_perplexity_by_hand() -> None:
    logits = np.log([[0.5, 0.5], [0.125, 0.875]])
    assert perplexity(logits, np.array([0, 0])) == pytest.approx(4.0)
    assert perplexity(np.zeros((7, 10)), np.arange(7)) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("p", "q"),
    [(np.zeros((2, 3)), np.zeros((2, 4))), (np.zeros(3), np.zeros(3)), (np.zeros((0, 3)),) * 2],
)
def test_shapes_that_cannot_be_compared_are_refused(p: Any, q: Any) -> None:
    for metric in (kl_divergence, top1_agreement):
        with pytest.raises(UsageError, match="shapes"):
            metric(p, q)


@pytest.mark.parametrize("targets", [[0], [0, 3], [-1, 0], [[0, 0]]])
def test_targets_that_fit_nothing_are_refused(targets: list[int]) -> None:
    with pytest.raises(UsageError, match="target"):
        perplexity(np.zeros((2, 3)), np.array(targets))
