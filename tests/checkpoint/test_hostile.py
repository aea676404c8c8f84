"""Files made to hurt: whatever they say, one clear error, soon, and in little memory."""

from __future__ import annotations

import ast
import json
import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_gguf import Field, Tensor, encode, gguf_bytes, tiny_model

import flashlite
from flashlite.checkpoint import blocks
from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import CheckpointError

BOUNDARY = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
MEMORY_LIMIT = 200 << 20
SECONDS = 2


def small_model() -> tuple[bytes, list[Field], int]:
    """Every kind of metadata and several formats in a header of a few hundred bytes."""
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": 5,
        "x.flag": True,
        "x.flags": np.array([True, False]),
        "x.scores": np.array([0.5, -1.0], dtype=np.float32),
        "x.words": ["<s>", "▁a", ""],
        "x.template": "{{ messages }}",
    }
    rng = np.random.default_rng(3)
    tensors = {
        "a": encode(rng.normal(0, 1, (3, 64)), "Q4_1"),
        "b": encode(rng.normal(0, 1, (2, 2, 7)), "F16"),
        "c": encode(rng.normal(0, 1, (2, 32)), "Q8_0"),
    }
    return gguf_bytes(metadata, tensors)


def read_all(path: Path, original: bytes) -> bool:
    """Whether the file opens; then each tensor must be the very bytes of the file."""
    try:
        checkpoint = open_checkpoint(path)
        for name, info in checkpoint.tensors.items():
            raw = checkpoint.raw(name).tobytes()
            assert 0 <= info.offset <= len(original) - info.nbytes
            assert raw == original[info.offset : info.offset + info.nbytes]
            values = checkpoint.tensor(name)
            assert values.shape == info.shape
            assert np.isfinite(values).all()
    except CheckpointError as error:
        check_message(error)
        return False
    return True


def check_message(error: CheckpointError, contains: str = "") -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 800
    assert contains in str(error)


# ---- cuts ---------------------------------------------------------------------------------------


