"""What runs next: requests in, one engine step at a time, pieces of text out.

    submit -> waiting -> (pages reserved) running: prefill in chunks -> decode -> finished

Each step takes one token of every decoding request, then fills what is left of the batch with
prompt tokens of those still in prefill, at most `CHUNK_BESIDE_DECODE` of them while others decode,
so that a long prompt does not freeze the others. What others have stored of a prompt, or a file
holds, is not computed. While nothing is in prefill, a decoding request may add a draft.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.tokenizer import StreamDecoder, Tokenizer
from flashlite.errors import ContextOverflow, MemoryCeiling, UsageError
from flashlite.runtime.engine import Engine, Sequence, Work
from flashlite.runtime.library import MAX_BATCH, PAGE_TOKENS
from flashlite.runtime.memory import LOGPROB_BYTES, TOKEN_BYTES, format_size
from flashlite.runtime.prefixstore import PrefixStore
from flashlite.runtime.sampler import Drawn, Sampler
from flashlite.runtime.sampling import SamplingParams, StopStrings
from flashlite.runtime.speculate import DRAFT_BESIDE, MAX_DECODING, MAX_DRAFT, Drafter, Pace

__all__ = ["FinishReason", "Generation", "Piece", "Scheduler"]

CHUNK_BESIDE_DECODE = 64

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


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
    sequence: Sequence | None = None
    pending: int | None = None  # drawn, not yet in the KV cache
    drafter: Drafter | None = None  # from its first decode step, when drafts are allowed
    generated: list[int] = field(default_factory=list)
    pieces: deque[Piece] = field(default_factory=deque)  # for the caller to take
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0  # of the prompt: found stored instead of computed
    drafted_tokens: int = 0  # guessed, and checked in a step
    accepted_tokens: int = 0  # of these: as the sampler drew them
    submitted: float = 0.0  # seconds of time.perf_counter
    first_token: float | None = None
    last_token: float | None = None

    @property
    def prefilled(self) -> int:
        """Prompt tokens in the KV cache."""
        return 0 if self.sequence is None else min(self.sequence.length, len(self.prompt))


class Scheduler:
    """Continuous batching over one engine; call `step` until `idle`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        prefix_cache: bool = False,
        store: PrefixStore | None = None,
        speculate: bool = False,
        request_bytes: int | None = None,
    ) -> None:
        """Schedule for one engine.

        Args:
            max_tokens: positions one sequence may hold, prompt and answer together.
            prefix_cache: requests share the pages of equal beginnings.
            store: with `prefix_cache`, beginnings that are looked for on disk too.
            speculate: draft where it is faster.
            request_bytes: what one request may hold beside the engine; None: no limit.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.prefix_cache = prefix_cache
        self.store = store
        self.speculate = speculate
        self.request_bytes = request_bytes
        self._pace = Pace()
        self._ends = frozenset(tokenizer.tokens.eos)
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._scratch = np.empty(engine.vocab_size, np.uint64)  # one draw at a time uses it

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._running

    @property
    def load(self) -> tuple[int, int]:
        """Requests (running, waiting)."""
        return len(self._running), len(self._waiting)

    def submit(self, prompt: Seq[int], params: SamplingParams) -> Generation:
        """Queue a request: `prepare` and `enqueue`."""
        generation = self.prepare(prompt, params)
        self.enqueue(generation)
        return generation

    def enqueue(self, generation: Generation) -> None:
        """It runs when a sequence and pages are free."""
        self._waiting.append(generation)

    def prepare(self, prompt: Seq[int], params: SamplingParams) -> Generation:
        """Check a request and make its state; `enqueue` queues it.

        Raises:
            UsageError: the prompt is empty or a setting is outside its range.
            ContextOverflow: FL-405, the prompt leaves no room for a single token.
            MemoryCeiling: its log-probabilities would take more than a request may hold.
        """
        params.check()
        if not len(prompt):
            raise UsageError("the prompt is empty: it has no tokens; give at least one character")
        if len(prompt) >= self.max_tokens:
            raise ContextOverflow(len(prompt) + 1, self.max_tokens)
        room = self.max_tokens - len(prompt)
        if params.max_tokens is not None:
            room = min(room, params.max_tokens)
        self._check_size(len(prompt), room, params.logprobs or 0)
        ids = np.asarray(prompt, np.int32)
        return Generation(
            prompt=ids,
            params=params,
            room=room,
            sampler=Sampler(self.engine.library, params, ids, room, self._scratch),
            decoder=self.tokenizer.stream(),
            stops=StopStrings(params.stop),
            submitted=time.perf_counter(),
        )

    def cancel(self, generation: Generation, reason: FinishReason = "cancelled") -> None:
        """Stop a request before the next step; a finished one stays as it is."""
        if generation.finish_reason is not None:
            return
        if generation in self._waiting:
            self._waiting.remove(generation)
        self._finish(generation, reason, "")

    def step(self) -> None:
        """Run one engine step and append to the pieces of the requests it moved."""
        self._admit()
        batch = self._plan()
        if not batch:
            return
        begun = time.perf_counter()
        logits = self.engine.step([work for _, work in batch])
        if all(generation.pending is not None for generation, _ in batch):  # nothing but decoding
            tokens = sum(len(work.ids) for _, work in batch)
            self._pace.note(len(batch), tokens, time.perf_counter() - begun)
        else:
            self._pace.restart()
        row = 0
        for generation, work in batch:
            drafted = len(work.ids) - 1 if work.logits == "all" else 0
            rows = 0 if work.logits == "none" else drafted + 1
            generation.pending = None
            if drafted:
                self._check_draft(generation, work, logits[row : row + rows])
            elif rows:
                self._advance(generation, logits[row])
            row += rows
        for generation in self._running:
            if generation.sequence is not None:
                generation.cached_tokens += generation.sequence.share()

    def _check_size(self, prompt: int, room: int, logprobs: int) -> None:
        size = (prompt + room) * TOKEN_BYTES + room * logprobs * LOGPROB_BYTES
        if self.request_bytes is not None and size > self.request_bytes:
            raise MemoryCeiling(
                f"{room} tokens with {logprobs} logprobs each would take {format_size(size)}, and "
                f"max_mem leaves {format_size(self.request_bytes)} to a request; lower max_tokens "
                "or logprobs, or raise max_mem"
            )

    def _admit(self) -> None:
        """First come, first served; a request starts when its whole length has pages."""
        while self._waiting and len(self._running) < self.engine.max_sequences:
            head = self._waiting[0]
            tokens = len(head.prompt) + head.room
            try:
                sequence = self.engine.new_sequence(
                    tokens, head.prompt if self.prefix_cache else None
                )
            except MemoryCeiling:
                if self._running:  # they will give pages back
                    return
                raise
            self._waiting.popleft()
            self._running.append(head)
            head.sequence = sequence
            self._restore(sequence)
            head.cached_tokens = sequence.length

    def _restore(self, sequence: Sequence) -> None:
        """Fill the sequence's pages with what a file holds beyond what is in the arena."""
        if self.store is None or sequence.length >= sequence.shareable:
            return
        found = self.store.find(sequence.ids[: sequence.shareable].tobytes())
        first, pages = sequence.table.shared, sequence.table.ids
        if found is None or found[1] <= first:
            return
        saved, end = found

        def place(index: int, page: NDArray[np.uint8]) -> None:
            self.engine.write_page(int(pages[index]), page)

        if self.store.read(saved, first, end, place):
            sequence.length = end * PAGE_TOKENS
            sequence.share()

    def _plan(self) -> list[tuple[Generation, Work]]:
        batch: list[tuple[Generation, Work]] = []
        n_decoding = sum(g.pending is not None for g in self._running)
        drafts = self.speculate and n_decoding == len(self._running) <= MAX_DECODING
        for generation in self._running:
            if generation.pending is not None and generation.sequence is not None:
                draft = self._draft(generation, n_decoding - 1) if drafts else []
                ids = [generation.pending, *draft]
                need = generation.params.need
                work = Work(generation.sequence, ids, "all" if draft else "last", need)
                batch.append((generation, work))
        left = min(MAX_BATCH - len(batch), CHUNK_BESIDE_DECODE if batch else MAX_BATCH)
        for generation in self._running:
            done = generation.prefilled
            if left <= 0 or done == len(generation.prompt) or generation.sequence is None:
                continue
            chunk = generation.prompt[done : done + left]
            ends = done + len(chunk) == len(generation.prompt)
            need = generation.params.need
            work = Work(generation.sequence, chunk, "last" if ends else "none", need)
            batch.append((generation, work))
            left -= len(chunk)
        return batch

    def _draft(self, generation: Generation, beside: int) -> list[int]:
        """What to check beside the pending token; never more than the answer has room for."""
        if generation.drafter is None:
            ids = [*generation.prompt.tolist(), *generation.generated]
            generation.drafter = Drafter(ids)
        limit = generation.room - len(generation.generated) - 1
        most = DRAFT_BESIDE if beside else MAX_DRAFT
        return generation.drafter.propose(self._pace, min(limit, most), beside)

    def _check_draft(self, generation: Generation, work: Work, logits: NDArray[np.float32]) -> None:
        """Draw row by row, as single steps would have, until a draw is not the draft's token."""
        sequence, drafter, draft = work.sequence, generation.drafter, work.ids[1:]
        sequence.truncate(sequence.length - len(draft))
        accepted = 0
        for row in logits:
            self._advance(generation, row)
            if generation.finish_reason is not None or accepted == len(draft):
                break
            if generation.pending != draft[accepted]:
                break
            accepted += 1
            sequence.length += 1  # the accepted token was stored by the same step
        generation.drafted_tokens += len(draft)
        generation.accepted_tokens += accepted
        if drafter is not None:
            drafter.learn(len(draft), accepted)

    def _advance(self, generation: Generation, logits: NDArray[np.float32]) -> None:
        """Draw the next token and turn it into text."""
        drawn = generation.sampler.draw(logits)
        now = time.perf_counter()
        generation.last_token = now
        if generation.first_token is None:
            generation.first_token = now
        generation.generated.append(drawn.token)
        if generation.drafter is not None:
            generation.drafter.push(drawn.token)
        if drawn.token in self._ends:
            self._finish(generation, "stop", "", drawn)
            return
        text = generation.stops.push(generation.decoder.push(drawn.token))
        if generation.stops.stopped:
            self._finish(generation, "stop", text, drawn)
        elif len(generation.generated) >= generation.room:
            self._finish(generation, "length", text, drawn)
        else:
            generation.pending = drawn.token
            generation.pieces.append(Piece(text, drawn))

    def _finish(
        self, generation: Generation, reason: FinishReason, text: str, drawn: Drawn | None = None
    ) -> None:
        """Flush held-back text, release the pages, close the stream of pieces."""
        if not generation.stops.stopped:
            text += generation.stops.push(generation.decoder.finish())
        if not generation.stops.stopped:
            text += generation.stops.finish()
        generation.finish_reason = reason
        generation.pieces.append(Piece(text, drawn, reason))
        if generation in self._running:
            self._running.remove(generation)
        if generation.sequence is not None:
            generation.sequence.share()
            generation.sequence.release()
