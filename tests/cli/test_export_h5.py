"""`export-h5`, and every verb that takes what it writes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import h5py
import make_gguf
import make_hdf5
import numpy as np
import pytest

from flashlite.cli import main


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "FLASHLITE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in types whose grid q8 does not contain: where it does, it is kept."""
    dtypes = dict.fromkeys(("token_embd", "ffn_up", "attn_v", "attn_output"), "Q4_1")
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return make_gguf.write_gguf(path, *make_gguf.tiny_model(dtypes=dtypes))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What a verb says with --json."""
    assert main.main([*words, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line a verb says when it fails."""
    assert main.main(list(words)) != 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("flashlite: ")
    assert said.err.count("\n") == 1
    return said.err


def test_an_export_makes_the_artifact_of_its_source(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(capsys, "export-h5", str(source), "-o", "base_fp32.h5")
    assert done["file"] == "base_fp32.h5"
    assert done["bytes"] == (tmp_path / "base_fp32.h5").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base_fp32.h5"]

    shown = run(capsys, "inspect", "base_fp32.h5", "--tensors")
    before = run(capsys, "inspect", str(source))
    same = ("architecture", "layers", "width", "heads", "vocabulary", "context", "chat_template")
    assert {key: shown[key] for key in same} == {key: before[key] for key in same}
    assert [kind["type"] for kind in shown["types"]] == ["F32"]
    assert len(shown["tensors"]) == done["tensors"]

    # The same bytes of weights, tokenizer and template: so the same tokens, whatever is asked.
    for model, name in ((str(source), "a.fl"), ("base_fp32.h5", "b.fl")):
        run(capsys, "quantize", model, "--preset", "q8", "--split-head", "off", "-o", name)
    for file in ("weights.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert Path("a.fl", file).read_bytes() == Path("b.fl", file).read_bytes(), file


def test_an_export_of_an_export_is_the_same(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "export-h5", str(source), "-o", "one.h5")
    run(capsys, "export-h5", "one.h5", "-o", "two.h5")
    with h5py.File("one.h5") as one, h5py.File("two.h5") as two:
        assert one.attrs["model_config"] == two.attrs["model_config"]
        assert one["layers/0/q"][()].tobytes() == two["layers/0/q"][()].tobytes()


def test_weights_alone_need_a_model_they_are_like(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "export-h5", str(source), "-o", "bare.h5")
    with h5py.File("bare.h5", "r+") as file:
        del file.attrs["model_config"]
        del file["tokenizer"]
    shown = run(capsys, "inspect", "bare.h5")
    assert shown["architecture"] is None
    assert "give --like MODEL" in shown["runs"]
    for verb in (["quantize", "bare.h5", "-o", "x.fl"], ["export-h5", "bare.h5", "-o", "x.h5"]):
        assert "give --like MODEL" in refused(capsys, *verb)
    assert run(capsys, "inspect", "bare.h5", "--like", str(source))["chat_template"] is True
    for model, name in ((str(source), "a.fl"), ("bare.h5", "b.fl")):
        like = ["--like", str(source)] if model == "bare.h5" else []
        run(capsys, "quantize", model, "--preset", "q8", "--split-head", "off", "-o", name, *like)
    assert (
        Path("a.fl/weights.safetensors").read_bytes()
        == Path("b.fl/weights.safetensors").read_bytes()
    )
    run(capsys, "export-h5", "bare.h5", "-o", "whole.h5", "--like", str(source))
    assert run(capsys, "inspect", "whole.h5")["architecture"] == "llama"
    assert "leave out --like" in refused(capsys, "inspect", "whole.h5", "--like", "gemma-3-270m")


def test_what_is_there_is_kept(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base.h5").write_bytes(b"mine")
    line = refused(capsys, "export-h5", str(source), "-o", "base.h5")
    assert "base.h5 is there already; give --force" in line
    assert Path("base.h5").read_bytes() == b"mine"
    run(capsys, "export-h5", str(source), "-o", "base.h5", "--force")
    assert Path("base.h5").stat().st_size > 1_000_000
    Path("folder.h5").mkdir()
    assert "is there already" in refused(capsys, "export-h5", str(source), "-o", "folder.h5")


def test_a_full_disk_is_one_line(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    line = refused(capsys, "export-h5", str(source), "-o", "base.h5")
    assert "base.h5: No space left on device: free some space" in line
    assert not list(Path().iterdir())


@pytest.mark.parametrize("verb", ["inspect", "quantize", "export-h5"])
def test_a_corrupt_file_is_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_hdf5.compressed(tmp_path / "bad.h5")
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    assert "bad.h5: is cut short, found" in refused(capsys, verb, "bad.h5")
    path.write_bytes(raw[:48] + bytes(1000) + raw[1048:])
    assert "bad.h5: " in refused(capsys, verb, "bad.h5")
    with h5py.File("bad.h5", "w") as file:
        file["a"] = h5py.ExternalLink("/etc/passwd", "/")
        file["b"] = np.ones(3, "f4")
    assert "'/a' is an external link" in refused(capsys, verb, "bad.h5")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.h5"]
