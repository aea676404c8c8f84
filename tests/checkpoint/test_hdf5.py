"""HDF5 files: every allowed way to store numbers is read, all else is refused in one line."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import make_hdf5
import numpy as np
import pytest
from make_hdf5 import compressed, ours

from flashlite.checkpoint import hdf5, hdf5_child, hdf5_directory
from flashlite.checkpoint.convert_tokenizer import build_tokenizer, build_tokenizer_checked
from flashlite.checkpoint.hdf5_directory import check_directory
from flashlite.checkpoint.hdf5_write import write_hdf5
from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import (
    CheckpointError,
    MissingExtra,
    TokenizerError,
    UnsupportedModel,
    UsageError,
)

Build = Callable[[h5py.File], Any]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process for each file: what is tested is the same code."""
    monkeypatch.setattr(hdf5, "_run_child", make_hdf5.examine_here)


# ---- what is read ----


@pytest.mark.parametrize("libver", [None, "latest"])
def test_every_allowed_way_to_store_numbers(libver: str | None, tmp_path: Path) -> None:
    path = compressed(tmp_path / "weights.h5", libver)
    checkpoint = open_checkpoint(path)  # in the real child process
    expected: dict[str, Any] = {}
    with h5py.File(path) as file:

        def take(name: str, found: Any) -> None:
            if isinstance(found, h5py.Dataset) and name != "text":
                expected[name.replace("/", ".")] = np.asarray(found[()], dtype="f4")

        file.visititems(take)
    assert len(expected) == 12
    assert checkpoint.tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(checkpoint.tensor(name), values), name
        assert checkpoint.info(name).shape == values.shape
    assert checkpoint.info("big.f2").dtype == "F16"
    assert checkpoint.architecture == ""


def test_bfloat16_is_told_from_float16(tmp_path: Path, here: None) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        dataset = h5py.h5d.create(file.id, b"b", kind, h5py.h5s.create_simple((2,)))
        dataset.write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.array([1.5, -3.0], "f4"), h5py.h5t.NATIVE_FLOAT
        )
    checkpoint = open_checkpoint(tmp_path / "b.h5")
    assert checkpoint.info("b").dtype == "BF16"
    assert checkpoint.tensor("b").tolist() == [1.5, -3.0]


def test_an_infinity_by_rounding_is_refused(tmp_path: Path, here: None) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["d"] = np.array([1.0, 1e300])
    with pytest.raises(CheckpointError, match="not finite, number 1"):
        open_checkpoint(tmp_path / "d.h5").tensor("d")


def test_whole_numbers_fail_only_when_they_are_read(tmp_path: Path, here: None) -> None:
    with h5py.File(tmp_path / "i.h5", "w") as file:
        file["position_ids"] = np.arange(4)
    checkpoint = open_checkpoint(tmp_path / "i.h5")
    with pytest.raises(UnsupportedModel, match="cannot be decoded, found I64"):
        checkpoint.tensor("position_ids")


def test_hdf5_is_known_by_its_content_and_by_its_name(tmp_path: Path, here: None) -> None:
    ours(tmp_path / "model.bin")
    assert open_checkpoint(tmp_path / "model.bin").format == "hdf5"
    (tmp_path / "folder").mkdir()
    ours(tmp_path / "folder" / "base_fp32.h5")
    assert open_checkpoint(tmp_path / "folder").format == "hdf5"
    (tmp_path / "model.h5").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="is not an HDF5 file, found b'hello'"):
        open_checkpoint(tmp_path / "model.h5")


def test_without_h5py_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ours(tmp_path / "base.h5")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "h5py" else find(name)
    )
    with pytest.raises(MissingExtra, match=r"reading HDF5 files.*pip install 'flashlite\[h5\]'"):
        open_checkpoint(path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match=r"writing HDF5 files.*pip install 'flashlite\[h5\]'"):
        ours(tmp_path / "new.h5")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base.h5"]


# ---- --like ----


