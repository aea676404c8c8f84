"""How values of an artifact are written in C: offsets, packed matrices, floats, digests."""

from __future__ import annotations

import numpy as np

from flashlite.artifact.format import Artifact
from flashlite.errors import UnsupportedTarget

__all__ = ["float_literal", "hex_digest", "offset", "packed", "table"]

_FORMATS = {"q8": "FL_Q8", "q6": "FL_Q6", "q5": "FL_Q5", "q4": "FL_Q4", "q4m": "FL_Q4M"}


def packed(artifact: Artifact, name: str, rows: str, cols: str) -> str:
    """The `fl_packed` of a matrix; its sizes by the names of constants.

    Raises:
        UnsupportedTarget: it is stored in a format that no kernel runs.
    """
    plan_format = artifact.plan.formats[name]
    if plan_format not in _FORMATS:
        raise UnsupportedTarget(
            f"{name} is stored as {plan_format}, and matrices run as {', '.join(_FORMATS)}; "
            "quantize the model again with one of these"
        )
    mins = offset(artifact, f"{name}.mins") if plan_format == "q4m" else "FL_NONE"
    bias = f"{name}_bias"
    return (
        f"{{{_FORMATS[plan_format]}, {rows}, {cols}, "
        f"{offset(artifact, f'{name}.codes')}, {offset(artifact, f'{name}.scales')}, {mins}, "
        f"{offset(artifact, bias) if bias in artifact.tensors else 'FL_NONE'}}}"
    )


def table(artifact: Artifact, name: str, rows: str, cols: str) -> str:
    """The `fl_table` of rows that are looked up.

    Raises:
        UnsupportedTarget: as `packed`.
    """
    if artifact.plan.formats[name] == "f16":
        return f"{{.halves = {offset(artifact, name)}}}"
    return f"{{.packed = {packed(artifact, name, rows, cols)}, .halves = FL_NONE}}"


def offset(artifact: Artifact, stored: str) -> str:
    """Where a stored array starts, in bytes of the weights."""
    return str(int(artifact.tensors[stored].offset))


def float_literal(value: float) -> str:
    """A float of C, in hex: nothing is lost."""
    return f"{float(np.float32(value)).hex()}f"


def hex_digest(digest: str) -> str:
    """A digest as 64 hexadecimal digits."""
    return f"{int(digest, 16):064x}"
