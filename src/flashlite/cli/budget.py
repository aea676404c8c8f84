"""`flashlite quantize --config`: from an analysis to an artifact that keeps a budget.

sensitive_layers.json -> its model, checked -> allocation -> rounding -> swaps -> artifact
                                                                     └-> measured KL
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from flashlite.errors import CompressError, EmbeddingLoss, FlashliteError, UsageError
from flashlite.runtime.memory import format_size

if TYPE_CHECKING:
    from flashlite.analyze.analysis import Analysis
    from flashlite.artifact.format import Artifact
    from flashlite.checkpoint.pull import Pulled
    from flashlite.compress.carry_out import Limits
    from flashlite.compress.differential import Goal
    from flashlite.compress.normalize import Ready
    from flashlite.compress.pack import Quantized
    from flashlite.compress.plan import Plan
    from flashlite.compress.workspace import Workspace
    from flashlite.model.source import SourceModel
    from flashlite.model.spec import ModelSpec
    from flashlite.runtime.prepare import Progress

__all__ = ["Budget", "Request", "Result", "curve_of", "make", "read_config", "record"]

PRESETS: Mapping[str, float] = {"balanced": 0.05, "small": 0.2}  # most KL, in nats
"""Presets that need an analysis: the smallest artifact whose measured loss is at most this."""

EMBED_LOSS = 0.002
"""Nats that the look-up table alone may lose: FL-209."""


@dataclass(frozen=True)
class Budget:
    """The flags that say what the artifact must keep within; at most one is given."""

    target_size: int | None = None  # bytes on disk
    target_ram: int | None = None  # bytes of the running process
    target_latency: float | None = None  # seconds of a decode step
    max_kl: float | None = None  # nats per token

    def goal(self, preset: str) -> Goal:
        """The one that is given, else the preset's.

        Raises:
            UsageError: more than one is given.
        """
        from flashlite.compress.differential import Goal

        given = {
            "--target-size": None if self.target_size is None else Goal("size", self.target_size),
            "--target-ram": None if self.target_ram is None else Goal("ram", self.target_ram),
            "--target-latency": (
                None if self.target_latency is None else Goal("latency", self.target_latency)
            ),
            "--max-kl": None if self.max_kl is None else Goal("kl", self.max_kl),
        }
        found = {name: goal for name, goal in given.items() if goal is not None}
        if len(found) > 1:
            raise UsageError(f"{' and '.join(found)} are given: choose one of them")
        return next(iter(found.values()), Goal("kl", PRESETS[preset]))


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: Path
    budget: Budget
    preset: str = "balanced"
    model: str | None = None  # another than the config's: its plan is applied anew
    directory: Path | None = None
    embed: str | None = None
    normalize_embeddings: bool = False
    split_head: str = "auto"
    context: int | None = None
    force: bool = False
    offline: bool = False
    accept_license: bool = False
    polish_seconds: float = 120.0
    latency: Callable[[ModelSpec, Plan], float] | None = None
    """Seconds of a decode step of a plan on the machine in question."""


@dataclass(frozen=True)
class Result:
    """What was made and what is known of it."""

    artifact: Artifact
    goal: Goal
    formats: Mapping[str, str]  # by unit
    predicted_kl: float
    measured_kl: float
    size: int  # bytes on disk
    reached: float  # in the unit of the goal
    steps: Mapping[str, int]  # matrices by the step of rounding that was kept
    gain: float  # error of the outputs after rounding, of that of plain rounding
    kept: int  # swaps
    tried: int
    embed_kl: float
    notes: Sequence[str] = field(default_factory=tuple)
    unmatched: Sequence[str] = field(default_factory=tuple)
    before_kl: float | None = None  # the config's own prediction for the old model

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "artifact": str(self.artifact.path),
            "preset": self.artifact.plan.preset,
            "digest": self.artifact.digest,
            "goal": {self.goal.kind: self.goal.value},
            "reached": self.reached,
            "size_bytes": self.size,
            "weights_bytes": self.artifact.weights_size,
            "formats": dict(self.formats),
            "predicted_kl": self.predicted_kl,
            "measured_kl": self.measured_kl,
            "embedding_kl": self.embed_kl,
            "rounding": {"kept": dict(self.steps), "error_left": self.gain},
            "swaps": {"tried": self.tried, "kept": self.kept},
            "notes": list(self.notes),
            "unmatched": list(self.unmatched),
            "kl_before": self.before_kl,
        }


def read_config(path: Path) -> Analysis:
    """Read and check what `flashlite analyze` wrote.

    Raises:
        UsageError: there is no such file, or it is no analysis.
    """
    from flashlite.analyze.analysis import read_analysis

    if not path.is_file():
        raise UsageError(f"{path}: no such file; make one with `flashlite analyze MODEL`")
    return read_analysis(path)


def record(path: Path, analysis: Analysis, artifact: Path) -> None:
    """Write into the config which artifact was made from it.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    from flashlite.analyze.analysis import write_analysis

    try:
        name = str(artifact.resolve().relative_to(path.resolve().parent))
    except ValueError:
        name = str(artifact.resolve())
    write_analysis(replace(analysis, artifact=name), path)