def test_like_is_for_weights_alone(tmp_path: Path, tiny_gguf: Path, here: None) -> None:
    path = ours(tmp_path / "base.h5")
    with pytest.raises(UsageError, match="says itself which model it holds: leave out --like"):
        open_checkpoint(path, like=str(tiny_gguf))
    with pytest.raises(UsageError, match="leave out --like"):
        open_checkpoint(tiny_gguf, like=str(path))
    bare = make_hdf5.plain(tmp_path / "bare.h5", {"w": np.ones(3, "f4")}, groups=False)
    with pytest.raises(UsageError, match="does not say which model it holds either"):
        open_checkpoint(bare, like=str(bare))
    with pytest.raises(TokenizerError, match="holds no tokenizer: give --like MODEL"):
        build_tokenizer(open_checkpoint(bare))
    checkpoint = open_checkpoint(bare, like=str(tiny_gguf))
    assert checkpoint.architecture == "llama"
    assert build_tokenizer(checkpoint) == build_tokenizer(open_checkpoint(tiny_gguf))


# ---- what is refused: structure ----


def _dataset(file: h5py.File, plist: Any, name: bytes = b"d") -> None:
    h5py.h5d.create(
        file.id, name, h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4,)), plist
    )  # fmt: skip


def _external_file(file: h5py.File) -> None:
    file.create_dataset("d", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "d", (4,))
    file.create_virtual_dataset("d", layout)


