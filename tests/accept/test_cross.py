"""Other targets: the same greedy tokens on Arm, and libraries that build for macOS and Windows."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.codegen.emit import emit_model
from flashlite.codegen.target import host_isa, host_target, parse_target
from flashlite.codegen.toolchain import CSRC
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import load_library
from flashlite.runtime.prepare import compile_artifact, find_artifact

pytestmark = [
    pytest.mark.accept,
    pytest.mark.skipif(
        importlib.util.find_spec("ziglang") is None,
        reason="zig is not installed: pip install 'flashlite[compiler]'",
    ),
]

PROMPTS = ["The capital of France is", "Once upon a time", "def add(a, b):", "Buenos días, me"]
NEW = 12


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return find_artifact("smollm2-135m-instruct")


def greedy(artifact: Artifact, isa: str, ids: list[int]) -> list[int]:
    library = load_library(compile_artifact(artifact, host_target(isa)))
    tokens: list[int] = []
    with Engine(library, load_weights(artifact), max_tokens=128, threads=2) as engine:
        sequence = engine.new_sequence(128)
        step = ids
        for _ in range(NEW):
            logits = engine.step([Work(sequence, step)])
            step = [int(logits[0].argmax())]
            tokens += step
    return tokens


def test_arm_gives_the_same_greedy_tokens(artifact: Artifact, tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed: apt-get install qemu-user")
    (tmp_path / "model.c").write_text(emit_model(artifact, "plain"))
    weights = tmp_path / "weights.bin"
    load_weights(artifact).tofile(weights)
    sources = [
        "fl_engine.c",
        "fl_attention.c",
        "fl_encoder.c",
        "fl_head.c",
        "fl_ops.c",
        "fl_os.c",
        "fl_sample.c",
        "fl_kernels_plain.c",
    ]
    program = tmp_path / "greedy"
    flags = ["-std=gnu11", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-g0"]
    command: list[str | Path] = [
        sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static",
        *flags, f"-I{CSRC}", Path(__file__).with_name("greedy_main.c"), tmp_path / "model.c",
        *(CSRC / name for name in sources), "-o", program,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    tokenizer = Tokenizer(load_texts(artifact))
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        words: list[str | Path] = [
            emulator,
            "-cpu",
            "cortex-a72",
            program,
            weights,
            str(NEW),
            *map(str, ids),
        ]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        arm = [int(line) for line in done.stdout.split()]
        print(f"\n{prompt!r} -> {tokenizer.decode(arm)!r}")
        assert arm == greedy(artifact, "plain", ids)
        assert arm == greedy(artifact, host_isa(), ids)


@pytest.mark.parametrize(
    ("target", "magic"),
    [
        ("aarch64-linux-gnu", b"\x7fELF"),
        ("aarch64-macos", b"\xcf\xfa\xed\xfe"),
        ("x86_64-windows-gnu", b"MZ"),
        ("x86_64-linux-gnu", b"\x7fELF"),
    ],
)
def test_other_targets_build(artifact: Artifact, target: str, magic: bytes) -> None:
    library = compile_artifact(artifact, parse_target(target))
    assert library.read_bytes()[: len(magic)] == magic


def test_zig_and_the_system_compiler_agree(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = Tokenizer(load_texts(artifact)).encode(PROMPTS[0])
    expected = greedy(artifact, host_isa(), ids)
    monkeypatch.setenv("PATH", str(tmp_path))  # no cc: zig takes over
    assert greedy(artifact, host_isa(), ids) == expected
    np.testing.assert_array_equal(expected, greedy(artifact, host_isa(), ids))