def curve_of(analysis: Analysis) -> list[dict[str, float]]:
    """Bytes of the units against predicted KL, at many budgets."""
    from flashlite.compress import allocate

    parameters = sum(unit.parameters for unit in analysis.units)
    items = [
        allocate.Item(
            unit.name,
            tuple(
                allocate.Choice(fmt, float(entry.bytes), max(0.0, entry.kl))
                for fmt, entry in unit.formats.items()
            ),
        )
        for unit in analysis.units
    ]
    return [
        {
            "bytes": int(point.cost),
            "bits_per_weight": round(8 * point.cost / parameters, 3),
            "predicted_kl": point.kl,
        }
        for point in allocate.curve(items)
    ]


class _Job:
    """One run: the model at hand and what has been made for it."""

    def __init__(self, request: Request, progress: Progress | None) -> None:
        from flashlite.analyze.digest import source_digest
        from flashlite.checkpoint.open import open_checkpoint
        from flashlite.compress.differential import split_sequences
        from flashlite.model.families import describe

        self.request, self.progress = request, progress
        self.analysis = read_config(request.config)
        self.pulled = self._pull()
        self.source = describe(open_checkpoint(self.pulled.path))
        self.analysis_read = self.analysis
        self.notes: list[str] = []
        self.workspaces: list[Workspace] = []
        self.unmatched: list[str] = []
        self.before_kl: float | None = None
        self.digest = source_digest(self.source)
        self._settle_model()
        self.forced, self.separate_embed = self._embed_format()
        self.held = split_sequences(self.analysis.calibration)[1]
        self._tables: dict[str, NDArray[np.float32]] = {}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor of the source; the large tables are kept."""
        if name not in ("embed", "head"):
            return self.source.tensor(name)
        if name not in self._tables:
            self._tables[name] = self.source.tensor(name)
        return self._tables[name]

    def _pull(self) -> Pulled:
        from flashlite.checkpoint.known_models import KNOWN_MODELS
        from flashlite.checkpoint.pull import pull

        request, about = self.request, self.analysis.model
        name = request.model
        if name is None:
            known = about.name in KNOWN_MODELS or about.name.startswith("hf:")
            name = about.name if known or not Path(about.path).exists() else about.path
        return pull(name, accept_license=request.accept_license, offline=request.offline)

    def _settle_model(self) -> None:
        """Refuse another model than was analyzed, unless it is named: then fit the plan to it."""
        from flashlite.compress.differential import check_units, migrate

        found, about = self.digest, self.analysis.model
        self.moved = found != about.digest
        if found == about.digest:
            check_units(self.analysis, self.source.spec)
            return
        if self.request.model is None:
            raise CompressError(
                f"{self.pulled.path} is not the model that {self.request.config} was made from "
                f"(digest {found[:23]}, it has {about.digest[:23]}): analyze it again, or give "
                f"--model {self.pulled.path} to apply the old plan to it"
            )
        self.analysis, self.unmatched = migrate(self.analysis, self.source.spec)
        self.before_kl = self._recorded_kl()
        self.notes.append(
            f"the plan was found for another model (digest {about.digest[:23]}); "
            "its losses are only a guess here, the measured one counts"
        )

    def _recorded_kl(self) -> float | None:
        """What was measured of the artifact that the config records, if it is still there."""
        from flashlite.artifact.read import open_artifact
        from flashlite.artifact.write import measured_of

        recorded = self.analysis_read.artifact
        if recorded is None:
            return None
        try:
            card = measured_of(open_artifact(self.request.config.resolve().parent / recorded))
        except FlashliteError:
            return None
        value = card.get("held_back_kl")
        return float(value) if isinstance(value, (int, float)) else None

    def _embed_format(self) -> tuple[dict[str, str], str | None]:
        """Units whose format the command line decides, and the table's where the head differs."""
        from flashlite.compress.plan import PACKED

        embed, spec = self.request.embed, self.source.spec
        if embed is None:
            return {}, None
        if embed == "f16":
            # A tied head is stored apart then, in INT8; an untied table has nothing to multiply.
            return ({"embed": "q8"} if spec.tied_head else {}), "f16"
        if embed not in PACKED:
            raise UsageError(f"--embed is {embed!r}, choose one of f16, {', '.join(PACKED)}")
        return {"embed": embed}, None

    def limits(self, goal: Goal) -> Limits:
        """The goal in terms of what the units cost.

        Raises:
            UsageError: the goal needs what is not there.
        """
        from flashlite.compress.carry_out import Limits

        if goal.kind == "kl":
            return Limits(max_kl=goal.value)
        if goal.kind == "latency":
            if self.request.latency is None:
                raise UsageError(
                    "--target-latency needs to know what the machine does per second: run "
                    "`flashlite profile --machine -o machine.json`, then give --machine "
                    "machine.json"
                )
            base, prices = self._step_prices(self.request.latency)
            return Limits(
                budget=goal.value - base,
                cost=lambda unit, fmt: prices.get((unit, fmt)),
                what=lambda seconds: f"{(seconds + base) * 1e3:.3f} ms per token in all",
            )
        fixed = self._fixed_bytes() if goal.kind == "size" else self._fixed_ram()
        return Limits(
            budget=goal.value - fixed, what=lambda size: f"{format_size(int(size + fixed))} in all"
        )

    def split_head(self, goal: Goal) -> str:
        """A screen's size is known only when it is fitted: none under a ceiling of bytes."""
        mode = self.request.split_head
        if goal.kind in ("size", "ram"):
            if mode == "on":
                raise UsageError(
                    f"--split-head on cannot keep a --target-{goal.kind}: its size is known only "
                    "afterwards; leave it out, or give --max-kl"
                )
            return "off"
        return mode

    def ready(self, matrices: Mapping[str, Quantized]) -> tuple[SourceModel, Ready]:
        """What the artifact stores, after the table was normalized where that is asked for."""
        from flashlite.compress.normalize import normalize_embeddings, table_exponent
        from flashlite.compress.quantize import to_half

        found: dict[str, Any] = dict(matrices)
        apart = self.separate_embed is not None
        if apart:
            if self.source.spec.tied_head:
                found["head"] = found["embed"]
            found["embed"] = to_half(self.tensor("embed"), "embed")
        if not self.request.normalize_embeddings:
            return self.source, found
        fmt = self.separate_embed or found["embed"].format
        exponent = table_exponent(self.tensor("embed"), fmt, self.source.spec.embed_scale)
        self.notes.append(
            f"embeddings normalised by 2^{exponent}"
            if exponent
            else "embeddings need no normalisation: their scales are exact in half precision"
        )
        return normalize_embeddings(self.source, found, exponent, head_apart=apart)

    def _step_prices(
        self, predict: Callable[[ModelSpec, Plan], float]
    ) -> tuple[float, dict[tuple[str, str], float]]:
        """Seconds of a step with every unit in its quickest format, and what each format of each
        unit adds: matrices are multiplied one after the other, so that their times add up.
        """
        from flashlite.compress.differential import items_of, plan_of

        spec = self.source.spec
        items = items_of(self.analysis, spec, forced=self.forced)
        offered = sorted({choice.format for item in items for choice in item.choices})

        def seconds(changed: Mapping[str, str]) -> float:
            both = {**formats, **changed}
            return predict(
                spec,
                plan_of(self.analysis, spec, both, preset="probe", embed=self.separate_embed),
            )

        formats: dict[str, str] = {}
        known = []
        for fmt in offered:  # a machine may have been measured with fewer formats
            alike = {item.name: self.forced.get(item.name, fmt) for item in items}
            try:
                seconds(alike)
            except CompressError as error:
                self.notes.append(f"{fmt} is left out: {error}")
                continue
            known.append(fmt)
            formats = formats or alike
        if not known:
            raise CompressError(self.notes[-1])
        start = base = seconds({})
        prices: dict[tuple[str, str], float] = {}
        for item in items:
            added = {
                c.format: seconds({item.name: c.format}) - start
                for c in item.choices
                if c.format in known
            }
            least = min(added.values())
            base += least
            prices |= {(item.name, fmt): more - least for fmt, more in added.items()}
        return base, prices

    def _probe(self, arrays: str = "least") -> Plan:
        """A plan to measure what is beside the units' own bytes: everything at its cheapest, or
        with the most arrays.
        """
        from flashlite.compress.differential import items_of, plan_of
        from flashlite.compress.quantize import CODES

        items = items_of(self.analysis, self.source.spec, forced=self.forced)
        formats = {
            item.name: min(
                item.choices,
                key=lambda c: (arrays == "most" and not CODES[c.format].minimum, c.cost),
            ).format
            for item in items
        }
        return plan_of(
            self.analysis, self.source.spec, formats, preset="probe", embed=self.separate_embed
        )

    def _unit_bytes(self, plan: Plan) -> int:
        from flashlite.compress.quantize import CODES
        from flashlite.compress.roundings import stored_bytes

        shapes = dict(self.source.spec.shapes())
        total = 0
        for unit in self.analysis.units:
            for name in unit.tensors:
                apart = name == "embed" and "head" in plan.formats and self.source.spec.tied_head
                fmt = plan.formats["head" if apart else name]
                if fmt in CODES:
                    total += stored_bytes((shapes[name][0], shapes[name][1]), fmt)
        return total

    def _fixed_bytes(self) -> int:
        """What the artifact holds beside the units."""
        from flashlite.artifact.write import artifact_bytes
        from flashlite.checkpoint.convert_tokenizer import build_tokenizer_checked

        tokenizer = build_tokenizer_checked(self.source.checkpoint)
        # A format with minima has more arrays, and each takes a line here and there.
        return max(
            artifact_bytes(
                self.source.spec,
                plan,
                tokenizer,
                name=self.pulled.name,
                provenance={
                    "source": self.pulled.path.name,
                    "sha256": "0" * 64,
                    "licence": self.pulled.licence or "",
                },
                measured={"held_back_kl": 0.123456789012345678, "positions": 768},
            )
            - self._unit_bytes(plan)
            for plan in (self._probe("least"), self._probe("most"))
        )

    def _fixed_ram(self) -> int:
        """What the running process holds beside the units, for the wanted context: asked of a
        process of its own, that runs the smallest artifact of this model.
        """
        from flashlite.runtime import prepare

        plan = self._probe()
        with tempfile.TemporaryDirectory(prefix="flashlite-") as folder:
            artifact = prepare.make_artifact(
                self.pulled,
                "probe",
                Path(folder) / "probe.fl",
                head="off",
                decided=prepare.Decided(self.source, plan, {}, {}),
                progress=self.progress,
            )
            total = _ledger_total(artifact.path, self.request.context)
        return total - self._unit_bytes(plan)

    def artifact_path(self) -> Path:
        """Where the artifact goes: beside the config, unless the command line says."""
        request = self.request
        if request.directory is not None:
            target = request.directory
        else:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", self.pulled.name).strip("-.") or "model"
            target = request.config.resolve().parent / f"{stem}.fl"
        recorded = self.analysis.artifact
        # What this config made may be made again, but not replaced by another model's.
        ours = recorded is not None and not self.moved
        ours = ours and request.config.resolve().parent / str(recorded) == target.resolve()
        if target.exists() and not (request.force or ours):
            raise UsageError(
                f"{target} is there already; give --force to replace it, or another -o"
            )
        return target

    def workspace(self, formats: Mapping[str, Sequence[str]]) -> Workspace:
        """Rounded matrices of exactly this model, text and plan, in the cache."""
        from flashlite import paths
        from flashlite.compress.workspace import Workspace

        calibration = self.analysis.calibration
        key = _key(
            [
                2,
                self.digest,
                self.request.embed,
                self.forced,
                {name: list(found) for name, found in formats.items()},
                [list(ids) for ids in calibration.sequences],
                [list(ids) for ids in calibration.held_back],
            ]
        )
        found = Workspace(paths.private_dir(paths.cache_dir() / "rounding") / key)
        self.workspaces.append(found)
        return found