def _compact(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    _dataset(file, plist)


def _deep(file: h5py.File) -> None:
    file.create_group("/".join("x" * 40))


def _attributes(file: h5py.File) -> None:
    group = file.create_group("g")
    for number in range(300):
        group.attrs[str(number)] = 1


def _names(file: h5py.File) -> None:
    file["a"] = np.ones(3, "f4")
    file["b"] = file["a"]


def _ring(file: h5py.File) -> None:
    file.create_group("a")["b"] = file["/"]


def _long_config(file: h5py.File) -> None:
    file.attrs["model_config"] = np.bytes_(b" " * (1 << 20) + b"{}")


def _big(file: h5py.File) -> None:
    """A shape of terabytes, nothing written."""
    file.create_dataset(
        "d", (1 << 30, 1 << 10), "f4", chunks=(1 << 10, 1 << 10), compression="gzip"
    )


def _inflating(file: h5py.File) -> None:
    file.create_dataset("d", data=np.zeros((64, 1 << 15), "f4"), compression="gzip")


STRUCTURES: dict[str, tuple[Build, str]] = {
    "soft link": (lambda f: f.__setitem__("d", h5py.SoftLink("/x")), "'/d' is a soft link"),
    "external link": (
        lambda f: f.__setitem__("d", h5py.ExternalLink("/etc/passwd", "/")),
        "'/d' is an external link",
    ),
    "two names": (_names, "'/b' is a second name of another object"),
    "ring": (_ring, "'/a/b' is a second name of another object"),
    "named type": (
        lambda f: f.__setitem__("t", np.dtype("f4")),
        "'/t' is neither a group nor a dataset",
    ),
    "external file": (_external_file, "keeps its numbers in another file"),
    "virtual": (_virtual, "is a virtual dataset"),
    "compact": (_compact, "neither in one piece nor in chunks"),
    "lzf": (
        lambda f: f.create_dataset("d", data=np.ones(9, "f4"), compression="lzf"),
        "through filter 32000; write it without compression or with gzip",
    ),
    "fletcher32": (
        lambda f: f.create_dataset("d", data=np.ones(9, "f4"), fletcher32=True),
        "through filter 3",
    ),
    "strings of any length": (
        lambda f: f.create_dataset("d", data=["a", "b"], dtype=h5py.string_dtype()),
        "other than plain whole or floating-point numbers",
    ),
    "lists of any length": (
        lambda f: f.create_dataset("d", (3,), h5py.vlen_dtype("f4")), "other than plain"
    ),
    "compound": (lambda f: f.create_dataset("d", (3,), "f4,i4"), "other than plain"),
    "object references": (
        lambda f: f.create_dataset("d", (3,), h5py.ref_dtype), "other than plain"
    ),
    "region references": (
        lambda f: f.create_dataset("d", (3,), h5py.regionref_dtype), "other than plain"
    ),
    "enumeration": (lambda f: f.create_dataset("d", (3,), "?"), "other than plain"),
    "complex": (lambda f: f.create_dataset("d", (3,), "c8"), "other than plain"),
    "long double": (lambda f: f.create_dataset("d", (3,), np.longdouble), "other than plain"),
    "opaque": (lambda f: f.create_dataset("d", (3,), "V2"), "other than plain"),
    "no numbers": (lambda f: f.create_dataset("d", data=h5py.Empty("f4")), "holds nothing"),
    "no values": (lambda f: f.create_dataset("d", (0,), "f4"), "wrong shape, found [0]"),
    "many axes": (lambda f: f.create_dataset("d", (1,) * 9, "f4"), "9 axes, allowed 8"),
    "never written": (
        lambda f: f.create_dataset("d", (3,), "f4"), "wrong number of bytes, found 0"
    ),
    "huge in chunks": (_big, "wrong number of chunks, found 0, allowed 1048576"),
    "huge in one piece": (
        lambda f: f.create_dataset("d", (1 << 40, 1 << 10), "f4"), "wrong number of bytes, found 0"
    ),
    "wider than any": (lambda f: f.create_dataset("d", (1 << 41,), "f4"), "wrong shape"),
    "inflating": (_inflating, "would inflate"),
    "deep": (_deep, "nests groups more than 32 deep"),
    "attributes": (_attributes, "'/g' has 300 attributes, allowed 256"),
    "unprintable name": (
        lambda f: f.__setitem__("a\x1b[31m", np.ones(2, "f4")), "an object with an impossible name"
    ),
    "name that is no text": (
        lambda f: f.__setitem__(b"\xff\xfe", np.ones(2, "f4")), "an object with an impossible name"
    ),
    "long name": (
        lambda f: f.__setitem__("x" * 300, np.ones(2, "f4")), "an object with an impossible name"
    ),
    "name with a space": (lambda f: f.__setitem__("a b", np.ones(2, "f4")), "with a space"),
    "one name twice": (
        lambda f: (f.__setitem__("a.b", np.ones(2, "f4")), f.__setitem__("a/b", np.ones(2, "f4"))),
        "two datasets have one name, found 'a.b'",
    ),
    "long model_config": (_long_config, "has a model_config of 1048578 bytes, allowed 1048576"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(STRUCTURES))
def test_structures_that_are_refused(case: str, tmp_path: Path, here: None) -> None:
    build, said = STRUCTURES[case]
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w", libver="latest" if case == "long model_config" else None) as file:
        file["good"] = np.ones(4, "f4")
        build(file)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_user_block_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "block.h5", "w", userblock_size=512) as file:
        file["good"] = np.ones(4, "f4")
    with pytest.raises(CheckpointError, match="is not an HDF5 file"):
        open_checkpoint(tmp_path / "block.h5")


def test_too_many_objects_and_chunks(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compressed(tmp_path / "weights.h5")
    open_checkpoint(path)
    monkeypatch.setattr(hdf5_child, "MAX_OBJECTS", 14)
    with pytest.raises(CheckpointError, match="holds more than 14 objects"):
        open_checkpoint(path)
    monkeypatch.undo()
    monkeypatch.setattr(hdf5, "_run_child", make_hdf5.examine_here)
    monkeypatch.setattr(hdf5_child, "MAX_CHUNKS", 36)
    with pytest.raises(CheckpointError, match="cut into more than 36 chunks; write larger ones"):
        open_checkpoint(path)


class _Endless:
    """A group that goes on naming links."""

    calls = 0

    @property
    def links(self) -> _Endless:
        return self

    def iterate(self, take: Callable[[bytes], bool | None]) -> None:
        while self.calls < 1000 and not take(b"x%d" % self.calls):
            self.calls += 1


def test_a_group_is_walked_no_further_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_child, "MAX_OBJECTS", 14)
    group = _Endless()
    with pytest.raises(Exception, match="holds more than 14 objects"):
        hdf5_child._Walk(h5py)._links("", group)
    assert group.calls == 14


# ---- what is refused: an answer that cannot be true ----

SIZE = 1000
ONE: dict[str, Any] = {"name": "/a/b", "shape": [5], "number": "<f4", "offset": 100, "nbytes": 20}
CHUNKS: dict[str, Any] = {
    "name": "/c", "shape": [5, 4], "number": "<f4", "chunk": [3, 4], "filters": [],
    "pieces": [[[0, 0], 0, 200, 48], [[3, 0], 0, 248, 48]],
}  # fmt: skip
DEFLATED = CHUNKS | {
    "filters": ["shuffle", "deflate"],
    "pieces": [[[0, 0], 0, 200, 30], [[3, 0], 0, 248, 31]],
}


def pieces(*changed: Any, of: dict[str, Any] = CHUNKS) -> dict[str, Any]:
    return of | {"pieces": list(changed)}


FIRST, SECOND = CHUNKS["pieces"]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([ONE | {"offset": 981}], "reaches beyond the end of the file, found 20 bytes"),
        ([ONE | {"offset": -4}], "reaches beyond the end of the file"),
        ([ONE | {"offset": None}], "was never written"),
        ([ONE | {"offset": 100.0}], "was never written"),
        ([ONE | {"offset": True}], "was never written"),
        ([ONE | {"nbytes": 24}], "wrong number of bytes, found 24, allowed 20"),
        ([ONE | {"shape": [1 << 40] * 8, "nbytes": 4 << 320}], "reaches beyond the end"),
        ([ONE | {"shape": [5, -1]}], "wrong shape"),
        ([ONE | {"shape": ["5"]}], "wrong shape"),
        ([ONE | {"shape": [True]}], "wrong shape"),
        ([ONE | {"shape": [1] * 9}], "wrong shape"),
        ([ONE | {"shape": None}], "wrong shape"),
        ([ONE | {"number": "=f4"}], "wrong number format"),
        ([ONE | {"number": "<f16"}], "wrong number format"),
        ([ONE | {"number": 4}], "wrong number format"),
        ([ONE | {"name": "/a/../b"}], "a path or an unprintable character"),
        ([ONE | {"name": "/a\\b"}], "a path or an unprintable character"),
        ([ONE | {"name": "/"}], "wrong length"),
        ([ONE | {"name": 3}], "a dataset without a name"),
        ([3], "a dataset without a name"),
        ([ONE, ONE], "two datasets have one name"),
        ([ONE, ONE | {"name": "x", "offset": 119}], "overlaps another, at byte 119"),
        ([ONE | {"offset": 240}, CHUNKS], "overlaps another"),
        ([CHUNKS | {"chunk": [3]}], "wrong number of axes in a chunk"),
        ([CHUNKS | {"chunk": [0, 4]}], "wrong chunk"),
        ([CHUNKS | {"chunk": None}], "wrong chunk"),
        ([CHUNKS | {"filters": ["deflate", "shuffle"]}], "wrong order of filters"),
        ([CHUNKS | {"filters": ["deflate", "deflate"]}], "wrong order of filters"),
        ([CHUNKS | {"filters": None}], "wrong order of filters"),
        ([CHUNKS | {"pieces": None}], "wrong number of chunks"),
        ([pieces(FIRST)], "wrong number of chunks, found 1, allowed 2"),
        ([pieces(FIRST, FIRST)], "has a chunk twice"),
        ([pieces(FIRST, [[2, 0], 0, 248, 48])], "a place on the grid of chunks"),
        ([pieces(FIRST, [[6, 0], 0, 248, 48])], "a place on the grid of chunks"),
        ([pieces(FIRST, [[-3, 0], 0, 248, 48])], "a place on the grid of chunks"),
        ([pieces(FIRST, [[3], 0, 248, 48])], "a place on the grid of chunks"),
        ([pieces(FIRST, [[3, 0, 0], 0, 248, 48])], "a place on the grid of chunks"),
        ([pieces(FIRST, [[3, 0], 0, 248, 40])], "wrong chunk of this size, found 40, allowed 48"),
        ([pieces(FIRST, [[3, 0], 0, 247, 48])], "overlaps another, at byte 247"),
        ([pieces(FIRST, [[3, 0], 0, 953, 48])], "reaches beyond the end"),
        ([pieces(FIRST, [[3, 0], 0, -1, 48])], "a place on the grid"),
        ([pieces(FIRST, [[3, 0], 0, 248.0, 48])], "a place on the grid"),
        ([pieces(FIRST, [[3, 0], 0, 248])], "allowed start, mask"),
        ([pieces(FIRST, None)], "allowed start, mask"),
        ([pieces(FIRST, [None, 0, 248, 48])], "allowed start, mask"),
        ([pieces(FIRST, [[3, 0], 0, 248, 0], of=DEFLATED)], "chunk of this size, found 0"),
        ([pieces(FIRST, [[3, 0], 2, 248, 31], of=DEFLATED)], "chunk of this size, found 31"),
        (
            [DEFLATED | {"shape": [1 << 20, 1 << 20], "chunk": [1 << 20, 1 << 20],
                         "pieces": [[[0, 0], 0, 200, 700]]}],
            "would inflate",
        ),
        ([DEFLATED | {"shape": [1 << 40] * 2, "chunk": [1, 1]}], "wrong number of chunks"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_true(entries: list[Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_directory(Path("x.h5"), entries, SIZE)
    assert said in str(caught.value)


def test_answers_that_can_be_true() -> None:
    found = check_directory(Path("x.h5"), [ONE, CHUNKS, DEFLATED | {"name": "d", "pieces": [
        [[0, 0], 0, 300, 30], [[3, 0], 2, 340, 48]]}], SIZE)  # fmt: skip
    assert list(found) == ["a.b", "c", "d"]
    assert found["c"].info().nbytes == 80


def test_too_many_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_directory, "MAX_TENSORS", 1)
    with pytest.raises(CheckpointError, match="holds too many datasets, found 2, allowed 1"):
        check_directory(Path("x.h5"), [ONE, CHUNKS], SIZE)


# ---- damaged chunks ----


@pytest.mark.parametrize(
    ("place", "said"), [(0, "Error -3"), (8, "Error -3|bytes"), (-1, "incorrect data check")]
)
def test_a_damaged_chunk_is_one_line(place: int, said: str, tmp_path: Path, here: None) -> None:
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        data = np.arange(400, dtype="f4").reshape(20, 20)
        file.create_dataset("d", data=data, chunks=(20, 20), compression="gzip")
        chunk = file["d"].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    raw[chunk.byte_offset + place % chunk.size] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"has a damaged chunk, found .*({said})"):
        open_checkpoint(path).tensor("d")


@pytest.mark.parametrize(("values", "cut"), [(399, 0), (401, 0), (400, 4), (10_000_000, 0)])
def test_a_chunk_that_inflates_to_another_size(
    values: int, cut: int, tmp_path: Path, here: None
) -> None:
    """Also one without its checksum, and a bomb, of which no more than its due is inflated."""
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("d", (20, 20), "f4", chunks=(20, 20), compression="gzip")
        stream = zlib.compress(np.ones(values, "f4").tobytes())
        dataset.id.write_direct_chunk((0, 0), stream[: len(stream) - cut])
    checkpoint = open_checkpoint(path)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="has a damaged chunk, found .*allowed 1600"):
            checkpoint.tensor("d")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path, here: None) -> None:
    path = ours(tmp_path / "base.h5")
    checkpoint = open_checkpoint(path)
    os.truncate(path, checkpoint.info("layers.1.down").offset + 8)
    with pytest.raises(CheckpointError, match="the file has become shorter"):
        checkpoint.tensor("layers.1.down")


