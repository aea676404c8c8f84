"""What `inspect` says of an artifact: the format of every tensor, its true shape and its bytes."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from small import quantize_small

from flashlite.cli import inspect
from flashlite.compress.plan import stored_shapes


def test_tensors_are_counted_by_format(tiny_gguf: Path, tmp_path: Path) -> None:
    small = quantize_small(tiny_gguf, "q5", tmp_path / "tiny.fl")
    shapes = stored_shapes(small.artifact.spec, small.artifact.plan)
    result = CliRunner().invoke(
        inspect.command, [str(tmp_path / "tiny.fl"), "--tensors", "--json"], catch_exceptions=False
    )
    found = json.loads(result.output.splitlines()[-1])
    assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == shapes
    kinds = {kind["type"]: kind for kind in found["types"]}
    assert set(kinds) == {"q5", "f32"}
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    weights = sum(rows * cols for rows, cols in matrices)
    assert kinds["q5"]["tensors"] == len(matrices)
    assert kinds["q5"]["values"] == weights
    # 5 bits a code and 16 a scale for every 32.
    padded = sum(-(-rows // 16) * 16 * -(-cols // 32) * 32 for rows, cols in matrices)
    assert kinds["q5"]["bytes"] == padded * 5.5 / 8
