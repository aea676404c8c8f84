"""Every error flashlite raises, as one tree.

    FlashliteError
    ├── UsageError              a flag or argument that cannot be honoured            exit 2
    │   ├── BodyError           a field of a request that cannot be honoured
    │   ├── UnknownModel        a request for a model that is not served
    │   └── UnsupportedSchema   a JSON schema or grammar that cannot be enforced
    ├── PullError               a model could not be fetched
    ├── CheckpointError         a file that is not what it says (offset, value, limit)
    │   └── UnsupportedModel    an architecture or tensor type flashlite does not know
    ├── TokenizerError          a vocabulary or a text that cannot be tokenized
    ├── TemplateError           a chat template that is missing, refused or failed
    │   └── ForgeryError        message text that would have become a control token
    ├── CompressError           a plan that cannot be carried out
    │   └── EmbeddingLoss       FL-209
    ├── ArtifactError           an artifact that cannot be written or read
    │   └── IntegrityError      bytes that differ from the manifest
    ├── CompileError            no compiler, or one that failed
    ├── EngineError             the compiled model refused a call
    │   ├── MemoryCeiling       the model does not fit the memory it may use
    │   └── Overloaded          an answer that would have come too late
    ├── EvaluateError           a measurement that could not be made
    ├── ContextOverflow         FL-405
    ├── UnsupportedTarget       FL-612
    └── MissingExtra            an optional dependency is not installed

A message is one line: what was found, the limit it broke, the way out.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ArtifactError",
    "BodyError",
    "CheckpointError",
    "CompileError",
    "CompressError",
    "ContextOverflow",
    "EmbeddingLoss",
    "EngineError",
    "EvaluateError",
    "FlashliteError",
    "ForgeryError",
    "IntegrityError",
    "MemoryCeiling",
    "MissingExtra",
    "Overloaded",
    "PullError",
    "TemplateError",
    "TokenizerError",
    "UnknownModel",
    "UnsupportedModel",
    "UnsupportedSchema",
    "UnsupportedTarget",
    "UsageError",
]


class FlashliteError(Exception):
    """Base of every error a user can meet; `str()` is one line."""

    code: str | None = None
    exit_code = 1

    def __str__(self) -> str:
        text = " ".join(super().__str__().split())
        return f"{self.code}: {text}" if self.code else text


class UsageError(FlashliteError):
    """A flag or argument that cannot be honoured."""

    exit_code = 2


class BodyError(UsageError):
    """A field of a request that cannot be honoured.

    Attributes:
        param: the field, by its path in the body.
    """

    def __init__(self, param: str, message: str) -> None:
        self.param = param
        super().__init__(message)


class UnknownModel(UsageError):
    """A request for a model that is not served."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name = name
        super().__init__(f"model {_short(name)!r} is not served here; use {' or '.join(known)}")


class UnsupportedSchema(UsageError):
    """A JSON schema or grammar that cannot be enforced exactly.

    Attributes:
        feature: what it asks for.
        at: JSON pointer to where, "" where it is not known.
    """

    def __init__(self, feature: str, at: str = "") -> None:
        self.feature = feature
        self.at = at
        where = f" at {_short(at)}" if at else ""
        super().__init__(
            f"unsupported schema: {_short(feature)}{where} cannot be enforced; leave it out, or "
            "say it with other keywords"
        )


class PullError(FlashliteError):
    """A model could not be fetched, or what came is not what was asked for."""


class CheckpointError(FlashliteError):
    """A model file that is not what it says it is.

    Attributes:
        path: the file.
        offset: byte offset of the field at fault, None where it has none.
        value: what stands there.
        limit: what would have been accepted.
    """

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        offset: int | None = None,
        value: object = None,
        limit: object = None,
    ) -> None:
        self.path = path
        self.offset = offset
        self.value = value
        self.limit = limit
        parts = [f"{path}: {message}" if path is not None else message]
        if value is not None:
            parts.append(f"found {_short(value)}")
        if limit is not None:
            parts.append(f"allowed {_short(limit)}")
        if offset is not None:
            parts.append(f"at byte {offset}")
        super().__init__(", ".join(parts))


class UnsupportedModel(CheckpointError):
    """An architecture or tensor type flashlite does not know."""


class TokenizerError(FlashliteError):
    """A vocabulary that cannot be built, or a text that cannot be tokenized."""


class TemplateError(FlashliteError):
    """A chat template that is missing, was refused, or failed."""


class ForgeryError(TemplateError):
    """Message text that would have become a control token."""


class CompressError(FlashliteError):
    """A compression plan that cannot be carried out."""


class EmbeddingLoss(CompressError):
    """FL-209: the embedding table alone loses more than is allowed."""

    code = "FL-209"

    def __init__(self, lost: float, limit: float) -> None:
        self.lost = lost
        self.limit = limit
        super().__init__(
            f"precision lost in embeddings: the table alone loses {lost:.4f} nats, the limit is "
            f"{limit:g}; turn on normalisation before the embedding (--normalize-embeddings), or "
            "store the table finer (--embed q8 or f16)"
        )


class ArtifactError(FlashliteError):
    """An artifact that cannot be written or read."""


class IntegrityError(ArtifactError):
    """Bytes of an artifact that differ from its manifest."""


class CompileError(FlashliteError):
    """No compiler was found, or the compiler failed."""


class EngineError(FlashliteError):
    """The compiled model refused a call."""


class MemoryCeiling(EngineError):
    """The model does not fit the memory it may use."""


class Overloaded(EngineError):
    """A request that cannot be answered before its deadline.

    Attributes:
        retry_after: seconds after which it could be; None: never, however idle the server is.
    """

    def __init__(self, reason: str, retry_after: float | None) -> None:
        self.retry_after = retry_after
        way_out = "allow more time or ask for less"
        if retry_after is not None:
            way_out = f"ask again in {max(retry_after, 0.1):.1f} s, or allow more time"
        super().__init__(f"the answer would come too late: {reason}; {way_out}")


class EvaluateError(FlashliteError):
    """A measurement that could not be made."""


class ContextOverflow(FlashliteError):
    """FL-405: more tokens than the attention buffer holds."""

    code = "FL-405"

    def __init__(self, tokens: int, limit: int, way_out: str = "") -> None:
        self.tokens = tokens
        self.limit = limit
        message = (
            f"attention buffer overflow: {tokens} tokens, the context holds {limit}; shorten the "
            "prompt, raise max_sequence_length, or turn on auto-chunking"
        )
        if way_out:
            message = f"attention buffer overflow: {tokens} tokens, the limit is {limit}; {way_out}"
        super().__init__(message)


class UnsupportedTarget(FlashliteError):
    """FL-612: the artifact or the library needs what this target lacks."""

    code = "FL-612"


class MissingExtra(FlashliteError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{feature} needs the extra `{extra}`: pip install 'flashlite[{extra}]'")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