# ---- the superblock ----


@pytest.mark.parametrize("libver", [None, "latest"])
@pytest.mark.parametrize("left", [0, 7, 8, 9, 40, 63, 64, 96, 1000, -1])
def test_a_file_cut_short(libver: str | None, left: int, tmp_path: Path, here: None) -> None:
    path = compressed(tmp_path / "weights.h5", libver)
    raw = path.read_bytes()
    path.write_bytes(raw[:left])
    with pytest.raises(CheckpointError, match="is cut short|is not an HDF5 file"):
        open_checkpoint(path)


@pytest.mark.parametrize("libver", [None, "latest"])
@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        ((8, 8), b"\x09", "unknown version of HDF5, found 9, allowed 0 to 3"),
        ((13, 9), b"\x04", "file offsets of another width, found 4, allowed 8"),
        ((24, 12), b"\x01", "does not begin at its first byte"),
        ((46, 34), b"\x01", "is cut short"),
        ((40, 28), b"\0" * 8, "is cut short"),
    ],
)
def test_a_superblock_that_cannot_be(
    libver: str | None, offset: tuple[int, int], value: bytes, said: str, tmp_path: Path
) -> None:
    path = compressed(tmp_path / "weights.h5", libver)
    raw = bytearray(path.read_bytes())
    place = offset[raw[8] >= 2]
    raw[place : place + len(value)] = value
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(path)


