"""`load_encoder` and `Encoder`: a text encoder in one Python object.

import flashlite as fl

with fl.load_encoder("all-minilm-l6-v2") as encoder:
    vectors = encoder.embed(["A man is eating.", "Someone eats."])  # float32 (2, 384)
    print(vectors[0] @ vectors[1])  # cosine: the vectors have length 1
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.artifact.format import TOKENIZER, Artifact
from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.codegen.target import Target, host_target
from flashlite.errors import ArtifactError, ContextOverflow, MemoryCeiling, UsageError
from flashlite.runtime.ceiling import within
from flashlite.runtime.encoder_engine import PAGES, EncoderEngine
from flashlite.runtime.engine import default_threads
from flashlite.runtime.library import Library, load_library
from flashlite.runtime.memory import (
    TEXT_BYTES,
    TOKENIZER_GROWTH,
    format_size,
    parse_size,
    text_limit,
)
from flashlite.runtime.prepare import DEFAULT_ENCODER, Progress, compile_artifact, find_artifact
from flashlite.runtime.process import resident_bytes, return_unused

__all__ = ["Encoder", "Tokenized", "load_encoder", "open_encoder"]

_TOGETHER = 1024  # texts tokenized at once
_ID_BYTES = 1 << 21  # ids of so many texts, and what a step is made of
_MARGIN = 8 << 20  # code read on first use, fragments of the heap


@dataclass(frozen=True)
class Tokenized:
    """Texts as ids, ready for `Encoder.embed_ids`."""

    ids: list[list[int]]
    lengths: tuple[int, ...]  # tokens of each whole text
    truncated: tuple[int, ...]  # texts that were cut, by index


class Encoder:
    """A compiled encoder and its tokenizer. Close it, or use it in a `with`.

    It may be used from several threads; one text batch is computed at a time.
    """

    def __init__(
        self,
        artifact: Artifact,
        tokenizer: Tokenizer,
        engine: EncoderEngine,
        terms: Mapping[str, int],
        limits: ExitStack,
    ) -> None:
        """`limits` is closed with the encoder."""
        self.artifact = artifact
        self.tokenizer = tokenizer
        self.engine = engine
        self._terms = dict(terms)
        self._limits = limits
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.artifact.name

    @property
    def dimension(self) -> int:
        """Numbers in one vector."""
        return self.artifact.encoder.d_model

    @property
    def max_length(self) -> int:
        """Tokens of one text, what the model puts around it among them."""
        return self.artifact.encoder.max_context

    @property
    def memory(self) -> dict[str, Any]:
        """Bytes: what was planned by name, and what the process holds now and held at most."""
        return {
            "total": sum(self._terms.values()),
            "terms": dict(self._terms),
            "resident": resident_bytes(),
            "peak": resident_bytes("VmHWM"),
        }

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """The vectors of texts, float32 (texts, dimension), each of length 1.

        A text gives the same bits alone and beside others, with any number of threads and on any
        CPU. An empty text has a vector too.

        Args:
            texts: one or more; what a model wants in front ("query: " for E5) is the caller's.
            truncate: cut texts that are longer than `max_length`, with a warning that says how
                many.

        Raises:
            ContextOverflow: FL-405, a text is longer than `max_length` and `truncate` is False.
            TokenizerError: a text holds half of a surrogate pair.
            UsageError: `texts` is one string, or holds something else than strings.
            EngineError: the encoder is closed.
        """
        found = self.tokenize(texts, truncate=truncate)
        if found.truncated:
            longest = max(found.lengths[i] for i in found.truncated)
            warnings.warn(
                f"{len(found.truncated)} of {len(texts)} texts were cut to {self.max_length} "
                f"tokens, the longest from {longest}",
                stacklevel=2,
            )
        return self.embed_ids(found.ids)

    def tokenize(self, texts: Sequence[str], *, truncate: bool = False) -> Tokenized:
        """The ids of whole texts, with what the model puts around them; as `embed`.

        Raises:
            ContextOverflow, TokenizerError, UsageError: as `embed`.
        """
        if isinstance(texts, str):
            raise UsageError("texts is one string; put it into a list: embed([text])")
        begin, end = _frame(self.artifact)
        room = self.max_length - len(begin) - len(end)
        ids: list[list[int]] = []
        lengths: list[int] = []
        truncated: list[int] = []
        for start in range(0, len(texts), _TOGETHER):
            part = texts[start : start + _TOGETHER]
            for text in part:
                if not isinstance(text, str):
                    raise UsageError(f"texts hold a {type(text).__name__}, must be strings")
            for plain in self.tokenizer.encode_batch(part, parallel=self.engine.threads > 1):
                length = len(plain) + len(begin) + len(end)
                if len(plain) > room:
                    if not truncate:
                        raise ContextOverflow(
                            length,
                            self.max_length,
                            f"text {len(ids)} is too long: split it, or cut it with truncate=True",
                        )
                    truncated.append(len(ids))
                    plain = plain[:room]
                lengths.append(length)
                ids.append([*begin, *plain, *end])
        return Tokenized(ids, tuple(lengths), tuple(truncated))

    def embed_ids(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors of tokenized texts.

        Raises:
            ContextOverflow, EngineError: as `EncoderEngine.embed`.
        """
        with self._lock:
            return self.engine.embed(ids)

    def close(self) -> None:
        """Release the engine; calling it again does nothing."""
        with self._lock:
            self.engine.close()
        self._limits.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load_encoder(
    model: str | Path = DEFAULT_ENCODER,
    *,
    max_mem: str | int | None = None,
    threads: int | None = None,
    preset: str = "import",
    enable_integrity_check: bool = True,
    accept_license: bool = False,
    offline: bool = False,
    isa: str | None = None,
    progress: Progress | None = None,
) -> Encoder:
    """Make an encoder ready: pull, quantize and compile what is missing, then open it.

    Args:
        model: a known name, `hf:ORG/NAME`, a checkpoint's folder, or an artifact's directory.
        max_mem: `200MB` or bytes that this process keeps within, or loading is refused.
        threads: None: one per core this process may use.
        preset: `import` (of floats: q8), `hybrid`, `q8` or `q4`, when the artifact has to be made.
        enable_integrity_check, accept_license, offline, isa, progress: as `flashlite.load`.

    Raises:
        UnsupportedModel: it is a language model.
        FlashliteError: one line that says what failed, the limit, and the way out.
    """
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
    return open_encoder(
        artifact,
        host_target(isa),
        max_mem=max_mem,
        threads=threads,
        enable_integrity_check=enable_integrity_check,
    )


