"""`Weights`: the source's tensors in float32, as many of them kept as a budget allows."""

from __future__ import annotations

from collections.abc import Callable

from flashlite.model.reference import Floats
from flashlite.model.spec import ModelSpec

__all__ = ["CachedWeights", "replaced"]

Read = Callable[[str], Floats]


class CachedWeights:
    """Canonical name -> weights, read-only by agreement.

    Most passes run a suffix of the layers, so what stands late is read most: the head is kept
    first, then the layers from the last down. The rest is read anew each time.
    """

    def __init__(self, spec: ModelSpec, read: Read, budget: int) -> None:
        """Nothing is read yet.

        Args:
            spec: the model.
            read: `SourceModel.tensor`.
            budget: bytes that may be kept.
        """
        self._read = read
        self._kept: dict[str, Floats] = {}
        head = "embed" if spec.tied_head else "head"
        sizes = {name: 4 * _product(shape) for name, shape in spec.shapes()}
        names = [head, "final_norm"]
        for i in reversed(range(spec.n_layers)):
            names += [name for name in sizes if name.startswith(f"layers.{i}.")]
        names += [name for name in sizes if name not in set(names)]
        self._keep: set[str] = set()
        for name in names:
            if sizes[name] > budget:
                break
            budget -= sizes[name]
            self._keep.add(name)
        self.complete = len(self._keep) == len(sizes)

    def __call__(self, name: str) -> Floats:
        """One tensor in its canonical shape.

        Raises:
            CheckpointError: it cannot be read.
        """
        found = self._kept.get(name)
        if found is None:
            found = self._read(name)
            if name in self._keep:
                self._kept[name] = found
        return found


def replaced(weights: Read, changed: dict[str, Floats]) -> Read:
    """The same weights, except for `changed`."""

    def read(name: str) -> Floats:
        found = changed.get(name)
        return weights(name) if found is None else found

    return read


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