# ---- the child process ----


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import time; time.sleep(60)", "was not examined after 1.5 s and was given up"),
        ("import os; os.kill(os.getpid(), 11)", "crash or break its limits.*found status -11"),
        ("raise SystemExit(3)", "found status 3"),
        (
            "import time\nwhile True: print('x' * 1000000); time.sleep(0.02)",
            "crash or break its limits",
        ),
        ("print('[' * 100000)", "made no JSON of it"),
        ("print('[]')", "made no directory of it"),
        ("print('{}')", "made no directory of it"),
        ("", "made no JSON of it"),
        (
            'print(\'{"datasets": {}, "model_config": null}\')',
            "made no list of datasets of it",
        ),
        ('print(\'{"datasets": [], "model_config": 1}\')', "a model_config that is no text"),
        ("print('{\"error\": \"a' + r'\\u001b' + 'b\"}')", r": a\?b$"),
    ],
)
def test_whatever_the_child_does_is_one_line(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "_CHILD", ("-c", code))
    monkeypatch.setattr(hdf5, "_SECONDS", 1.5 if "sleep(60)" in code else 4.0)
    monkeypatch.setattr(hdf5, "_MAX_REPLY", 1 << 20)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(ours(tmp_path / "base.h5"))
    assert time.monotonic() - began < 15


