"""`Plan`: which format each tensor is stored in, and the presets that fill one.

    import   Q4_0, Q4_1, Q5_0 and Q8_0 keep their grid bit for bit, every other type becomes q8
    hybrid   FP16 look-up table, INT8 layers and head
    lossless INT8 throughout, and no split head
    q8       INT8 throughout
    q6, q5   INT6 or INT5 throughout: between the two in size and in loss
    q4       INT4 throughout: q4m, or q4 where the source is Q4_0 and so loses nothing

Preset `q4` takes the format with a minimum, 5 bits a weight instead of 4.5, because it halves the
loss: Gemma-3-270M, 384 tokens of wikitext-2 valid, KL divergence from the source 0.21 nats against
0.41 for `q4` (top-1 agreement 80 % against 63 %), both with searched scales; `q8` 0.0003 (99.5 %).

What one format for all layers costs, embeddings as in the source: Gemma-3-270M, 512 tokens of
wikitext-2 valid after the BOS, weights alone, KL divergence in nats (5 % standard error) and top-1:

            bits      KL   top-1   KL off the grid
    q4       4.5  0.3183  74.4 %            0.2740
    q4m      5.0  0.1764  79.7 %            0.1554
    q5       5.5  0.0271  91.4 %            0.0561
    q6       6.5  0.0057  95.9 %            0.0196
    q8       8.5  0.0006  99.2 %            0.0011

That source is a file of mostly Q5_0, which q5 and q6 hold exactly. So for the last column its
weights were first moved at random, by up to half a step of a 5-bit grid: that is its source.

The tables of an encoder's positions and token types stay in half precision under every preset.

A tied model has one matrix for two uses. Where look-up table and head share a packed format it is
stored once, as `embed`; under `hybrid` it is stored twice, `embed` in half precision for the
look-up (one row per token is read) and `head` in INT8 (all of it is read).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from flashlite.errors import CompressError

if TYPE_CHECKING:
    from flashlite.model.source import SourceTensors
from flashlite.compress.screen import Screen, screen_shapes
from flashlite.model.encoder import Spec
from flashlite.model.spec import ModelSpec

__all__ = ["PACKED", "PRESETS", "Format", "Plan", "plan_preset", "stored_shapes"]

Format = Literal["q8", "q6", "q5", "q4", "q4m", "f16", "f32"]
PRESETS = ("import", "hybrid", "lossless", "q8", "q6", "q5", "q4")
PACKED: tuple[Format, ...] = ("q8", "q6", "q5", "q4", "q4m")  # what matrices are multiplied in
_IMPORTED: Mapping[str, Format] = {"Q4_0": "q4", "Q4_1": "q4m", "Q5_0": "q5", "Q8_0": "q8"}
_UNIFORM: Mapping[str, Format] = {"q6": "q6", "q5": "q5"}
_TABLES = ("embed", "positions", "types")  # rows are looked up


@dataclass(frozen=True)
class Plan:
    """The format of every stored tensor, in forward order, and the preset that chose it.

    `screen` is the split head, None where the head is always computed in full.
    """

    preset: str
    formats: Mapping[str, Format]  # by stored name
    screen: Screen | None = None

    def check(self, spec: Spec) -> None:
        """Refuse a plan that does not fit the model.

        Raises:
            CompressError: a tensor is missing, unknown, or in a format its use does not allow.
        """
        if self.screen is not None:
            self.screen.check(_language_model(spec))
        shapes = stored_shapes(spec, self)
        if missing := [name for name in shapes if name not in self.formats]:
            raise CompressError(f"the plan has no format for {_few(missing)}")
        if unknown := [name for name in self.formats if name not in shapes]:
            raise CompressError(f"the plan names {_few(unknown)}, which the model does not have")
        for name, shape in shapes.items():
            allowed = ("f32",) if len(shape) == 1 else PACKED
            if name in _TABLES:
                allowed = (*PACKED, "f16")
            if self.formats[name] not in allowed:
                raise CompressError(
                    f"the plan stores {name} as {str(self.formats[name])[:20]!r}, "
                    f"allowed {', '.join(allowed)}"
                )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal plan."""
        screen = {} if self.screen is None else {"screen": self.screen.to_json()}
        return {"preset": self.preset, "formats": dict(self.formats), **screen}

    @classmethod
    def from_json(cls, data: object, spec: Spec) -> Plan:
        """Read what `to_json` wrote and check it against the model.

        Raises:
            CompressError: it is not a plan, or not one for this model.
        """
        if not isinstance(data, dict) or set(data) - {"screen"} != {"preset", "formats"}:
            raise CompressError("the plan is not an object of `preset` and `formats`")
        preset, formats = data["preset"], data["formats"]
        if not isinstance(preset, str) or not isinstance(formats, dict):
            raise CompressError("the plan's preset is not text or its formats are not an object")
        screen = None
        if "screen" in data:
            screen = Screen.from_json(data["screen"], _language_model(spec))
        plan = cls(preset, formats, screen)
        plan.check(spec)
        return plan

    def with_screen(self, screen: Screen, spec: ModelSpec) -> Plan:
        """The same plan with a split head; a screen that it has is replaced."""
        tensors = dict(stored_shapes(spec, replace(self, screen=None)))
        formats: dict[str, Format] = {name: self.formats[name] for name in tensors}
        for name, shape in screen_shapes(spec, screen).items():
            formats[name] = "f32" if len(shape) == 1 else "q4"
        return Plan(self.preset, formats, screen)


def plan_preset(preset: str, source: SourceTensors) -> Plan:
    """The plan of a fixed preset for one model.

    Raises:
        CompressError: there is no such preset.
    """
    if preset not in PRESETS:
        raise CompressError(f"there is no preset {preset!r}, choose one of {', '.join(PRESETS)}")
    formats: dict[str, Format] = {}
    for name, shape in source.spec.shapes():
        dtype = source.info(name).dtype
        formats[name] = "f32" if len(shape) == 1 else _choose(preset, name, dtype)
    if source.spec.tied_head and formats["embed"] == "f16":
        formats["head"] = "q8"
    plan = Plan(preset, formats)
    plan.check(source.spec)
    return plan


def stored_shapes(spec: Spec, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Every tensor the artifact holds, with its true shape, in the order it is stored."""
    shapes = dict(spec.shapes())
    if spec.tied_head and plan.formats.get("embed") == "f16":
        shapes["head"] = shapes["embed"]
    if plan.screen is not None:
        shapes |= screen_shapes(_language_model(spec), plan.screen)
    return shapes


def _choose(preset: str, name: str, dtype: str) -> Format:
    """The format of one matrix that the source holds as `dtype`."""
    if name in ("positions", "types"):  # small, and nothing multiplies by them
        return "f16"
    if preset == "import":
        return _IMPORTED.get(dtype, "q8")
    if preset == "hybrid" and name == "embed":
        return "f16"
    if preset == "q4":
        return "q4" if dtype == "Q4_0" else "q4m"
    return _UNIFORM.get(preset, "q8")


def _language_model(spec: Spec) -> ModelSpec:
    if not isinstance(spec, ModelSpec):
        raise CompressError(f"the plan has a split head, and {spec.family} is an encoder")
    return spec


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:60]) for name in names[:3]) + more