def test_the_tiny_model_cut_at_every_byte_of_its_header(tmp_path: Path) -> None:
    raw, _, data = gguf_bytes(*tiny_model())
    path = tmp_path / "tiny.gguf"
    path.write_bytes(raw)
    open_checkpoint(path)
    for size in range(data - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_a_small_model_cut_at_every_byte(tmp_path: Path) -> None:
    raw, _, _ = small_model()
    path = tmp_path / "small.gguf"
    path.write_bytes(raw)
    needed = max(info.offset + info.nbytes for info in open_checkpoint(path).tensors.values())
    for size in range(len(raw) - 1, -1, -1):
        os.truncate(path, size)
        assert read_all(path, raw) == (size >= needed), size


def test_a_hugging_face_model_cut_at_every_byte(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    header = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    text = json.dumps(header).encode()
    raw = struct.pack("<Q", len(text)) + text + np.ones(6, "<f4").tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert read_all(path, raw)
    for size in range(len(raw) - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_smollm2_cut_at_200_random_points(smollm2_gguf: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(smollm2_gguf)
    header = min(info.offset for info in whole.tensors.values())
    end = max(info.offset + info.nbytes for info in whole.tensors.values())
    rng = random.Random(11)
    cuts = {rng.randrange(header) for _ in range(100)} | {rng.randrange(end) for _ in range(100)}
    # Only the header is copied; the data is a hole of the right size.
    path = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as source:
        path.write_bytes(source.read(header))
    os.truncate(path, end)
    assert open_checkpoint(path).tensors.keys() == whole.tensors.keys()
    for size in sorted(cuts, reverse=True):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match="beyond the end of the file"):
            open_checkpoint(path)


# ---- integers -----------------------------------------------------------------------------------


def boundary_files() -> Iterator[tuple[str, int, bytes]]:
    raw, fields, _ = small_model()
    for field in fields:
        for value in BOUNDARY:
            if value < 1 << 8 * field.width:
                changed = bytearray(raw)
                changed[field.offset : field.offset + field.width] = value.to_bytes(
                    field.width, "little"
                )
                yield field.name, value, bytes(changed)


def test_every_integer_field_at_every_boundary(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    count, opened = 0, []
    for name, value, changed in boundary_files():
        path.write_bytes(changed)
        count += 1
        if read_all(path, changed):
            opened.append((name, value))
    assert count >= 300
    # What opens either is the file unchanged or means something else and is still sound.
    sound = (
        {("value of llama.block_count", value) for value in BOUNDARY}
        | {("value of x.flag", 0), ("type of x.flag", 0), ("type of x.flag", 1)}
        | {("element type of x.flags", 0), ("element type of x.flags", 1)}
    )
    surprises = [case for case in opened if case not in sound and not changed_nothing(*case)]
    assert surprises == []


def changed_nothing(name: str, value: int) -> bool:
    raw, fields, _ = small_model()
    field = next(field for field in fields if field.name == name)
    return raw[field.offset : field.offset + field.width] == value.to_bytes(field.width, "little")


# ---- time and memory ----------------------------------------------------------------------------


def many_keys() -> bytes:
    """As many keys as fit a megabyte."""
    count = 59_000
    keys: list[tuple[str, object]] = [(f"{i:x}", np.uint8(0)) for i in range(count)]
    return gguf_bytes({}, {}, keys=keys)[0]


def many_empty_strings() -> bytes:
    return gguf_bytes({"general.architecture": "llama", "x": [""] * 124_000}, {})[0]


def many_short_strings() -> bytes:
    return gguf_bytes(
        {"general.architecture": "llama", "x": [f"{i:05}" for i in range(76_000)]}, {}
    )[0]


def many_tensors() -> bytes:
    tensor = Tensor("F32", (1,), b"")
    raw = gguf_bytes({"general.architecture": "l"}, [(f"{i:x}", tensor) for i in range(26_000)])[0]
    return raw[:1_000_000]


def claims_everything() -> bytes:
    """Counts and lengths as large as the limits allow, with nothing behind them."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, 65536, 65536)
    raw += struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 24)
    return raw.ljust(900_000, b"\0")


def overlong_string() -> bytes:
    raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    raw += struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 1 << 25)
    return raw.ljust(900_000, b"x")


def nested_arrays() -> bytes:
    raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    return raw + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 80_000


def one_row_of_a_petabyte() -> bytes:
    return gguf_bytes({"general.architecture": "l"}, {"w": Tensor("F32", (1 << 40,), b"")})[0]


def json_file(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def json_deep() -> bytes:
    return json_file(b'{"a":' + b"[" * 990_000)


def json_objects() -> bytes:
    return json_file(b'{"a":[' + b"{}," * 330_000 + b"{}]}")


def json_names() -> bytes:
    entry = b'"%x":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    return json_file(b"{" + b",".join(entry % i for i in range(16_000)) + b"}") + bytes(4)


def json_same_name() -> bytes:
    return json_file(b"{" + b'"a":0,' * 160_000 + b'"a":0}')


def json_long_number() -> bytes:
    return json_file(b'{"a":' + b"9" * 990_000 + b"}")


def json_escapes() -> bytes:
    return json_file(b'{"' + b"\\ud83d\\ude00" * 82_000 + b'":0}')


BOMBS: list[Callable[[], bytes]] = [
    many_keys,
    many_empty_strings,
    many_short_strings,
    many_tensors,
    claims_everything,
    overlong_string,
    nested_arrays,
    one_row_of_a_petabyte,
    json_deep,
    json_objects,
    json_names,
    json_same_name,
    json_long_number,
    json_escapes,
]

_OPEN = """
import sys, time
from pathlib import Path
from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import CheckpointError
for name in sys.argv[1:]:
    start = time.process_time()
    try:
        open_checkpoint(Path(name))
        result = "opened"
    except CheckpointError as error:
        result = "refused" if str(error).isprintable() else "unprintable"
    seconds = time.process_time() - start
    # Not ru_maxrss: a child inherits that of its parent.
    peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]
    print(result, seconds, int(peak) * 1024)
"""


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_a_file_under_a_megabyte_costs_little(tmp_path: Path, bomb: Callable[[], bytes]) -> None:
    raw = bomb()
    assert len(raw) <= 1 << 20
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    path = tmp_path / "bomb"
    path.write_bytes(raw)

    def limit() -> None:  # a bomb must not take the machine with it
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit,
        env=os.environ | {"PYTHONPATH": str(Path(flashlite.__path__[0]).parent)},
    )
    result, seconds, peak = done.stdout.split()
    expected = "opened" if bomb in (many_empty_strings, many_short_strings) else "refused"
    assert result == expected, done.stdout
    assert float(seconds) <= SECONDS
    assert int(peak) <= MEMORY_LIMIT


# ---- mutation -----------------------------------------------------------------------------------

SMALL, SMALL_FIELDS, SMALL_DATA = small_model()

edits = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, SMALL_DATA - 1), st.binary(min_size=1, max_size=8)),
    st.tuples(
        st.just("field"),
        st.sampled_from(SMALL_FIELDS),
        st.one_of(st.sampled_from(BOUNDARY), st.integers(0, 200), st.integers(0, 2**64 - 1)),
    ),
    st.tuples(st.just("insert"), st.integers(0, SMALL_DATA), st.binary(max_size=40)),
    st.tuples(st.just("delete"), st.integers(0, SMALL_DATA), st.integers(1, 40)),
)


def edited(edit: tuple[str, object, object], raw: bytes) -> bytes:
    match edit:
        case ("byte", int(at), bytes(new)):
            return raw[:at] + new + raw[at + len(new) :]
        case ("field", Field() as field, int(value)):
            new = (value % (1 << 8 * field.width)).to_bytes(field.width, "little")
            return raw[: field.offset] + new + raw[field.offset + field.width :]
        case ("insert", int(at), bytes(new)):
            return raw[:at] + new + raw[at:]
        case ("delete", int(at), int(count)):
            return raw[:at] + raw[at + count :]
    raise TypeError(edit)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "small.gguf"


@settings(
    max_examples=1200,
    deadline=2000,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(edits, min_size=1, max_size=4))
def test_mutated_files_are_refused_or_read_true(
    scratch: Path, changes: list[tuple[str, object, object]]
) -> None:
    raw = SMALL
    for change in changes:
        raw = edited(change, raw)
    scratch.write_bytes(raw)
    read_all(scratch, raw)


@settings(max_examples=600, deadline=2000, derandomize=True, database=None)
@given(st.sampled_from(sorted(blocks.LAYOUTS)), st.data())
def test_any_block_decodes_to_finite_values_or_is_refused(dtype: str, data: st.DataObject) -> None:
    layout = blocks.LAYOUTS[dtype]
    raw = data.draw(st.binary(min_size=layout.nbytes, max_size=layout.nbytes))
    info = blocks.TensorInfo("w", (layout.block,), dtype, Path("m"), 0, layout.nbytes)
    try:
        values = blocks.dequantize(info, np.frombuffer(raw, np.uint8))
    except CheckpointError as error:
        check_message(error, "not finite")
    else:
        assert np.isfinite(values).all()


# ---- code that would run ------------------------------------------------------------------------

FORBIDDEN = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def imported(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call):
            names |= {
                str(argument.value).split(".")[0]
                for argument in node.args
                if isinstance(argument, ast.Constant)
                and getattr(node.func, "id", getattr(node.func, "attr", ""))
                in {"__import__", "import_module"}
            }
            names |= {
                "pickle"
                for keyword in node.keywords
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True)
            }
    return names


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from marshal import loads",
        "import os, shelve",
        "__import__('pickle')",
        "importlib.import_module('dill.x')",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_for_unpicklers_finds_them(source: str) -> None:
    assert imported(source) & FORBIDDEN


def test_nothing_in_flashlite_can_unpickle() -> None:
    files = sorted(Path(flashlite.__path__[0]).rglob("*.py"))
    assert len(files) > 5
    for file in files:
        assert not imported(file.read_text(encoding="utf-8")) & FORBIDDEN, file
