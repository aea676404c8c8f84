"""Make the tiny artifact that a release leaves behind: `python make_release.py FOLDER`.

Two layers of random weights in every packed format (and, with `hybrid`, a half-precision table),
with a working tokenizer and chat template. Once released, an artifact is never made again: later
versions must read it as it is. Needs `src` and `tests/checkpoint` on PYTHONPATH.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import make_gguf

from flashlite.artifact.write import quantize
from flashlite.checkpoint.convert_tokenizer import build_tokenizer
from flashlite.checkpoint.open import open_checkpoint
from flashlite.model.families import describe

LAYERS = 2


def make(folder: Path, preset: str) -> None:
    metadata, tensors = make_gguf.tiny_model()
    metadata["llama.block_count"] = LAYERS
    extra = re.compile(rf"blk\.[{LAYERS}-9]\.")
    kept = {name: tensor for name, tensor in tensors.items() if not extra.match(name)}
    with TemporaryDirectory() as scratch:
        path = make_gguf.write_gguf(Path(scratch, "tiny.gguf"), metadata, kept)
        checkpoint = open_checkpoint(path)
        quantize(
            describe(checkpoint),
            build_tokenizer(checkpoint),
            folder,
            preset,
            name="tiny",
            provenance={"source": "tiny.gguf", "sha256": "", "licence": "Apache-2.0"},
        )


if __name__ == "__main__":
    make(Path(sys.argv[1], "tiny.fl"), "import")
