"""Delta files, and artifacts they are applied to and taken back from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from flashlite.artifact import delta as delta_module
from flashlite.artifact import staging
from flashlite.artifact.delta import (
    base_digest,
    delta_bytes,
    read_delta,
    tail_tensors,
    write_delta,
)
from flashlite.artifact.deltas import applied_deltas, apply_delta, roll_back
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_weights, open_artifact, tensor
from flashlite.artifact.write import record, write_artifact
from flashlite.errors import ArtifactError, IntegrityError, UsageError

Arrays = dict[str, NDArray[Any]]
MADE = {"command": "flashlite finetune", "seed": 3}


def stored(artifact: Artifact, layers: int) -> Arrays:
    """What the artifact holds of the last layers."""
    weights = load_weights(artifact)
    found: Arrays = {}
    for entry in tail_tensors(artifact, layers):
        at = artifact.tensors[entry.name]
        dtype = {"I8": "i1", "U8": "u1", "F16": "<f2", "F32": "<f4"}[at.dtype]
        part = weights[at.offset : at.offset + at.nbytes]
        found[entry.name] = part.view(dtype).reshape(at.shape).copy()
    return found


def changed(artifact: Artifact, layers: int, seed: int) -> Arrays:
    """The same with other values."""
    rng = np.random.default_rng(seed)
    found = stored(artifact, layers)
    for name, array in found.items():
        if array.dtype.kind == "f":
            found[name] = (array * rng.uniform(0.5, 1.5, array.shape)).astype(array.dtype)
        else:
            found[name] = rng.permutation(array.reshape(-1)).reshape(array.shape)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def made(copy: Path, tmp_path: Path) -> Path:
    """A delta of one layer for `copy`."""
    artifact = open_artifact(copy)
    path = tmp_path / "one.delta"
    write_delta(path, delta_bytes(artifact, 1, changed(artifact, 1, 0), MADE))
    return path


def test_a_delta_holds_the_last_layers_and_the_final_norm(copy: Path, made: Path) -> None:
    artifact = open_artifact(copy)
    last = artifact.spec.n_layers - 1
    delta = read_delta(made, artifact)
    assert {n.rsplit(".", 1)[0] if n[-5:] in ("codes", "cales") else n for n in delta.arrays} >= {
        "final_norm", f"layers.{last}.ffn_norm", f"layers.{last}.down",
    }  # fmt: skip
    assert not any(n.startswith(("embed", "layers.0.")) for n in delta.arrays)
    assert (delta.layers, delta.made) == (1, MADE)
    others = safetensors.numpy.load_file(made)  # a file like any other
    assert others
    assert set(others) == set(delta.arrays)
    for name, array in delta.arrays.items():
        np.testing.assert_array_equal(others[name], array)


def test_an_applied_delta_is_in_the_weights_alone(copy: Path, made: Path) -> None:
    before = open_artifact(copy)
    expected = changed(before, 1, 0)
    old = load_weights(before)
    kept = {name: old[t.offset : t.offset + t.nbytes].copy() for name, t in before.tensors.items()}
    after = apply_delta(copy, made)
    weights = load_weights(after)
    for name, entry in after.tensors.items():
        part = weights[entry.offset : entry.offset + entry.nbytes]
        if name in expected:
            assert part.tobytes() == expected[name].tobytes()
        else:
            assert part.tobytes() == kept[name].tobytes()
    assert after.digest != before.digest
    assert after.config() == before.config()
    card = json.loads((copy / "card.json").read_text())
    assert card["measured"] == {"delta": {"digest": applied_deltas(after)[0].digest, "made": MADE}}
    tensor(after, weights, "final_norm")


def test_deltas_stack_and_roll_back_to_the_last_bit(copy: Path, made: Path, tmp_path: Path) -> None:
    states = [files(copy)]
    apply_delta(copy, made)
    states.append(files(copy))
    for number, layers in ((2, 2), (3, 1)):
        artifact = open_artifact(copy)
        path = tmp_path / f"{number}.delta"
        write_delta(path, delta_bytes(artifact, layers, changed(artifact, layers, number), {}))
        apply_delta(copy, path)
        states.append(files(copy))
    listed = applied_deltas(open_artifact(copy))
    assert [(d.number, d.layers) for d in listed] == [(1, 1), (2, 2), (3, 1)]
    assert all(d.size > 0 and d.kept > d.size for d in listed)
    again = shutil.copytree(copy, tmp_path / "again.fl")
    roll_back(copy)
    assert files(copy) == states[2]
    roll_back(copy)
    assert files(copy) == states[1]
    roll_back(copy)
    assert files(copy) == states[0]
    roll_back(again, 3)
    assert files(again) == states[0]
    load_weights(open_artifact(again))


@pytest.mark.parametrize("count", [0, 2, -1])
def test_only_what_is_there_is_rolled_back(copy: Path, made: Path, count: int) -> None:
    apply_delta(copy, made)
    with pytest.raises(UsageError, match="it has 1"):
        roll_back(copy, count)


def test_a_delta_of_another_model_is_refused(copy: Path, made: Path) -> None:
    apply_delta(copy, made)
    state = files(copy)
    with pytest.raises(ArtifactError, match="applies to model .* in the order they were made"):
        apply_delta(copy, made)
    assert files(copy) == state


def test_a_new_card_leaves_a_delta_valid(
    copy: Path, made: Path, forge: Callable[[str, Callable[[dict[str, Any]], object]], Path]
) -> None:
    digest = open_artifact(copy).digest
    forge("card.json", lambda card: card.update(measured={"kl": 0.1}))
    assert open_artifact(copy).digest != digest
    state = files(copy)
    apply_delta(copy, made)
    roll_back(copy)
    assert files(copy) == state


@pytest.mark.parametrize("failure", ["_make_durable", "_publish"])
def test_a_failed_change_leaves_the_artifact(
    copy: Path, made: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    state, beside = files(copy), sorted(copy.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(staging, failure, fail)
        with pytest.raises(ArtifactError, match="not enough space"):
            apply_delta(copy, made)
    assert files(copy) == state
    apply_delta(copy, made)
    state = files(copy)
    with monkeypatch.context() as patch:
        patch.setattr(staging, failure, fail)
        with pytest.raises(ArtifactError, match="not enough space"):
            roll_back(copy)
    assert files(copy) == state
    assert sorted(copy.parent.iterdir()) == beside


# ---- hostile files ----


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a delta."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def meta(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update(values)


def drop(header: dict[str, Any]) -> None:
    del header["final_norm"]


def shift(header: dict[str, Any]) -> None:
    header["final_norm"]["data_offsets"] = [0, 4]


def add(header: dict[str, Any]) -> None:
    header["embed.codes"] = dict(header["final_norm"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (meta(format_version="2"), "format 2 is newer than 1"),
        (meta(format_version="-1"), "not a number from 1"),
        (meta(layers="9999"), "9999 layers to tune"),
        (meta(layers="2"), "are not the last 2 layers"),
        (meta(layers=1), "not text"),
        (meta(base="00" * 32), "applies to model"),
        (meta(more="x"), "is no delta"),
        (meta(made="{}"), "differs from the digest"),
        (meta(digest="00" * 32), "differs from the digest"),
        (lambda header: header.pop("__metadata__"), "is no delta"),
        (drop, "are not the last 1 layers"),
        (shift, "are not the last 1 layers"),
        (add, "are not the last 1 layers"),
    ],
)
def test_a_forged_header_is_refused(
    copy: Path, made: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(made, edit)
    state = files(copy)
    with pytest.raises(ArtifactError, match=message):
        apply_delta(copy, made)
    assert files(copy) == state


def test_a_changed_byte_is_found(copy: Path, made: Path) -> None:
    raw = bytearray(made.read_bytes())
    raw[-5] ^= 1
    made.write_bytes(raw)
    with pytest.raises(IntegrityError, match="differs from the digest it carries"):
        read_delta(made, open_artifact(copy))


@pytest.mark.parametrize("size", [0, 7, 9, 200, -1])
def test_a_cut_or_longer_file_is_refused(copy: Path, made: Path, size: int) -> None:
    raw = made.read_bytes()
    made.write_bytes(raw[:size] if size >= 0 else raw + b"\0")
    with pytest.raises(ArtifactError):
        read_delta(made, open_artifact(copy))


def test_a_huge_header_is_not_read(copy: Path, made: Path) -> None:
    made.write_bytes((1 << 62).to_bytes(8, "little") + made.read_bytes()[8:])
    with pytest.raises(ArtifactError, match="its header would have"):
        read_delta(made, open_artifact(copy))


def test_a_pipe_is_not_waited_for(copy: Path, tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.delta")
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_delta(tmp_path / "pipe.delta", open_artifact(copy))


def test_values_that_are_not_finite_are_neither_written_nor_read(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_artifact(copy)
    arrays = changed(artifact, 1, 0)
    arrays["final_norm"][0] = np.inf
    message = "final_norm holds a value that is not finite"
    with pytest.raises(ArtifactError, match=message):
        delta_bytes(artifact, 1, arrays, MADE)
    with monkeypatch.context() as patch:  # a forger checks nothing, and digests what he wrote
        patch.setattr(delta_module, "_check_finite", lambda *_: None)
        forged = delta_bytes(artifact, 1, arrays, MADE)
    write_delta(tmp_path / "forged.delta", forged)
    with pytest.raises(ArtifactError, match=message):
        apply_delta(copy, tmp_path / "forged.delta")


def test_other_arrays_are_not_written(copy: Path) -> None:
    artifact = open_artifact(copy)
    arrays = changed(artifact, 1, 0)
    with pytest.raises(ArtifactError, match="must not hold 'embed'"):
        delta_bytes(artifact, 1, {**arrays, "embed": arrays["final_norm"]}, MADE)
    arrays["final_norm"] = arrays["final_norm"][:-1]
    with pytest.raises(ArtifactError, match="array final_norm is float32"):
        delta_bytes(artifact, 1, arrays, MADE)


@pytest.mark.parametrize("name", ["undo.safetensors", "delta.safetensors", "manifest.json"])
def test_what_is_kept_is_verified(copy: Path, made: Path, name: str) -> None:
    apply_delta(copy, made)
    path = copy / "deltas/001" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    artifact = open_artifact(copy)
    with pytest.raises(IntegrityError, match="differs from manifest.json"):
        applied_deltas(artifact) if name.startswith("delta") else roll_back(copy)


def test_a_kept_manifest_that_lies_is_refused(
    copy: Path, made: Path, forge: Callable[[str, Callable[[dict[str, Any]], object]], Path]
) -> None:
    apply_delta(copy, made)
    forge("deltas/001/manifest.json", lambda m: m["files"]["weights.safetensors"].update(size=5))
    state = files(copy)
    with pytest.raises(ArtifactError, match=r"does not give weights.safetensors its former bytes"):
        roll_back(copy)
    assert files(copy) == state


def test_half_a_delta_is_refused(
    copy: Path, made: Path, forge: Callable[[str, Callable[[dict[str, Any]], object]], Path]
) -> None:
    apply_delta(copy, made)
    forge("manifest.json", lambda m: m["files"].pop("deltas/001/undo.safetensors"))
    with pytest.raises(ArtifactError, match="are not whole"):
        roll_back(copy)


def test_odd_sizes_and_a_split_head(
    odd_artifact: tuple[Artifact, dict[str, NDArray[Any]]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(odd_artifact[0].path, tmp_path / "odd.fl"))
    artifact = open_artifact(folder)
    state = files(folder)
    path = tmp_path / "odd.delta"
    write_delta(path, delta_bytes(artifact, 2, changed(artifact, 2, 1), MADE))
    apply_delta(folder, path)
    roll_back(folder)
    assert files(folder) == state
    assert base_digest(artifact) == base_digest(open_artifact(folder))


def test_a_tuned_artifact_can_be_replaced(
    copy: Path, made: Path, odd_artifact: tuple[Artifact, dict[str, NDArray[Any]]], tiny_texts: Any
) -> None:
    apply_delta(copy, made)
    other, arrays = odd_artifact
    write_artifact(
        copy, other.spec, other.plan, tiny_texts, arrays.items(),
        name="odd", provenance=other.provenance,
    )  # fmt: skip
    assert not (copy / "deltas").exists()


def test_a_card_measured_after_a_delta_goes_with_it(copy: Path, made: Path) -> None:
    state = files(copy)
    apply_delta(copy, made)
    recorded = record(open_artifact(copy), {"validation": {"kl": 0.1}})
    assert [d.number for d in applied_deltas(recorded)] == [1]
    assert set(json.loads((copy / "card.json").read_text())["measured"]) == {"delta", "validation"}
    roll_back(copy)
    assert files(copy) == state
