"""One request's draws: its settings, its history, and the C sampler."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashlite.runtime.library import CDraw, CSampling, Library
from flashlite.runtime.sampling import SamplingParams

__all__ = ["Drawn", "Sampler"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One drawn token and what else was likely."""

    token: int
    logprob: float  # natural, under penalties and bias, at temperature 1; 0 when not asked for
    top: tuple[tuple[int, float], ...]  # (token, logprob), most likely first


class Sampler:
    """Draws for one request; equal (logits, params, prompt) give equal draws."""

    def __init__(
        self,
        library: Library,
        params: SamplingParams,
        prompt: NDArray[np.int32],
        room: int,
        scratch: NDArray[np.uint64],
    ) -> None:
        """Prepare for at most `room` draws after `prompt`; `scratch`, of the vocabulary's length,
        is written by every draw and may serve many samplers in turn.
        """
        self._library = library
        self._bias_ids = np.array(list(params.logit_bias), np.int32)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._scratch = scratch
        n_top = self._n_top = params.logprobs or 0
        self._top_ids = np.empty(max(n_top, 1), np.int32)
        self._top_logprobs = np.empty(max(n_top, 1), np.float32)
        penalizes = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        # Kept only where it is read: requests that wait hold little.
        self._history = np.empty(len(prompt) + room if penalizes else 0, np.int32)
        self._n_history = len(prompt) if penalizes else 0
        self._history[: self._n_history] = prompt[: self._n_history]
        seed = (
            int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed % 2**64
        )
        self._sampling = CSampling(
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=params.top_k,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=seed,
            draw=0,
            history=self._history.ctypes.data,
            n_history=0,
            bias_ids=self._bias_ids.ctypes.data,
            bias=self._bias.ctypes.data,
            n_bias=len(self._bias),
        )
        self._draw = CDraw(
            top_ids=self._top_ids.ctypes.data,
            top_logprobs=self._top_logprobs.ctypes.data,
            n_top=n_top,
            skip_logprob=params.logprobs is None,
        )

    def draw(self, logits: NDArray[np.float32]) -> Drawn:
        """Draw from one row of logits, which is modified.

        Raises:
            EngineError: a logit is not a number.
        """
        self._sampling.n_history = self._n_history
        self._library.sample(
            logits.ctypes.data, len(logits), self._sampling, self._scratch.ctypes.data, self._draw
        )
        self._sampling.draw += 1
        token = int(self._draw.token)
        if len(self._history):
            self._history[self._n_history] = token
            self._n_history += 1
        n_top = int(self._draw.n_top)
        pairs = zip(
            self._top_ids[:n_top].tolist(), self._top_logprobs[:n_top].tolist(), strict=True
        )
        top = (pair for pair in pairs if pair[1] > -math.inf)  # not what is forbidden
        logprob = float(self._draw.logprob)
        return Drawn(token, logprob if math.isfinite(logprob) else -math.inf, tuple(top))

    def note(self, token: int) -> Drawn:
        """Take a token that was not drawn, since nothing else could follow: its probability is 1.

        No draw is counted.
        """
        if len(self._history):
            self._history[self._n_history] = token
            self._n_history += 1
        top = ((token, 0.0),) if self._n_top else ()
        return Drawn(token, 0.0, top)