def make(request: Request, progress: Progress | None = None) -> Result:
    """Quantize the config's model to the budget and record the artifact in the config.

    Raises:
        FlashliteError: the config, its model, the budget or the disk is at fault; nothing
            half-written takes an artifact's place.
    """
    from flashlite.compress.carry_out import carry_out
    from flashlite.compress.differential import plan_of
    from flashlite.evaluate.held_back import HeldBack
    from flashlite.runtime import prepare

    goal = request.budget.goal(request.preset)
    job = _Job(request, progress)
    target = job.artifact_path()
    limits = job.limits(goal)
    measure = HeldBack(job.source.spec, job.tensor, job.held)
    carried = carry_out(
        job.source,
        job.analysis,
        limits,
        measure=measure,
        workspace=job.workspace,
        weights=job.tensor,
        forced=job.forced,
        seconds=request.polish_seconds,
        progress=progress,
    )
    preset = request.preset if request.budget == Budget() else goal.kind
    plan = plan_of(
        job.analysis, job.source.spec, carried.formats, preset=preset, embed=job.separate_embed
    )
    source, ready = job.ready(carried.ready)
    measured = {"held_back_kl": carried.measured_kl, "positions": measure.positions}
    decided = prepare.Decided(source, plan, ready, measured)
    artifact = prepare.make_artifact(
        job.pulled, preset, target, head=job.split_head(goal), decided=decided, progress=progress
    )
    for workspace in job.workspaces:
        workspace.remove()
    if not job.moved:
        record(request.config, job.analysis_read, artifact.path)
    if carried.embed_kl > EMBED_LOSS:
        job.notes.append(str(EmbeddingLoss(carried.embed_kl, EMBED_LOSS)))
    size = sum(path.stat().st_size for path in artifact.path.iterdir())
    reached = {
        "size": float(size),
        "ram": carried.cost + (goal.value - (limits.budget or 0)),
        "latency": carried.cost + (goal.value - (limits.budget or 0)),
        "kl": carried.measured_kl,
    }[goal.kind]
    return Result(
        artifact=artifact,
        goal=goal,
        formats=carried.formats,
        predicted_kl=carried.predicted_kl,
        measured_kl=carried.measured_kl,
        size=size,
        reached=reached,
        steps=carried.steps,
        gain=carried.gain,
        kept=carried.kept,
        tried=carried.tried,
        embed_kl=carried.embed_kl,
        notes=(*job.notes, *carried.notes),
        unmatched=job.unmatched,
        before_kl=job.before_kl,
    )


def _ledger_total(artifact: Path, context: int | None) -> int:
    """Bytes that a process running this artifact may come to hold, as it counts them itself.

    Raises:
        CompressError: it does not run here.
    """
    script = (
        "import json, sys\n"
        "from flashlite.runtime.model import load\n"
        "length = int(sys.argv[2]) or None\n"
        "with load(sys.argv[1], max_sequence_length=length, prefix_cache=False) as model:\n"
        "    print(json.dumps(model.plan.to_json()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact), str(context or 0)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CompressError(f"the model's memory could not be measured: {last[:300]}")
    return int(json.loads(done.stdout.splitlines()[-1])["total"])


def _key(parts: Sequence[object]) -> str:
    return blake3(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