def in_child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_limits_of_the_child(tmp_path: Path) -> None:
    ran = in_child(
        "import resource as r; from flashlite.checkpoint import hdf5_child as c\n"
        "c._limit()\n"
        "try: bytearray(3 << 30)\n"
        "except MemoryError: print('memory')\n"
        f"try: print(open({str(tmp_path / 'x')!r}, 'wb', buffering=0).write(b'x'))\n"
        "except OSError as e: print('write', e.errno)\n"
        "c._open_nothing_more()\n"
        "try: open('/etc/passwd')\n"
        "except OSError as e: print('open', e.errno)\n"
        "print(r.getrlimit(r.RLIMIT_CPU), r.getrlimit(r.RLIMIT_AS), flush=True)\n"
    )
    limits = f"{(12, 12)} {(1 << 30, 1 << 30)}"
    expected = ["memory", f"write {errno.EFBIG}", f"open {errno.EMFILE}", limits]
    assert ran.stdout.splitlines() == expected, ran.stderr


def test_the_child_can_open_no_other_file(tmp_path: Path) -> None:
    """Were a check of links missing, the operating system would still refuse."""
    other = ours(tmp_path / "other.h5")
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        file["link"] = h5py.ExternalLink(str(other), "/embed")
    ran = in_child(
        "import h5py; from flashlite.checkpoint import hdf5_child as c\n"
        f"file = h5py.h5f.open({os.fsencode(path)!r}, h5py.h5f.ACC_RDONLY)\n"
        "print(h5py.h5o.open(file, b'link'))\n"
        "c._limit(); c._open_nothing_more()\n"
        "try: print(h5py.h5o.open(file, b'link'))\n"
        "except Exception as error: print('refused')\n"
    )
    assert "DatasetID" in ran.stdout.splitlines()[0]
    assert ran.stdout.splitlines()[1] == "refused"


def test_the_child_sets_its_limits_and_loads_no_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(tmp_path))
    monkeypatch.setenv("HDF5_DRIVER", "core")
    report = (
        "import os, json; from flashlite.checkpoint import hdf5_child as c\n"
        "called = []\n"
        "c._limit = lambda: called.append('limit')\n"
        "c._open_nothing_more = lambda: called.append('closed')\n"
        "names = sorted(k for k in os.environ if k.startswith('HDF5_'))\n"
        "import io, sys; sys.stdout, out = io.StringIO(), sys.stdout; c.main()\n"
        "print(json.dumps({'error': f'{called} {names} ' + os.environ['HDF5_PLUGIN_PRELOAD']}), "
        "file=out)"
    )
    monkeypatch.setattr(hdf5, "_CHILD", ("-c", report))
    said = "['limit', 'closed'] ['HDF5_PLUGIN_PRELOAD', 'HDF5_USE_FILE_LOCKING'] ::"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ours(tmp_path / "base.h5"))
    assert str(caught.value).endswith(said)


