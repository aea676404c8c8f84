"""`Tail`: the last layers and the final norm of a quantized model while they are tuned.

    float weights ── Grid.values ──> what the kernels will see ── forward, backward ──> gradients
          ^                                                                                │
          └────────────────────────────── AdamW <──────────────────────────────────────────┘

Matrices stay on the grid of the format they are stored in; norms and biases are floats as they are.
`arrays` gives the packed tensors exactly as the last step saw them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.fake_quant import Grid
from flashlite.compress.pack import Packed, pack, unpack
from flashlite.compress.tail_cache import Floats, Model
from flashlite.errors import CompressError
from flashlite.model.differentiable import Differentiable, Tensor, require_torch
from flashlite.model.spec import ModelSpec

__all__ = ["Tail", "tail_shapes"]

Arrays = dict[str, NDArray[Any]]


def tail_shapes(spec: ModelSpec, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The canonical tensors of the last layers and the final norm, in forward order.

    Raises:
        CompressError: the model has not that many layers.
    """
    if not 1 <= layers <= spec.n_layers:
        raise CompressError(f"{layers} layers to tune, the model has 1 to {spec.n_layers}")
    first = spec.n_layers - layers
    for name, shape in spec.shapes():
        kind, _, rest = name.partition(".")
        if name == "final_norm" or (kind == "layers" and int(rest.split(".")[0]) >= first):
            yield name, shape


class Tail:
    """Weights in training; every method is deterministic for a given number of threads."""

    def __init__(
        self,
        source: Model,
        student: Model,
        packed: Callable[[str], Packed],
        layers: int,
    ) -> None:
        """Start on the codes of the quantized model, as near to the source as they allow.

        Args:
            source: the model in FP32.
            student: the quantized one.
            packed: its packed matrices by canonical name.
            layers: how many at the end are tuned.

        Raises:
            CompressError: the model has not that many layers.
        """
        self._torch = torch = require_torch("fine-tuning")
        self.spec = student.spec
        self.layers = layers
        self.grids: dict[str, Grid] = {}
        self.floats: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}  # leaves: their gradients are those of `floats`
        self._formats: dict[str, str] = {}
        for name, shape in tail_shapes(self.spec, layers):
            stored = torch.from_numpy(np.array(student.weights(name), np.float32))
            if len(shape) == 2:
                codes = unpack(packed(name), shape[0], shape[1])
                self.grids[name] = grid = Grid.of(codes)
                self.floats[name] = grid.start(
                    stored, torch.from_numpy(np.array(source.weights(name), np.float32))
                )
            else:
                self.floats[name] = stored
        self._forward = Differentiable(self.spec, self.seen)
        self.refresh()

    def refresh(self) -> None:
        """Bring what the forward sees in line with the float weights."""
        for name, weights in self.floats.items():
            grid = self.grids.get(name)
            seen = weights.clone() if grid is None else grid.values(weights)
            self.seen[name] = seen.requires_grad_()

    def search(self) -> None:
        """Search the scales of every matrix again."""
        for name, grid in self.grids.items():
            self.grids[name] = Grid.search(self.floats[name], grid.format, name)

    def states(self, inputs: Floats) -> Tensor:
        """What the head reads, [texts, positions, d_model], given what layer L-N reads."""
        x = self._torch.from_numpy(inputs)
        for i in range(self.spec.n_layers - self.layers, self.spec.n_layers):
            x = self._forward.layer(i, x)
        return self._forward.final_norm(x)

    def take_gradients(self) -> None:
        """Hand the gradients of what the forward saw to the float weights."""
        for name, weights in self.floats.items():
            weights.grad = self.seen[name].grad
            self.seen[name].grad = None

    def snapshot(self) -> Arrays:
        """Float weights and grids, to be kept or written."""
        state: Arrays = {f"weight/{n}": w.detach().numpy().copy() for n, w in self.floats.items()}
        for name, grid in self.grids.items():
            state[f"scales/{name}"] = grid.scales
            if grid.mins is not None:
                state[f"mins/{name}"] = grid.mins
        return state

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go back to a snapshot."""
        with self._torch.no_grad():
            for name, weights in self.floats.items():
                weights.copy_(self._torch.from_numpy(state[f"weight/{name}"]))
        for name, grid in self.grids.items():
            mins = state.get(f"mins/{name}")
            self.grids[name] = Grid(grid.format, state[f"scales/{name}"], mins)
        self.refresh()

    def arrays(self) -> Arrays:
        """The tensors as an artifact stores them, by stored name."""
        stored: Arrays = {}
        for name, weights in self.floats.items():
            if name not in self.grids:
                stored[name] = weights.detach().numpy().astype(np.float32)
                continue
            matrix = pack(self.grids[name].quantized(weights.detach()))
            stored[f"{name}.codes"] = matrix.codes
            stored[f"{name}.scales"] = matrix.scales
            if matrix.mins is not None:
                stored[f"{name}.mins"] = matrix.mins
        return stored
