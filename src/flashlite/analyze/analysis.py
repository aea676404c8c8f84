"""Minimal stand-in of the contract; replaced when the analysis part arrives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AnalysedModel", "Analysis", "Calibration", "Unit", "UnitFormat"]


@dataclass(frozen=True)
class AnalysedModel:
    name: str
    path: str
    digest: str
    family: str
    parameters: int


@dataclass(frozen=True)
class Calibration:
    source: str
    seed: int
    languages: tuple[str, ...]
    sequences: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UnitFormat:
    bytes: int
    predicted_kl: float
    exact_kl: float | None
    kl: float


@dataclass(frozen=True)
class Unit:
    name: str
    layer: int | None
    tensors: tuple[str, ...]
    parameters: int
    formats: Mapping[str, UnitFormat]


@dataclass(frozen=True)
class Analysis:
    model: AnalysedModel
    calibration: Calibration
    units: tuple[Unit, ...]
    rest: Mapping[str, Any]
    artifact: str | None = None

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {
            "version": 1,
            "model": asdict(self.model),
            "calibration": asdict(self.calibration),
            "units": [asdict(u) for u in self.units],
            "artifact": self.artifact,
            **self.rest,
        }

    @classmethod
    def from_json(cls, d: Any) -> Analysis:
        c = d["calibration"]
        return cls(
            AnalysedModel(**d["model"]),
            Calibration(
                c["source"], c["seed"], tuple(c["languages"]), tuple(map(tuple, c["sequences"]))
            ),
            tuple(
                Unit(
                    u["name"],
                    u["layer"],
                    tuple(u["tensors"]),
                    u["parameters"],
                    {k: UnitFormat(**v) for k, v in u["formats"].items()},
                )
                for u in d["units"]
            ),
            {
                k: d[k]
                for k in d
                if k not in ("version", "model", "calibration", "units", "artifact")
            },
            d["artifact"],
        )


def source_digest(source: Any) -> str:
    from blake3 import blake3

    h = blake3()
    for name in sorted(source.checkpoint.tensors):
        h.update(name.encode())
        h.update(source.checkpoint.raw(name).tobytes())
    return h.hexdigest()
