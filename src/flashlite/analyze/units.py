"""`units_of`: which matrices share one format, and so are measured and decided on together.

layers.I.qkv       q, k, v: they read the same inputs, one kernel call
layers.I.o
layers.I.gate_up   gate, up
layers.I.down
embed              the look-up table, and the head where it is tied
head               where it is not
"""

from __future__ import annotations

from dataclasses import dataclass

from flashlite.model.spec import ModelSpec

__all__ = ["UnitShape", "units_of"]

_PARTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class UnitShape:
    """One unit: its canonical tensors and their sizes."""

    name: str
    layer: int | None  # None: before or after all layers
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def parameters(self) -> int:
        """Weights of all its tensors."""
        return sum(rows * cols for rows, cols in self.shapes)


def units_of(spec: ModelSpec) -> tuple[UnitShape, ...]:
    """Every unit of a model, in forward order; each matrix is in exactly one."""
    shapes = {name: (shape[0], shape[1]) for name, shape in spec.shapes() if len(shape) == 2}
    found = [UnitShape("embed", None, ("embed",), (shapes["embed"],))]
    for i in range(spec.n_layers):
        for part, kinds in _PARTS.items():
            names = tuple(f"layers.{i}.{kind}" for kind in kinds)
            sizes = tuple(shapes[name] for name in names)
            found.append(UnitShape(f"layers.{i}.{part}", i, names, sizes))
    if not spec.tied_head:
        found.append(UnitShape("head", None, ("head",), (shapes["head"],)))
    return tuple(found)
