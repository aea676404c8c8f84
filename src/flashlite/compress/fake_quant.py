"""`Grid`: what a format makes of weights that are still changing, in PyTorch.

The forward of training sees the weights as the kernels will; the gradient passes to the float
weights as if nothing had been rounded (straight-through estimator, Bengio et al. 2013,
arXiv:1308.3432).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import CODE_BYTES, CODE_DTYPE, GROUP, Quantized
from flashlite.compress.quantize import quantize_matrix
from flashlite.model.differentiable import Tensor, require_torch

__all__ = ["Grid"]

_WITHIN = 0.45  # of a step: how far a start may lie from its code


@dataclass(frozen=True)
class Grid:
    """The scales of one matrix [rows, cols], and the codes a weight may take."""

    format: str
    scales: NDArray[np.float16]  # [rows, groups]
    mins: NDArray[np.float16] | None

    @classmethod
    def of(cls, matrix: Quantized) -> Grid:
        """The grid a quantized matrix lies on."""
        return cls(matrix.format, matrix.scales, matrix.mins)

    @classmethod
    def search(cls, weights: Tensor, fmt: str, name: str) -> Grid:
        """The best grid for these weights.

        Raises:
            CompressError: as `quantize_matrix`.
        """
        return cls.of(quantize_matrix(weights.detach().numpy(), fmt, name=name))

    def values(self, weights: Tensor) -> Tensor:
        """The weights as the kernels will see them, [rows, cols]; no gradient flows through."""
        scale, shift = self._by_column(weights.shape[1])
        values = self._codes(weights, scale, shift).sub_(self._zero).mul_(scale)
        return values if shift is None else values.add_(shift)

    def quantized(self, weights: Tensor) -> Quantized:
        """The codes of the weights, as they are packed."""
        rows, cols = weights.shape
        codes = np.full((rows, self.scales.shape[1] * GROUP), self._zero, CODE_DTYPE[self.format])
        codes[:, :cols] = self._codes(weights, *self._by_column(cols)).numpy()
        return Quantized(self.format, codes, self.scales, self.mins)

    def start(self, quantized: Tensor, source: Tensor) -> Tensor:
        """Where training begins: as near to the source as the codes of `quantized` stay the same.

        So the first step computes what the artifact computes, and a weight that lay between two
        codes needs little to go to the other.
        """
        scale, _ = self._by_column(quantized.shape[1])
        room = scale.abs() * _WITHIN
        return quantized + (source - quantized).clamp(-room, room)

    @property
    def _zero(self) -> int:
        """The code of a weight that is zero, or that is the minimum."""
        signed = CODE_DTYPE[self.format] is np.int8
        return 0 if signed or self.mins is not None else 1 << (_bits(self.format) - 1)

    @property
    def _range(self) -> tuple[int, int]:
        if CODE_DTYPE[self.format] is np.int8:
            return -127, 127
        return 0, (1 << _bits(self.format)) - 1

    def _by_column(self, cols: int) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum of every weight."""
        torch = require_torch("fine-tuning")

        def spread(values: NDArray[np.float16]) -> Tensor:
            wide = torch.from_numpy(values.astype(np.float32))
            return wide.repeat_interleave(GROUP, dim=1)[:, :cols]

        return spread(self.scales), None if self.mins is None else spread(self.mins)

    def _codes(self, weights: Tensor, scale: Tensor, shift: Tensor | None) -> Any:
        torch = require_torch("fine-tuning")
        with torch.no_grad():
            usable = scale.abs() > 1e-30
            inverse = torch.where(usable, 1 / torch.where(usable, scale, 1.0), 0.0)
            codes = (weights if shift is None else weights - shift) * inverse
            return codes.round_().add_(self._zero).clamp_(*self._range)


def _bits(fmt: str) -> int:
    return CODE_BYTES[fmt] * 8 // 512
