"""How the next token is chosen, and where a text stops.

`SamplingParams` are checked here and carried out by `csrc/fl_sample.c`, in this order: penalties,
logit bias, temperature, top-k, top-p, min-p, one draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flashlite.errors import UsageError
from flashlite.runtime.library import Need

__all__ = ["MAX_LOGPROBS", "SamplingParams", "StopStrings"]

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_BIASED = 4096  # tokens

_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}
_COUNTS: Mapping[str, tuple[int, int]] = {
    "top_k": (0, 2**31 - 1),
    "seed": (0, 2**64 - 1),
    "max_tokens": (1, 2**31 - 1),
    "logprobs": (0, MAX_LOGPROBS),
}
_OPTIONAL = frozenset({"seed", "max_tokens", "logprobs"})


@dataclass(frozen=True)
class SamplingParams:
    r"""How one request draws its tokens; the defaults take the most likely one each time.

    Example:
        SamplingParams(temperature=0.7, top_p=0.9, seed=1, stop=("\n\n",)).check()
    """

    temperature: float = 0.0  # 0: the most likely token, and top_k, top_p, min_p have no effect
    top_k: int = 0  # draw among this many; 0: all
    top_p: float = 1.0  # draw among the fewest whose probabilities reach this; 1: all
    min_p: float = 0.0  # draw among those at least this likely, relative to the likeliest; 0: all
    repetition_penalty: float = 1.0  # logits of tokens seen: positive divided, negative multiplied
    presence_penalty: float = 0.0  # subtracted once from the logit of a token seen
    frequency_penalty: float = 0.0  # subtracted for each time it was seen
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added; -inf forbids the token
    seed: int | None = None  # None: the caller picks one
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    max_tokens: int | None = None  # None: until the context is full
    logprobs: int | None = None  # None: none; 0: of the chosen token; n: of the n likeliest too

    @property
    def need(self) -> Need:
        """Which logits may not be estimates: all where any may be asked for or raised, the largest
        where no other can be drawn.
        """
        if (
            self.logprobs is not None
            or self.logit_bias
            or self.repetition_penalty < 1
            or self.presence_penalty < 0
            or self.frequency_penalty < 0
        ):
            return "all"
        lowers = self.repetition_penalty > 1 or self.presence_penalty or self.frequency_penalty
        return "likely" if self.temperature > 0 or lowers else "largest"

    def check(self, vocab_size: int | None = None) -> None:
        """Refuse what no sampler could honour.

        Args:
            vocab_size: of the model, where it is known already: bounds `logit_bias`.

        Raises:
            UsageError: naming the parameter, its value and its limits.
        """
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise UsageError(f"{name} is {_show(value)}, allowed {low:g} to {high:g}")
        for name, (least, most) in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not _is_int(value) or not least <= value <= most:
                raise UsageError(
                    f"{name} is {_show(value)}, allowed whole numbers {least} to {most}"
                )
        self._check_stop()
        self._check_bias(vocab_size)

    def _check_stop(self) -> None:
        stop: object = self.stop  # as the caller gave it, whatever its type
        if not isinstance(stop, (tuple, list)):
            raise UsageError(f"stop is {_show(stop)}, allowed a tuple of strings")
        if len(stop) > MAX_STOPS:
            raise UsageError(f"stop has {len(stop)} strings, allowed at most {MAX_STOPS}")
        for text in stop:
            if not isinstance(text, str):
                raise UsageError(f"stop holds {_show(text)}, allowed strings")
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise UsageError(
                    f"a stop string has {len(text)} characters, allowed 1 to {MAX_STOP_LENGTH}"
                )

    def _check_bias(self, vocab_size: int | None) -> None:
        biases: object = self.logit_bias
        if not isinstance(biases, Mapping):
            raise UsageError(f"logit_bias is {_show(biases)}, allowed token id: number")
        if len(biases) > MAX_BIASED:
            raise UsageError(f"logit_bias has {len(biases)} tokens, allowed at most {MAX_BIASED}")
        last = (2**31 if vocab_size is None else vocab_size) - 1
        for token, bias in biases.items():
            if not _is_int(token) or not 0 <= token <= last:
                raise UsageError(f"logit_bias has token {_show(token)}, allowed ids 0 to {last}")
            if not _is_number(bias) or not (bias == -math.inf or -100 <= bias <= 100):
                raise UsageError(
                    f"logit_bias of token {token} is {_show(bias)}, allowed -100 to 100, or -inf "
                    "to forbid it"
                )


class StopStrings:
    """Ends a streamed text before the first stop string, however the text is cut into pieces.

    A stop string takes effect as soon as its last character arrives; of several that end there
    the longest one counts. Text that may be the beginning of one is held back until it is not.

    Example:
        stops = StopStrings(("</s>",))
        stops.push("Hi <")     # "Hi "
        stops.push("/s> and")  # "", and stops.matched is "</s>"
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Args: stop: strings of at least one character, as `SamplingParams.check` lets through."""
        self._stop = tuple(stop)
        self._first = frozenset(text[0] for text in self._stop)
        self._longest = max((len(text) for text in self._stop), default=0)
        self._held = ""
        self.matched: str | None = None  # the stop string that was met

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Take the next piece; returns what may be shown now. After a match: nothing."""
        if self.stopped:
            return ""
        seen = self._held + text
        # (end, start) of the first occurrence of each; the smallest is what a reader of single
        # characters would meet first, and the longest of those that end there.
        ends = {}
        for stop in self._stop:
            if (start := seen.find(stop)) >= 0:
                ends[start + len(stop), start] = stop
        if ends:
            first = min(ends)
            self.matched = ends[first]
            self._held = ""
            return seen[: first[1]]
        keep = self._may_begin(seen)
        self._held = seen[keep:]
        return seen[:keep]

    def finish(self) -> str:
        """The text has ended by itself: returns what was held back."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, seen: str) -> int:
        """Where the longest ending of `seen` starts that begins a stop string."""
        for start in range(max(0, len(seen) - self._longest + 1), len(seen)):
            if seen[start] in self._first:
                ending = seen[start:]
                if any(stop.startswith(ending) for stop in self._stop):
                    return start
        return len(seen)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
