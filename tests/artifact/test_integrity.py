from __future__ import annotations

import random
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights, open_artifact
from flashlite.errors import ArtifactError, IntegrityError

FILES = [
    "card.json",
    "chat_template.jinja",
    "config.json",
    "tokenizer.json",
    "weights.safetensors",
]


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def bits(path: Path, count: int) -> list[int]:
    size = 8 * path.stat().st_size
    return sorted(random.Random(0).sample(range(size), min(count, size)))


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_detected(copy: Path, name: str) -> None:
    path = copy / name
    for bit in bits(path, 400):
        flip(path, bit)
        with pytest.raises(ArtifactError):
            load_weights(open_artifact(copy))
        flip(path, bit)
    load_weights(open_artifact(copy))  # and without a flip nothing is refused


def test_a_flip_in_the_manifest_is_refused_or_renames_the_artifact(
    copy: Path, tiny_artifact: Artifact
) -> None:
    """The manifest is not covered by itself: it decides the digest, which a signature covers."""
    path = copy / "manifest.json"
    for bit in bits(path, 400):
        flip(path, bit)
        with suppress(ArtifactError):
            assert open_artifact(copy).digest != tiny_artifact.digest
        flip(path, bit)
    assert open_artifact(copy).digest == tiny_artifact.digest


def test_the_error_names_the_tensor(copy: Path) -> None:
    artifact = open_artifact(copy)
    path = copy / "weights.safetensors"
    data_start = path.stat().st_size - artifact.weights_size
    for name in ("embed.codes", "layers.3.k.mins", "final_norm"):
        entry = artifact.tensors[name]
        bit = 8 * (data_start + entry.offset + entry.nbytes - 1) + 5
        flip(path, bit)
        with pytest.raises(IntegrityError, match=rf"weights.safetensors: tensor {name} differs"):
            load_weights(artifact)
        flip(path, bit)


def test_swapped_tensors_are_detected_and_named(copy: Path) -> None:
    artifact = open_artifact(copy)
    path = copy / "weights.safetensors"
    data = np.fromfile(path, np.uint8)
    start = len(data) - artifact.weights_size
    one, two = (artifact.tensors[f"layers.{i}.q.codes"] for i in (0, 1))
    first = slice(start + one.offset, start + one.offset + one.nbytes)
    second = slice(start + two.offset, start + two.offset + two.nbytes)
    data[first], data[second] = data[second].copy(), data[first].copy()
    data.tofile(path)
    with pytest.raises(IntegrityError, match=r"tensor layers\.0\.q\.codes and 1 more differs"):
        load_weights(artifact)


def test_changed_padding_is_detected(odd_artifact: tuple[Artifact, object], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(odd_artifact[0].path, tmp_path / "odd.fl"))
    artifact = open_artifact(folder)
    path = folder / "weights.safetensors"
    covered = np.zeros(artifact.weights_size, bool)
    for entry in artifact.tensors.values():
        covered[entry.offset : entry.offset + entry.nbytes] = True
    hole = int(np.flatnonzero(~covered)[0])
    flip(path, 8 * (path.stat().st_size - artifact.weights_size + hole))
    with pytest.raises(IntegrityError, match="the header or padding differs"):
        load_weights(artifact)


def test_a_file_swapped_between_open_and_load_is_detected(copy: Path) -> None:
    artifact = open_artifact(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        load_texts(artifact)
    path = copy / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="must be"):
        load_weights(artifact)


def test_the_check_can_be_switched_off(copy: Path) -> None:
    """Then a flipped code is loaded as it is; what cannot be valid is still refused."""
    artifact = open_artifact(copy)
    before = load_weights(artifact)
    path = copy / "weights.safetensors"
    at = path.stat().st_size - artifact.weights_size + artifact.tensors["embed.codes"].offset
    flip(path, 8 * at)
    (copy / "tokenizer.json").write_text("{}")
    unchecked = open_artifact(copy, enable_integrity_check=False)
    after = load_weights(unchecked, verify=False)
    assert np.count_nonzero(before != after) == 1
    assert load_texts(unchecked, verify=False).tokenizer_json == b"{}"
