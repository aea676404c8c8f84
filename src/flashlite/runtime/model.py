"""`load` and `Model`: a language model in one Python object.

import flashlite as fl

with fl.load("smollm2-135m-instruct") as model:
    for piece in model.chat([{"role": "user", "content": "Hi"}], stream=True):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np

from flashlite.artifact.format import TOKENIZER, Artifact
from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.codegen.target import Target
from flashlite.errors import EngineError, UsageError
from flashlite.runtime.ceiling import within
from flashlite.runtime.engine import Engine, default_threads
from flashlite.runtime.grammar import Grammar
from flashlite.runtime.library import MAX_BATCH, PAGE_TOKENS, Library, load_library
from flashlite.runtime.memory import (
    TEMPLATE_BYTES,
    TOKENIZER_GROWTH,
    Ledger,
    MemoryPlan,
    parse_size,
    plan_memory,
    text_limit,
)
from flashlite.runtime.prefixstore import open_store
from flashlite.runtime.prefixtree import prefix_of
from flashlite.runtime.prepare import DEFAULT_MODEL, Progress, compile_artifact, find_artifact
from flashlite.runtime.process import free_memory, resident_bytes, return_unused
from flashlite.runtime.sampling import SamplingParams
from flashlite.runtime.scheduler import FinishReason, Generation, Piece, Scheduler
from flashlite.runtime.speculate import MAX_DRAFT

__all__ = [
    "Answer",
    "Message",
    "Model",
    "load",
    "make_ledger",
    "open_model",
    "plan_model",
    "summarize",
]

Message = Mapping[str, str]

# What `close` keeps of the prefix cache: beginnings that several prompts had, and the last ones
# that only one had, since its next question may be the one after a restart.
_LEAST_KEPT = 64  # tokens
_ONCE_KEPT = 8


@dataclass(frozen=True)
class Answer:
    """A finished generation."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float  # seconds from submission
    tokens_per_second: float  # of the tokens after the first; 0 when there is only one
    logprobs: tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...] = ()
    cached_tokens: int = 0  # of the prompt: found in the prefix cache instead of computed
    drafted_tokens: int = 0  # guessed by speculation, and checked
    accepted_tokens: int = 0  # of these: in the answer


