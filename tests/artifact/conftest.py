"""A small artifact, and a way to break one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from numpy.typing import NDArray

from flashlite.artifact.format import Artifact, layout
from flashlite.artifact.write import quantize, write_artifact
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.tokenizer import SpecialTokens, TokenizerFiles
from flashlite.compress.plan import Format, Plan
from flashlite.model.families import describe
from flashlite.model.source import SourceModel
from flashlite.model.spec import ModelSpec

PROVENANCE = {"source": "tiny.gguf", "sha256": "ab" * 32, "licence": "Apache-2.0"}


@pytest.fixture(scope="session")
def tiny_source(tiny_gguf: Path) -> SourceModel:
    return describe(open_checkpoint(tiny_gguf))


@pytest.fixture(scope="session")
def tiny_texts() -> TokenizerFiles:
    tokens = SpecialTokens(bos=1, eos=(2,), add_bos=False, control=(0, 1, 2))
    return TokenizerFiles('{"version": "1.0", "text": "ñ"}'.encode(), "{{ messages }}\n", tokens)


@pytest.fixture(scope="session")
def tiny_artifact(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """Never to be written to: it is shared."""
    folder = tmp_path_factory.mktemp("artifacts") / "tiny.fl"
    return quantize(tiny_source, tiny_texts, folder, name="tiny", provenance=PROVENANCE)


@pytest.fixture(scope="session")
def odd_artifact(
    tiny_texts: TokenizerFiles, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, dict[str, NDArray[Any]]]:
    """Sizes that fill no block and no group: arrays end off 64 bytes, so there is padding."""
    spec = ModelSpec(
        family="qwen3", n_layers=2, d_model=36, n_heads=3, n_kv_heads=1, head_dim=12, d_ff=20,
        vocab_size=41, max_context=64, norm_eps=1e-6, activation="silu", tied_head=True,
        rope_theta=1e4, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    formats: dict[str, Format] = {
        name: "f32" if len(shape) == 1 else "q4m" for name, shape in spec.shapes()
    }
    plan = Plan("odd", formats | {"embed": "f16", "head": "q8", "layers.1.v": "q4"})
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in layout(spec, plan).tensors.items():
        values = rng.normal(size=entry.shape) * (30 if entry.dtype in ("I8", "U8") else 1)
        dtype = {"I8": np.int8, "U8": np.uint8, "F16": np.float16, "F32": np.float32}[entry.dtype]
        arrays[name] = np.abs(values).astype(dtype)
    folder = tmp_path_factory.mktemp("artifacts") / "odd.fl"
    made = write_artifact(
        folder, spec, plan, tiny_texts, arrays.items(), name="odd", provenance=PROVENANCE
    )
    return made, arrays


@pytest.fixture
def copy(tiny_artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact, to be broken."""
    return Path(shutil.copytree(tiny_artifact.path, tmp_path / "copy.fl"))


@pytest.fixture
def forge(copy: Path) -> Callable[[str, Callable[[dict[str, Any]], object]], Path]:
    """Change a JSON file of the copy and bring the manifest in line, as an attacker would."""

    def change(file: str, edit: Callable[[dict[str, Any]], object]) -> Path:
        path = copy / file
        value = json.loads(path.read_text("utf-8"))
        edit(value)
        path.write_text(json.dumps(value), "utf-8")
        if file != "manifest.json":
            sign(copy, file)
        return copy

    return change


def sign(folder: Path, file: str) -> None:
    """Write size and digest of a changed file into the manifest."""
    data = (folder / file).read_bytes()
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][file] = {"size": len(data), "blake3": blake3(data).hexdigest()}
    path.write_text(json.dumps(manifest))


@pytest.fixture
def resign(copy: Path) -> Callable[[str], None]:
    """Bring the manifest of the copy in line with a changed file."""
    return lambda file: sign(copy, file)
