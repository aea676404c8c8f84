"""flashlite: compress a pretrained language model, compile it to C, run it anywhere.

import flashlite as fl

model = fl.load("smollm2-135m-instruct")
for piece in model.chat([{"role": "user", "content": "Hi"}], stream=True):
    print(piece, end="")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashlite.checkpoint.pull import Pulled, pull
    from flashlite.errors import FlashliteError

__all__ = ["FlashliteError", "Pulled", "__version__", "pull"]

__version__ = "0.1.0"

# Where each public name lives; imported at first use, so that `import flashlite` costs nothing.
_HOMES = {
    "FlashliteError": "flashlite.errors",
    "Pulled": "flashlite.checkpoint.pull",
    "pull": "flashlite.checkpoint.pull",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'flashlite' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
