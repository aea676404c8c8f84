"""What runs next: requests in, one engine step at a time, pieces of text out.

    submit -> waiting -> (pages reserved) running: prefill in chunks -> decode -> finished

Each step takes the last tokens of every decoding request, then fills what is left of the batch
with prompt tokens of those still in prefill, at most `CHUNK_BESIDE_DECODE` of them while others
decode, so that a long prompt does not freeze the others. What others have stored of a prompt, or a
file holds, is not computed. While nothing is in prefill, a decoding request may add a draft.

Clients take turns: at being admitted, and at the prompt tokens of a step.

Where a grammar leaves one text only, its tokens are not drawn: they follow the drawn one into the
next step, which computes them together. The answer is that of single steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import ContextOverflow, EngineError, MemoryCeiling, UsageError
from flashlite.runtime.engine import Engine, Sequence, Work
from flashlite.runtime.generation import FinishReason, Generation, Piece
from flashlite.runtime.grammar import Grammar, dead_end
from flashlite.runtime.library import MAX_BATCH, PAGE_TOKENS
from flashlite.runtime.memory import LOGPROB_BYTES, TOKEN_BYTES, format_size
from flashlite.runtime.prefixstore import PrefixStore
from flashlite.runtime.queue import FairQueue
from flashlite.runtime.sampler import Drawn, Sampler
from flashlite.runtime.sampling import SamplingParams, StopStrings
from flashlite.runtime.speculate import DRAFT_BESIDE, MAX_DECODING, MAX_DRAFT, Drafter, Pace

__all__ = ["FinishReason", "Generation", "Piece", "Scheduler"]

CHUNK_BESIDE_DECODE = 64


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
        self._waiting: FairQueue[Generation] = FairQueue()
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

    def submit(
        self,
        prompt: Seq[int],
        params: SamplingParams,
        grammar: Grammar | None = None,
        *,
        client: str = "",
    ) -> Generation:
        """Queue a request: `prepare` and `enqueue`."""
        generation = self.prepare(prompt, params, grammar, client=client)
        self.enqueue(generation)
        return generation

    def enqueue(self, generation: Generation) -> None:
        """It runs when a sequence and pages are free."""
        self._waiting.push(generation.client, generation)

    def prepare(
        self,
        prompt: Seq[int],
        params: SamplingParams,
        grammar: Grammar | None = None,
        *,
        client: str = "",
    ) -> Generation:
        """Check a request and make its state; `enqueue` queues it.

        Args:
            grammar: what the answer must be, compiled for this model's vocabulary.
                Log-probabilities are those among the tokens it allows; a forced token, which no
                row of logits was asked for, has 0 and no alternatives.
            client: who asks; clients take turns.

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
        guide = None if grammar is None else grammar.start()
        return Generation(
            prompt=ids,
            params=params,
            room=room,
            sampler=Sampler(self.engine.library, params, ids, room, self._scratch),
            decoder=self.tokenizer.stream(),
            stops=StopStrings(params.stop),
            client=client,
            guide=guide,
            opening=() if guide is None else tuple(guide.force()[:room]),
            submitted=time.perf_counter(),
        )

    def cancel(self, generation: Generation, reason: FinishReason = "cancelled") -> None:
        """Stop a request before the next step; a finished one stays as it is."""
        if generation.finish_reason is not None:
            return
        self._waiting.discard(generation.client, generation)
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
            rows = {"none": 0, "last": 1, "all": len(work.ids)}[work.logits]
            pending = generation.pending
            if rows == 0:
                generation.pending = pending[len(work.ids) :] if pending else None
            elif rows > 1:
                self._check_draft(generation, work, logits[row : row + rows])
            else:
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
        """Clients in turn; a request starts when its whole length has pages."""
        while self._waiting and len(self._running) < self.engine.max_sequences:
            head = self._waiting.head()
            tokens = len(head.prompt) + head.room
            try:
                sequence = self.engine.new_sequence(
                    tokens, head.prompt if self.prefix_cache else None
                )
            except MemoryCeiling:
                if self._running:  # they will give pages back
                    return
                raise
            self._waiting.pop()
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
        decoding = [g for g in self._running if g.pending is not None]
        drafts = self.speculate and len(decoding) == len(self._running) <= MAX_DECODING
        left = MAX_BATCH - len(decoding)  # tokens beyond one of each
        batch: list[tuple[Generation, Work]] = []
        for generation in decoding:
            work = self._plan_decode(generation, len(decoding) - 1 if drafts else None, left)
            left -= len(work.ids) - 1
            batch.append((generation, work))
        if decoding:
            left = min(left, CHUNK_BESIDE_DECODE)
        lines: dict[str, list[Generation]] = {}  # those in prefill, by client
        for generation in self._running:
            if generation.pending is None:
                lines.setdefault(generation.client, []).append(generation)
        # Shortest first: what one client leaves of its share goes to the next.
        for turn, line in enumerate(sorted(lines.values(), key=_tokens_left)):
            share = -(-left // (len(lines) - turn))
            for generation in line:
                if share <= 0:
                    break
                work = self._plan_prefill(generation, share)
                batch.append((generation, work))
                share -= len(work.ids)
                left -= len(work.ids)
        return batch

    def _plan_decode(self, generation: Generation, beside: int | None, left: int) -> Work:
        """The pending tokens, and a draft after a single one.

        Args:
            beside: other requests in the step; None: no drafts.
            left: tokens there is room for beyond one.
        """
        pending, sequence = generation.pending, generation.sequence
        if pending is None or sequence is None:
            raise EngineError("a request without a drawn token cannot decode")
        ids = pending[: left + 1]
        if len(ids) < len(pending):
            return Work(sequence, ids, "none")
        draft = [] if beside is None or len(ids) > 1 else self._draft(generation, beside)
        return Work(sequence, [*ids, *draft], "all" if draft else "last", generation.need)

    def _plan_prefill(self, generation: Generation, most: int) -> Work:
        """The next prompt tokens; the last ones together with what the grammar puts first."""
        sequence, prompt = generation.sequence, generation.prompt
        if sequence is None:
            raise EngineError("a request without pages cannot be computed")
        done, last = sequence.length, len(prompt) + len(generation.opening)
        end = min(done + most, last)
        opening = generation.opening[max(done - len(prompt), 0) : max(end - len(prompt), 0)]
        ids = [*prompt[done:end].tolist(), *opening]
        return Work(sequence, ids, "last" if end == last else "none", generation.need)

    def _draft(self, generation: Generation, beside: int) -> list[int]:
        """What to check beside the pending token; never more than the answer has room for."""
        if generation.drafter is None:
            ids = [*generation.prompt.tolist(), *generation.generated]
            generation.drafter = Drafter(ids)
        limit = generation.room - len(generation.generated) - 1
        most = DRAFT_BESIDE if beside else MAX_DRAFT
        return generation.drafter.propose(self._pace, min(limit, most), beside)

    def _check_draft(self, generation: Generation, work: Work, logits: NDArray[np.float32]) -> None:
        """Draw row by row, as single steps would have, until the answer is not the draft's."""
        sequence, drafter, draft = work.sequence, generation.drafter, list(work.ids[1:])
        sequence.truncate(sequence.length - len(draft))
        accepted = 0
        while True:
            self._advance(generation, logits[accepted])
            pending = generation.pending or []
            if generation.finish_reason is not None:
                break
            n = _agreeing(pending, draft[accepted:])
            accepted += n
            sequence.length += n  # the accepted tokens were stored by the same step
            if n < len(pending):
                generation.pending = pending[n:]
                break
        generation.drafted_tokens += len(draft)
        generation.accepted_tokens += accepted
        if drafter is not None:
            drafter.learn(len(draft), accepted)

    def _advance(self, generation: Generation, logits: NDArray[np.float32]) -> None:
        """Draw the next token, turn it into text, and add what the grammar forces."""
        guide = generation.guide
        if generation.first_token is None:
            self._force(generation, generation.opening)  # computed with the prompt
        if generation.finish_reason is not None:
            return
        generation.pending = []
        forced: list[int] = []
        try:
            if guide is not None:
                guide.allow(logits)
            drawn = generation.sampler.draw(logits)
            if guide is not None and drawn.token not in self._ends:
                forced = guide.accept(drawn.token)
        except EngineError as error:  # this request's alone: the engine has done its step
            generation.error = error if guide is None else dead_end(str(error))
            self._finish(generation, "error", "")
            return
        self._append(generation, drawn)
        self._force(generation, forced)

    def _force(self, generation: Generation, tokens: Seq[int]) -> None:
        """Add what the grammar leaves no choice about: tokens, and the end."""
        for token in tokens:
            if generation.finish_reason is not None:
                return
            generation.forced_tokens += 1
            self._append(generation, generation.sampler.note(token))
        guide = generation.guide
        if guide is not None and guide.finished and generation.finish_reason is None:
            self._finish(generation, "stop", "")

    def _append(self, generation: Generation, drawn: Drawn) -> None:
        """Add a token to the answer, which it may end."""
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
            if generation.pending is not None:
                generation.pending.append(drawn.token)
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


def _tokens_left(line: Seq[Generation]) -> int:
    """Of the prompts of one client."""
    return sum(len(generation.prompt) - generation.prefilled for generation in line)


def _agreeing(one: Seq[int], other: Seq[int]) -> int:
    """How many tokens both begin with."""
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n
