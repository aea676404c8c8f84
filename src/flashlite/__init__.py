"""flashlite: compress a pretrained language model, compile it to C, run it anywhere.

import flashlite as fl

with fl.load("smollm2-135m-instruct") as model:
    for piece in model.chat([{"role": "user", "content": "Hi"}], stream=True):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashlite.checkpoint.pull import Pulled, pull
    from flashlite.errors import (
        ArtifactError,
        BodyError,
        CheckpointError,
        CompileError,
        CompressError,
        ContextOverflow,
        EmbeddingLoss,
        EngineError,
        EvaluateError,
        FlashliteError,
        ForgeryError,
        IntegrityError,
        MemoryCeiling,
        MissingExtra,
        Overloaded,
        PullError,
        TemplateError,
        TokenizerError,
        UnknownModel,
        UnsupportedModel,
        UnsupportedSchema,
        UnsupportedTarget,
        UsageError,
    )
    from flashlite.runtime.encoder import Encoder, load_encoder
    from flashlite.runtime.model import Answer, Model, load
    from flashlite.runtime.sampling import SamplingParams

__all__ = [
    "Answer",
    "ArtifactError",
    "BodyError",
    "CheckpointError",
    "CompileError",
    "CompressError",
    "ContextOverflow",
    "EmbeddingLoss",
    "Encoder",
    "EngineError",
    "EvaluateError",
    "FlashliteError",
    "ForgeryError",
    "IntegrityError",
    "MemoryCeiling",
    "MissingExtra",
    "Model",
    "Overloaded",
    "PullError",
    "Pulled",
    "SamplingParams",
    "TemplateError",
    "TokenizerError",
    "UnknownModel",
    "UnsupportedModel",
    "UnsupportedSchema",
    "UnsupportedTarget",
    "UsageError",
    "__version__",
    "load",
    "load_encoder",
    "pull",
]

__version__ = "0.1.0"

# Where the names live that are not errors. All are imported at first use: `import flashlite`
# costs nothing.
_HOMES = {
    "Answer": "flashlite.runtime.model",
    "Encoder": "flashlite.runtime.encoder",
    "Model": "flashlite.runtime.model",
    "Pulled": "flashlite.checkpoint.pull",
    "SamplingParams": "flashlite.runtime.sampling",
    "load": "flashlite.runtime.model",
    "load_encoder": "flashlite.runtime.encoder",
    "pull": "flashlite.checkpoint.pull",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'flashlite' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "flashlite.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