# ---- files of ours ----


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"{", "model_config is not JSON"),
        (b"[" * 5000, "model_config is not JSON"),
        (b'{"class_name": "flashlite"}', "model_config is malformed"),
        (b'{"class_name": "flashlite", "config": {"version": 2}}', "unknown version"),
        (b'{"class_name": "flashlite", "config": {"version": 1}}', "names no architecture"),
        (
            b'{"class_name": "flashlite", "config": {"version": 1, "architecture": "llama"}}',
            "allowed spec and licence",
        ),
    ],
)
def test_a_broken_model_config(config: bytes, said: str, tmp_path: Path, here: None) -> None:
    path = ours(tmp_path / "base.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = np.bytes_(config)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "config",
    [np.bytes_(b'{"class_name": "Functional"}'), '{"class_name": "flashlite"}', 3, [b"{}"]],
)
def test_a_model_config_of_others_describes_nothing(
    config: Any, tmp_path: Path, here: None
) -> None:
    path = ours(tmp_path / "base.h5")
    with h5py.File(path, "r+") as file:
        del file.attrs["model_config"]
        file.attrs["model_config"] = config
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == ""
    assert "tokenizer.json" in checkpoint.tensors  # no text of ours


def test_the_tokenizer_comes_back(tiny_gguf: Path, tmp_path: Path, here: None) -> None:
    files = build_tokenizer(open_checkpoint(tiny_gguf))
    checkpoint = open_checkpoint(ours(tmp_path / "base.h5", tokenizer=files))
    assert build_tokenizer(checkpoint) == files
    assert build_tokenizer_checked(checkpoint) == files
    assert "tokenizer.json" not in checkpoint.tensors
    assert checkpoint.metadata["general.license"] == "MIT"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("json", b"{", "is not JSON"),
        ("json", b"\xff", "is not UTF-8 at byte 0"),
        ("special_tokens", b"[]", "special tokens: found list"),
        ("special_tokens", b'{"bos": 9999999, "eos": [], "add_bos": true, "control": []}', "bos"),
        ("chat_template", b"{% for %}", "template"),
        ("chat_template", b"{{ ''.__class__ }}", "template"),
    ],
)
def test_a_hostile_tokenizer_is_one_line(
    name: str, text: bytes, said: str, tiny_gguf: Path, tmp_path: Path, here: None
) -> None:
    files = build_tokenizer(open_checkpoint(tiny_gguf))
    path = ours(tmp_path / "base.h5", tokenizer=files)
    with h5py.File(path, "r+") as file:
        del file["tokenizer"][name]
        file["tokenizer"][name] = np.frombuffer(text, "u1")
    from flashlite.errors import FlashliteError

    with pytest.raises(FlashliteError, match=said):
        build_tokenizer_checked(open_checkpoint(path))


def test_a_text_that_is_none(tmp_path: Path, here: None) -> None:
    path = ours(tmp_path / "base.h5")
    with h5py.File(path, "r+") as file:
        del file["tokenizer/json"]
        file["tokenizer/json"] = np.ones(4, "f4")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no text, found F32"):
        open_checkpoint(path)


# ---- writing ----


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ours(tmp_path / "base.h5").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        ours(tmp_path / "base.h5")
    assert caught.value.filename == str(tmp_path / "base.h5")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base.h5"]
    assert (tmp_path / "base.h5").read_bytes() == old


def test_a_quota_met_by_a_real_write_leaves_nothing(tmp_path: Path) -> None:
    """The file may grow to less than it needs, and the system says so at any call."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - EFBIG
            ours(tmp_path / "base.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_source_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    arrays = make_hdf5.values()
    arrays.pop("layers.1.down")
    with pytest.raises(KeyError):
        write_hdf5(
            tmp_path / "base.h5",
            make_hdf5.SPEC.shapes(),
            arrays.__getitem__,
            architecture="llama",
            spec={},
            tokenizer=make_hdf5.NO_TEXT,
        )
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = ours(tmp_path / "base.h5", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(v.nbytes for v in make_hdf5.values().values())
    assert json.loads(h5py.File(path).attrs["model_config"])["config"]["spec"]["d_model"] == 16