def open_encoder(
    artifact: Artifact,
    target: Target,
    *,
    max_mem: str | int | None = None,
    threads: int | None = None,
    enable_integrity_check: bool = True,
) -> Encoder:
    """Compile and open an encoder's artifact; arguments as `load_encoder`.

    Raises:
        FlashliteError: as `load_encoder`.
    """
    context = artifact.encoder.max_context
    _frame(artifact)
    ceiling = None if max_mem is None else parse_size(max_mem)
    threads = default_threads() if threads is None else threads
    with ExitStack() as limits:
        limits.enter_context(within(ceiling, "opened", threads))
        library = load_library(compile_artifact(artifact, target))
        building = artifact.manifest.files[TOKENIZER].size * TOKENIZER_GROWTH
        if ceiling is not None:
            _refuse_beyond(_terms(artifact, library, threads, context, building), ceiling)
        tokenizer = Tokenizer(load_texts(artifact), name=artifact.name)
        return_unused()
        terms = _terms(artifact, library, threads, context)
        if ceiling is not None:
            _refuse_beyond(terms, ceiling)
            tokenizer = tokenizer.with_limit(text_limit(context))
        weights = load_weights(artifact, verify=enable_integrity_check)
        engine = EncoderEngine(library, weights, threads=threads)
        return Encoder(artifact, tokenizer, engine, terms, limits.pop_all())


def _frame(artifact: Artifact) -> tuple[list[int], list[int]]:
    """What stands before and behind every text: [CLS] and [SEP], or their like.

    Raises:
        ArtifactError: the artifact does not say.
    """
    tokens = artifact.tokens
    if tokens.bos is None or not tokens.eos:
        raise ArtifactError(
            f"{artifact.path}: the tokenizer names no tokens to stand around a text; "
            "quantize the model again"
        )
    return [tokens.bos], [tokens.eos[0]]


def _terms(
    artifact: Artifact, library: Library, threads: int, context: int, building: int = 0
) -> dict[str, int]:
    """What the encoder will hold in bytes, by name; vectors are the caller's.

    `building`: bytes of `runtime` that the process does not hold yet.
    """
    info = library.describe(threads)
    return {
        "weights": artifact.weights_size,
        "keys and values": PAGES * int(info.page_bytes),
        "scratch": int(info.scratch_bytes),
        "ids": _ID_BYTES,
        "tokenizing": text_limit(context) * TEXT_BYTES,
        "runtime": resident_bytes() + building,
        "margin": _MARGIN,
    }


def _refuse_beyond(terms: Mapping[str, int], ceiling: int) -> None:
    total = sum(terms.values())
    if total > ceiling:
        named = ", ".join(f"{name} {format_size(size)}" for name, size in terms.items())
        raise MemoryCeiling(
            f"the encoder needs {format_size(total)} ({named}) and max_mem is "
            f"{format_size(ceiling)}; raise max_mem to {total // 10**6 + 2}MB"
        )
