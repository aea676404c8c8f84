"""flashlite as a model of `lm-eval`, so that its tasks run on our engine.

    pip install 'flashlite[eval]'
    python -m flashlite.evaluate.lm_eval_model run --model flashlite \\
        --model_args path=smollm2.fl,threads=2 --tasks my_task --include_path ./tasks

lm-eval finds no models by entry points, so this module registers `flashlite` and then is lm-eval's
own command line: every verb and flag of it works. In Python:

    from lm_eval import simple_evaluate
    from flashlite.evaluate.lm_eval_model import FlashliteLM
    simple_evaluate(FlashliteLM("smollm2.fl"), tasks=[...])

`path` is what `flashlite run` takes: an artifact, a known name, a checkpoint. Log-likelihoods come
from the full head, also where the model has a split one. Texts of tasks are never read as control
tokens; with `--apply_chat_template` they go through the model's template the same way.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from numpy.typing import NDArray
from tqdm import tqdm

from flashlite.errors import UsageError
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.engine import Sequence as Timeline
from flashlite.runtime.library import MAX_BATCH
from flashlite.runtime.model import load
from flashlite.runtime.sampling import SamplingParams

__all__ = ["FlashliteLM", "main"]

_ROWS = 64  # of logits at once
_CONTEXT = 2048
_ANSWER = 256  # tokens, where a task names no limit

_Scored = tuple[float, bool]
_Tokens = list[int]
_Request = tuple[tuple[str, str] | None, _Tokens, _Tokens]


@register_model("flashlite")
class FlashliteLM(TemplateLM):  # type: ignore[misc]
    """A compiled model behind lm-eval's interface: loglikelihood, rolling, generate_until."""

    def __init__(
        self,
        path: str,
        *,
        batch_size: int | str = 1,
        max_length: int | None = None,
        threads: int | None = None,
        preset: str = "import",
        **others: Any,
    ) -> None:
        """Open the model.

        Args:
            path: an artifact's folder, a known name or a checkpoint.
            batch_size: answers written at once; `auto` is 8. Scores do not depend on it.
            max_length: positions of context and continuation; None: the model's, 2048 at most.
            threads: None: one per core.
            preset: how to quantize a model that has no artifact yet.
            others: `device` and `max_batch_size`, which lm-eval passes and which mean nothing here.

        Raises:
            FlashliteError: as `flashlite.load`.
            UsageError: an argument is unknown.
        """
        super().__init__()
        if unknown := sorted(set(others) - {"device", "max_batch_size"}):
            raise UsageError(
                f"--model_args: unknown {', '.join(unknown)}; known are path, batch_size, "
                "max_length, threads and preset"
            )
        self._at_once = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self._model = load(
            path,
            threads=threads,
            preset=preset,
            max_sequences=self._at_once,
            max_sequence_length=max_length,
            prefix_cache=False,  # scores must cost what they cost, and leave nothing behind
        )
        self._tokenizer = self._model.tokenizer
        self._tokens = self._model.artifact.tokens
        most = self._model.max_sequence_length
        self.max_length = most if max_length is not None else min(most, _CONTEXT)
        self._chat = f"\0chat {secrets.token_hex(8)}\0"  # marks messages; no task can write it

    @property
    def batch_size(self) -> int:
        """Answers written at once."""
        return self._at_once

    @property
    def eot_token_id(self) -> int:
        """The first id that ends an answer."""
        return self._tokens.eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is taken as: the BOS, or what ends an answer."""
        return self.eot_token_id if self._tokens.bos is None else self._tokens.bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return f"flashlite {self._model.name} {self._model.artifact.digest}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, after the BOS where the model wants one, or of a chat and a text."""
        if string.startswith(self._chat):
            messages, rest = string[len(self._chat) :].split(self._chat, 1)
            ends, chat = json.loads(messages)
            ids = self._tokenizer.render_chat(chat, add_generation_prompt=ends)
            return [*ids, *self._tokenizer.encode(rest)]
        if add_special_tokens is False:
            return self._tokenizer.encode(string)
        return self._tokenizer.encode_prompt(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages under a mark: they are rendered when they become ids, so that no text of
        theirs can become a control token on the way.
        """
        messages = json.dumps([add_generation_prompt, chat_history])
        return f"{self._chat}{messages}{self._chat}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Says that there is one; it is the model's own, and never shown."""
        return "the template of the artifact" if chat_template else None

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap."""
        totals = []
        for request in tqdm(requests, desc="rolling log-likelihood", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(
                ids, self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            totals.append(sum(score for score, _ in found))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, `batch_size` of them at a time, each before the first of its stop strings."""
        answers: list[str] = []
        bar = tqdm(total=len(requests), desc="generate", disable=disable_tqdm)
        for at in range(0, len(requests), self._at_once):
            several = requests[at : at + self._at_once]
            running = [self._model.submit(*self._prompt(*request.args)) for request in several]
            for request, generation in zip(several, running, strict=True):
                text = "".join(piece.text for piece in self._model.follow(generation))
                self.cache_hook.add_partial("generate_until", request.args, text)
                answers.append(text)
                bar.update()
        bar.close()
        return answers

    def close(self) -> None:
        """Free everything."""
        self._model.close()

    def _prompt(self, context: str, settings: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        wanted = dict(normalize_gen_kwargs(settings, _ANSWER))
        most = min(int(wanted["max_gen_toks"]), self.max_length // 2)
        params = SamplingParams(
            temperature=float(wanted.get("temperature") or 0.0),
            top_p=float(wanted.get("top_p") or 1.0),
            top_k=max(0, int(wanted.get("top_k") or 0)),
            seed=int(wanted.get("seed") or 0),
            stop=tuple(stop for stop in wanted["until"] if stop),
            max_tokens=most,
        )
        return self.tok_encode(context)[-(self.max_length - most) :], params

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **_: Any
    ) -> list[_Scored]:
        """In order of their tokens, so that contexts that begin alike are computed once."""
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda i: pairs[i])
        scores: dict[int, _Scored] = {}
        engine = self._model.scheduler.engine
        with _timeline(engine, self.max_length) as timeline:
            for i in tqdm(order, desc="log-likelihood", disable=disable_tqdm):
                scores[i] = _score(engine, timeline, *pairs[i])
                if (text := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", text, scores[i])
        return [scores[i] for i in range(len(pairs))]

    def _cut(self, context: _Tokens, continuation: _Tokens) -> tuple[_Tokens, _Tokens]:
        """What fits of both: the end of the context, and no more of it than has to go."""
        if len(continuation) >= self.max_length:
            raise UsageError(
                f"a continuation of {len(continuation)} tokens does not fit max_length "
                f"{self.max_length}; raise it in --model_args"
            )
        return context[-(self.max_length - len(continuation)) :], continuation


@contextmanager
def _timeline(engine: Engine, length: int) -> Iterator[Timeline]:
    timeline = engine.new_sequence(length)
    try:
        yield timeline
    finally:
        timeline.release()


def _score(engine: Engine, timeline: Timeline, context: _Tokens, continuation: _Tokens) -> _Scored:
    """Log-likelihood of the continuation, and whether each of its tokens is the likeliest.

    What `timeline` holds of the same beginning is used; logits do not depend on how text was cut.
    """
    ids = np.array([*context, *continuation], np.int32)[:-1]
    first = len(context) - 1
    held = timeline.ids[: min(timeline.length, first)]
    differ = np.flatnonzero(held != ids[: len(held)])
    at = int(differ[0]) if len(differ) else len(held)
    timeline.truncate(at)
    while at < first:
        engine.step([Work(timeline, ids[at : min(at + MAX_BATCH, first)], "none")])
        at = min(at + MAX_BATCH, first)
    total, greedy = 0.0, True
    for row in range(first, len(ids), _ROWS):
        part = ids[row : row + _ROWS]
        logits = engine.step([Work(timeline, part, "all", "all")])
        targets = np.array(continuation[row - first :][: len(part)])
        total += _log_likelihood(logits, targets)
        greedy &= bool((logits.argmax(axis=1) == targets).all())
    return total, greedy


def _log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    totals = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
    return float((shifted[np.arange(len(targets)), targets] - totals).sum())


def main() -> None:
    """lm-eval's command line, which knows `--model flashlite`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