class Model:
    """A compiled model, its tokenizer and its scheduler. Close it, or use it in a `with`."""

    def __init__(
        self,
        artifact: Artifact,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        plan: MemoryPlan,
        limits: ExitStack,
    ) -> None:
        """`limits` is closed with the model."""
        self.artifact = artifact
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.plan = plan
        self._limits = limits
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.artifact.name

    @property
    def max_sequence_length(self) -> int:
        """Positions one conversation may hold, prompt and answer together."""
        return self.scheduler.max_tokens

    @property
    def memory(self) -> dict[str, Any]:
        """Bytes: what the plan allows by name, and what the process holds now and held at most."""
        pool = self.scheduler.engine.pool
        return {
            **self.plan.to_json(),
            "resident": resident_bytes(),
            "peak": resident_bytes("VmHWM"),
            "kv_pages": pool.n_pages,
            "kv_pages_free": pool.free,
        }

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **settings: Any
    ) -> Answer: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **settings: Any
    ) -> Iterator[str]: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **settings: Any
    ) -> Answer | Iterator[str]:
        """Answer a conversation.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]
            stream: yield pieces of text as they come instead of returning an `Answer`.
            settings: fields of `SamplingParams`.

        Raises:
            TemplateError: the model is a base model, or its template refuses these messages.
            ForgeryError: a message would have become a control token.
            ContextOverflow: FL-405.
            UsageError: a setting is unknown or outside its range.
        """
        return self._answer(self.tokenizer.render_chat(messages), stream, settings)

    @overload
    def generate(
        self, prompt: str, *, stream: Literal[False] = False, **settings: Any
    ) -> Answer: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **settings: Any) -> Iterator[str]: ...
    def generate(
        self, prompt: str, *, stream: bool = False, **settings: Any
    ) -> Answer | Iterator[str]:
        """Continue a text as it stands, without a chat template. Otherwise as `chat`."""
        return self._answer(self.tokenizer.encode_prompt(prompt), stream, settings)

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, grammar: Grammar | None = None
    ) -> Generation:
        """Queue token ids for generation; `follow` brings them on their way.

        Args:
            grammar: what the answer must be: `compile_grammar(spec, model.tokenizer)`.

        Raises:
            ContextOverflow, UsageError: as `chat`.
        """
        with self._lock:
            return self.scheduler.submit(prompt, params, grammar)

    def follow(self, generation: Generation) -> Iterator[Piece]:
        """The pieces of a generation as they come; closing the iterator cancels it.

        The scheduler is driven from the caller's thread, so that Ctrl-C stops within one step.

        Raises:
            EngineError: the grammar leaves no next token.
        """
        try:
            while True:
                while generation.pieces:
                    yield generation.pieces.popleft()
                if generation.error is not None:
                    raise generation.error
                if generation.finish_reason is not None:
                    return
                with self._lock:
                    self.scheduler.step()
        finally:
            with self._lock:
                self.scheduler.cancel(generation)

    def save_prefix(self, beginning: str | Sequence[Message]) -> int:
        """Compute the beginning of prompts to come and keep it on disk, past a restart.

        Args:
            beginning: what `generate` prompts will begin with, or the first messages of chats.

        Returns:
            Tokens kept: whole pages of 32. 0 where the prefix cache is off or the disk refuses.

        Raises:
            FlashliteError: as `chat`.
        """
        if isinstance(beginning, str):
            ids = self.tokenizer.encode_prompt(beginning)
        else:
            ids = self.tokenizer.render_chat(beginning, add_generation_prompt=False)
        list(self.follow(self.submit(ids, SamplingParams(max_tokens=1))))
        engine, store = self.scheduler.engine, self.scheduler.store
        with self._lock:
            path = engine.pool.tree.find(np.asarray(ids, np.int32).tobytes())
            if store is None or not path:
                return 0
            return store.save(prefix_of(path), engine.read_page) * PAGE_TOKENS

    def close(self) -> None:
        """Keep the beginnings of prompts for the next time and release the engine; calling it
        again does nothing.
        """
        engine, store = self.scheduler.engine, self.scheduler.store
        with self._lock:
            if store is not None and engine.is_open:
                frequent = engine.pool.tree.frequent(_LEAST_KEPT, _ONCE_KEPT)
                store.save_latest(frequent, engine.read_page)
            engine.close()
        self._limits.close()

    def _answer(
        self, prompt: Sequence[int], stream: bool, settings: Mapping[str, Any]
    ) -> Answer | Iterator[str]:
        try:
            params = SamplingParams(**settings)
        except TypeError:
            known = SamplingParams.__dataclass_fields__
            wrong = ", ".join(sorted(set(settings) - set(known)))
            raise UsageError(f"unknown setting {wrong}; known: {', '.join(known)}") from None
        generation = self.submit(prompt, params)
        if stream:
            return (piece.text for piece in self.follow(generation) if piece.text)
        pieces = list(self.follow(generation))
        return summarize(generation, pieces)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def summarize(generation: Generation, pieces: Sequence[Piece]) -> Answer:
    """The `Answer` of a finished generation and the pieces it gave.

    Raises:
        EngineError: it has not finished.
    """
    if generation.finish_reason is None:
        raise EngineError("the generation has not finished")
    n = len(generation.generated)
    first, last = generation.first_token, generation.last_token
    decode = (last - first) if first is not None and last is not None else 0.0
    return Answer(
        text="".join(piece.text for piece in pieces),
        finish_reason=generation.finish_reason,
        prompt_tokens=len(generation.prompt),
        completion_tokens=n,
        time_to_first_token=first - generation.submitted if first is not None else 0.0,
        tokens_per_second=(n - 1) / decode if decode > 0 else 0.0,
        logprobs=tuple(
            (p.drawn.token, p.drawn.logprob, p.drawn.top) for p in pieces if p.drawn is not None
        )
        if generation.params.logprobs is not None
        else (),
        cached_tokens=generation.cached_tokens,
        drafted_tokens=generation.drafted_tokens,
        accepted_tokens=generation.accepted_tokens,
    )


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    max_mem: str | int | None = None,
    max_sequence_length: int | None = None,
    enable_integrity_check: bool = True,
    threads: int | None = None,
    preset: str = "import",
    max_sequences: int = 1,
    prefix_cache: bool = True,
    speculate: bool = True,
    exact_head: bool = False,
    reserved: Mapping[str, int] | None = None,
    accept_license: bool = False,
    offline: bool = False,
    isa: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Make a model ready: pull, quantize and compile what is missing, then open it.

    Args:
        model: a known name, `hf:ORG/NAME`, a checkpoint's path, or an artifact's directory.
        max_mem: `2GB`, `1.5GiB` or bytes that this process keeps within: the context shrinks to
            fit, or loading is refused. On Linux its soft RLIMIT_DATA is lowered until `close`, so
            that what would go beyond is a MemoryError. None: the KV cache takes at most a quarter
            of the free memory.
        max_sequence_length: positions of one conversation; None: the model's own context.
        enable_integrity_check: compare every file with the manifest before use.
        threads: None: one per core this process may use.
        preset: `import`, `hybrid`, `q8`, `q6`, `q5` or `q4`, when the artifact has to be made.
        max_sequences: conversations that run at once.
        prefix_cache: reuse what prompts that begin equally stored, also after a restart.
        speculate: check guessed tokens, where that is faster; the answer stays the same.
        exact_head: compute every logit, also where the artifact has a split head.
        reserved: bytes that other parts of the process will take, by name: `max_mem` leaves room
            for them.
        accept_license: for models whose licence asks for it.
        offline: use only what is on this machine.
        isa: `amx`, `avx512`, `avx2` or `plain`; None: the best this CPU runs.
        progress: called with (stage, done, total) while something long runs.

    Raises:
        FlashliteError: one line that says what failed, the limit, and the way out.
    """
    from flashlite.codegen.target import host_target

    ceiling = None if max_mem is None else parse_size(max_mem)
    with within(ceiling, "found or made", default_threads()):
        artifact = find_artifact(
            str(model),
            preset=preset,
            check=enable_integrity_check,
            accept_license=accept_license,
            offline=offline,
            progress=progress,
        )
    return open_model(
        artifact,
        host_target(isa),
        max_mem=max_mem,
        max_sequence_length=max_sequence_length,
        enable_integrity_check=enable_integrity_check,
        threads=threads,
        max_sequences=max_sequences,
        prefix_cache=prefix_cache,
        speculate=speculate,
        exact_head=exact_head,
        reserved=reserved,
    )


def open_model(
    artifact: Artifact,
    target: Target,
    *,
    max_mem: str | int | None = None,
    max_sequence_length: int | None = None,
    enable_integrity_check: bool = True,
    threads: int | None = None,
    max_sequences: int = 1,
    prefix_cache: bool = True,
    speculate: bool = True,
    exact_head: bool = False,
    reserved: Mapping[str, int] | None = None,
) -> Model:
    """Compile and open an artifact; arguments as `load`.

    Raises:
        FlashliteError: as `load`.
    """
    ceiling = None if max_mem is None else parse_size(max_mem)
    threads = default_threads() if threads is None else threads
    draft = MAX_DRAFT if speculate else 0
    with ExitStack() as limits:
        limits.enter_context(within(ceiling, "opened", threads))
        with ThreadPoolExecutor(1) as beside:
            # Weights are read beside the rest; under a ceiling not before they fit.
            read = functools.partial(load_weights, artifact, verify=enable_integrity_check)
            reading = beside.submit(read) if ceiling is None else None
            library, tokenizer, plan = plan_model(
                artifact,
                target,
                ceiling=ceiling,
                wanted=max_sequence_length,
                threads=threads,
                max_sequences=max_sequences,
                draft=draft,
                reserved=reserved,
                reading=reading,
            )
            weights = reading.result() if reading else read()
        engine = Engine(
            library,
            weights,
            max_tokens=plan.arena,
            threads=threads,
            max_sequences=max_sequences,
            max_draft=draft,
            exact_head=exact_head,
        )
        scheduler = Scheduler(
            engine,
            tokenizer,
            max_tokens=plan.context,
            prefix_cache=prefix_cache,
            store=open_store(artifact, target.isa, engine.page_bytes) if prefix_cache else None,
            speculate=speculate,
            request_bytes=None if ceiling is None else plan.ledger.request_bytes(plan.context),
        )
        return Model(artifact, tokenizer, scheduler, plan, limits.pop_all())


def plan_model(
    artifact: Artifact,
    target: Target,
    *,
    ceiling: int | None,
    wanted: int | None = None,
    threads: int | None = None,
    max_sequences: int = 1,
    draft: int = 0,
    reserved: Mapping[str, int] | None = None,
    reading: Future[Any] | None = None,
) -> tuple[Library, Tokenizer, MemoryPlan]:
    """Load all of a model but its weights, so that what it takes is known before they are read.

    Args:
        ceiling: bytes; None: none.
        wanted: `max_sequence_length`.
        threads, max_sequences, reserved: as `load`.
        draft: rows of logits beyond one per sequence, for guessed tokens.
        reading: of the weights, beside; it is waited for before memory is measured.

    Raises:
        MemoryCeiling: it does not fit; every term is named.
        FlashliteError: as `load`.
    """
    threads = default_threads() if threads is None else threads
    if not 1 <= max_sequences <= MAX_BATCH:
        raise UsageError(f"max_sequences is {max_sequences}, allowed 1 to {MAX_BATCH}")
    spec, free = artifact.spec, free_memory()
    library = load_library(compile_artifact(artifact, target))

    def plan(building: int) -> MemoryPlan:
        ledger = make_ledger(artifact, library, threads, max_sequences, building, reserved, draft)
        return plan_memory(
            ledger, context=spec.max_context, wanted=wanted, ceiling=ceiling, free=free
        )

    building = artifact.manifest.files[TOKENIZER].size * TOKENIZER_GROWTH + TEMPLATE_BYTES
    if ceiling is not None and resident_bytes() + building > ceiling:
        plan(building)  # raises: to build the vocabulary would go beyond the ceiling already
    tokenizer = _tokenizer(artifact)
    if ceiling is not None:
        tokenizer = tokenizer.with_limit(text_limit(wanted or spec.max_context))
    held = 0
    if reading is not None:
        reading.result()
        held = artifact.weights_size
    return_unused()
    chosen = plan(-held)
    if ceiling is not None:
        tokenizer = tokenizer.with_limit(text_limit(chosen.context))
    return library, tokenizer, chosen


_parsed: dict[tuple[str, str], Tokenizer] = {}


def _tokenizer(artifact: Artifact) -> Tokenizer:
    """The last one parsed is kept: a model that is opened again is open twice as fast."""
    key = (artifact.digest, artifact.name)
    if key not in _parsed:
        _parsed.clear()
        _parsed[key] = Tokenizer(load_texts(artifact), name=artifact.name)
    return _parsed[key]


def make_ledger(
    artifact: Artifact,
    library: Library,
    threads: int,
    max_sequences: int,
    building: int = 0,
    reserved: Mapping[str, int] | None = None,
    draft: int = 0,
) -> Ledger:
    """What the model will hold, before its weights and buffers are allocated.

    Args:
        building: bytes of `runtime` that the process does not hold yet; below 0: bytes that it
            holds and another term counts.
        reserved: what other parts of it will take, by name.
        draft: rows of logits beyond one per sequence.
    """
    info = library.describe(threads)
    vocab = int(info.vocab_size)
    return Ledger(
        weights=artifact.weights_size - artifact.screen_bytes,
        screen=artifact.screen_bytes,
        scratch=int(info.scratch_bytes),
        logits=(max_sequences + draft) * vocab * 4,
        sampling=vocab * 8,
        runtime=resident_bytes() + building,
        page_bytes=int(info.page_bytes),
        page_tokens=int(info.page_tokens),
        sequences=max_sequences,
        reserved=dict(reserved or {}),
    )
