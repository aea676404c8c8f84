from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from make_gguf import gguf_bytes
from safetensors.numpy import save_file

from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import CheckpointError

GGUF = gguf_bytes({"general.architecture": "llama"}, {})[0]


def hugging_face(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    save_file({"w": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model.safetensors.txt", "model"])
def test_gguf_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GGUF)
    assert open_checkpoint(tmp_path / name).format == "gguf"


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin"])
def test_safetensors_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    hugging_face(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert (checkpoint.format, checkpoint.architecture) == ("safetensors", "qwen2")


def test_a_header_that_starts_like_a_pickle_is_still_safetensors(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(0x80)
    raw = len(header).to_bytes(8, "little") + header + bytes(16)
    assert raw[0] == 0x80
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert open_checkpoint(tmp_path / "model.safetensors").info("w").shape == (4,)


def test_a_folder_with_one_gguf_opens(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a model")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "some.Q4_1.gguf").write_bytes(GGUF)
    assert open_checkpoint(tmp_path).format == "gguf"


def test_a_hugging_face_folder_opens(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")  # beside, and never touched
    assert open_checkpoint(tmp_path).format == "safetensors"


def test_a_folder_with_two_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(GGUF)
    (tmp_path / "b.gguf").write_bytes(GGUF)
    with pytest.raises(CheckpointError, match=r"more than one model.*found a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_a_folder_with_both_formats_is_refused(tmp_path: Path) -> None:
    (hugging_face(tmp_path) / "a.gguf").write_bytes(GGUF)
    with pytest.raises(CheckpointError, match=r"more than one model.*a\.gguf, model\.safetensors"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model, allowed a GGUF file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(30)),
        ("model", b"PK\x03\x04" + bytes(30)),
        ("model.gguf", b"\x80\x02}q\x00."),
        ("model.pt", b"\x80\x04\x95"),
        ("model.pkl", b"(dp0\n."),
        ("legacy.pth", b"anything"),
        ("model.ckpt", b""),
    ],
)
def test_pickles_are_refused_by_content_and_by_name(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="is a pickle, which runs code.*convert it to safe"):
        open_checkpoint(tmp_path / name)


def test_a_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is a pickle"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(9), bytes(64)])
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a model flashlite can read.*allowed a GGUF"):
        open_checkpoint(tmp_path / "model")


def test_a_gguf_by_name_alone_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match="is not a GGUF file, found b'<!DO'"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.gguf: cannot be read: No such file"):
        open_checkpoint(tmp_path / "gone.gguf")


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_checkpoint(Path("a\0b.gguf"))


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path)


def test_a_device_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(Path("/dev/zero"))


def test_a_name_the_system_refuses_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        open_checkpoint(Path("x" * 300))
