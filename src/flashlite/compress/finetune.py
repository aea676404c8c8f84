"""Tune the last layers of a quantized model: to heal what compression cost, or to a domain.

    texts ── tail_cache ──> inputs of layer L-3, the source's opinion      once
          ── tuning_loss, AdamW ──> Tail, on the grid of its formats      step by step
          ── tuning_measure ──> before and after, on texts held back

A run is a function of its folder's key, its settings and the number of threads: one that was killed
goes on at its last checkpoint and ends with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashlite.compress.pack import Packed
from flashlite.compress.tail import Tail
from flashlite.compress.tail_cache import Cache, Model, build_cache
from flashlite.compress.tuning import Material, Outcome, Report, Settings
from flashlite.compress.tuning_loss import Opinion, Sampler, answer_loss, distill_loss
from flashlite.compress.tuning_measure import (
    Domain,
    Quality,
    bucketed_divergence,
    domain,
    exact,
    states_of,
)
from flashlite.compress.tuning_texts import Text, answers, batches
from flashlite.errors import CompressError
from flashlite.model.differentiable import Tensor, require_torch

__all__ = ["finetune"]

_BETAS, _DECAY, _WARM_UP, _CLIP = (0.9, 0.95), 0.01, 0.05, 1.0


def finetune(
    source: Model,
    student: Model,
    packed: Callable[[str], Packed],
    material: Material,
    folder: Path,
    settings: Settings,
    progress: Callable[[Report], None] | None = None,
) -> Outcome:
    """Tune the last layers and the final norm.

    Args:
        source: the model in FP32.
        student: the quantized one, dequantized.
        packed: its packed matrices by canonical name.
        material: what to learn from and to measure on.
        folder: for the cache and the checkpoints; what an equal run left there is used.
        settings: the recipe.
        progress: called at every step.

    Raises:
        CompressError: settings out of range, too few texts, or weights that left the format.
        MissingExtra: PyTorch is not installed.
    """
    settings.check()
    torch = require_torch("fine-tuning")
    if not material.texts or not material.held:
        raise CompressError("there are no texts to learn from, or none to hold back")
    if material.chats and not material.held_chats:
        raise CompressError("there are no chats to measure on")
    watch = progress or (lambda _: None)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        run = _Run(source, student, packed, material, folder, settings, watch)
        return run.outcome()
    finally:
        torch.use_deterministic_algorithms(mode=deterministic)


class _Run:
    def __init__(
        self,
        source: Model,
        student: Model,
        packed: Callable[[str], Packed],
        material: Material,
        folder: Path,
        settings: Settings,
        progress: Callable[[Report], None],
    ) -> None:
        self.settings, self.folder, self.progress = settings, folder, progress
        self.source, self.began = source, time.monotonic()
        sets: dict[str, tuple[Sequence[Text], bool]] = {
            "texts": (material.texts, True),
            "held-out": (material.held, True),
            **{name: (texts, True) for name, texts in material.others.items()},
        }
        if material.chats:
            sets |= {"chats": (material.chats, False), "held chats": (material.held_chats, False)}
        work = {name: sum(map(len, texts)) for name, (texts, _) in sets.items()}
        self.caches: dict[str, Cache] = {}
        for i, (name, (texts, asked)) in enumerate(sets.items()):
            read = sum(list(work.values())[:i])

            def report(done: int, total: int, read: int = read, name: str = name) -> None:
                part = int(work[name] * done / total)
                progress(Report("read", read + part, sum(work.values())))

            asks = source if asked else None
            place = folder / f"cache-{i}"
            self.caches[name] = build_cache(place, texts, asks, student, settings.layers, report)
        self.measured = ["held-out", *material.others]
        self.labels = answers([*material.chats, *material.held_chats])
        self.tail = Tail(source, student, packed, settings.layers)
        self.table = _table(student)

    def outcome(self) -> Outcome:
        before, domain_before = self._quality("before")
        steps, stopped, history = self._train(domain_before)
        after, domain_after = self._quality("after")
        arrays = self.tail.arrays()
        return Outcome(arrays, before, after, domain_before, domain_after, steps, stopped, history)

    def _quality(self, when: str) -> tuple[dict[str, Quality], Domain | None]:
        """Measure every set; what was measured before a run was killed is read."""
        path = self.folder / f"{when}.json"
        if when == "before" and path.exists():
            kept = json.loads(path.read_text())
            sets = {name: Quality(**value) for name, value in kept["sets"].items()}
            return sets, None if kept["domain"] is None else Domain(**kept["domain"])
        total = len(self.measured) + 1
        found: dict[str, Quality] = {}
        for i, name in enumerate(self.measured):
            self.progress(Report("measure", i, total))
            found[name] = exact(
                self.tail, self.caches[name], self.table, lambda: self.source.weights("head")
            )
        on_domain = None
        if "held chats" in self.caches:
            on_domain = domain(self.tail, self.caches["held chats"], self.table, self.labels)
        self.progress(Report("measure", total, total))
        written = {
            "sets": {name: quality.to_json() for name, quality in found.items()},
            "domain": None if on_domain is None else on_domain.to_json(),
        }
        _write(path, json.dumps(written).encode())
        return found, on_domain

    def _held(self) -> float:
        """What decides when training ends."""
        most = self.settings.measure_rows
        if (chats := self.caches.get("held chats")) is not None:
            return domain(self.tail, chats, self.table, self.labels, most).loss
        return bucketed_divergence(self.tail, self.caches["held-out"], self.table, most)

    def _train(self, domain_before: Domain | None) -> tuple[int, str, list[Any]]:
        torch, settings, tail = require_torch("fine-tuning"), self.settings, self.tail
        matrices = [w for n, w in tail.floats.items() if n in tail.grids]
        vectors = [w for n, w in tail.floats.items() if n not in tail.grids]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": _DECAY}, {"params": vectors, "weight_decay": 0}],
            lr=settings.rate,
            betas=_BETAS,
        )
        progress = _Progress(best=math.inf)
        saved = _load(self.folder / "checkpoint.npz")
        if saved is not None:
            progress = _Progress.from_json(saved)
            tail.restore(saved)
            _restore_optimizer(optimizer, tail, saved)
            best = {k[5:]: v for k, v in saved.items() if k.startswith("best/")}
        else:
            progress.best = self._held()
            progress.history.append((0, math.nan, progress.best))
            best = tail.snapshot()
        plan = _Plan(self.caches, self.tail.spec.vocab_size, settings)
        while progress.step < settings.steps and not progress.stopped:
            step = progress.step
            if step and step % settings.search_every == 0:
                tail.search()
                tail.refresh()
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * _schedule(step, settings.steps)
            loss = self._step(plan, step)
            torch.nn.utils.clip_grad_norm_(list(tail.floats.values()), _CLIP)
            optimizer.step()
            tail.refresh()
            progress.step = step + 1
            progress.loss = loss
            last = progress.step == settings.steps
            late = self._late(progress.seconds)
            if progress.step % settings.measure_every == 0 or last or late:
                held = self._held()
                progress.history.append((progress.step, loss, held))
                if held < progress.best:
                    progress.best, progress.best_step, progress.worse = held, progress.step, 0
                    best = tail.snapshot()
                else:
                    progress.worse += 1
                if progress.worse >= settings.patience:
                    progress.stopped = "patience"
            if late and not progress.stopped:
                progress.stopped = "time"
            self.progress(
                Report("tune", progress.step, settings.steps, loss, progress.history[-1][2])
            )
            if progress.step % settings.save_every == 0 and not last:
                self._save(optimizer, progress, best)
        tail.restore(best)
        return progress.best_step, progress.stopped or "steps", progress.history

    def _step(self, plan: _Plan, step: int) -> float:
        """Run one step forward and backward; the gradients are left at the float weights."""
        torch = require_torch("fine-tuning")
        negatives = plan.sampler.draw((self.settings.seed, step))
        total = 0.0
        for name, group, weight in plan.groups(step):
            cache = self.caches[name]
            states = states_of(self.tail, cache, group)
            following = torch.from_numpy(cache.learned(group)[1])
            if name == "chats":
                loss = answer_loss(self.table, states, following, negatives)
            else:
                rows = cache.rows(group)
                opinion = Opinion(
                    torch.from_numpy(cache.top_ids[rows].astype(np.int64)),
                    torch.from_numpy(cache.top_logs[rows]),
                    torch.from_numpy(cache.rest_logs[rows]),
                    torch.from_numpy(cache.hidden.get(rows)),
                )
                loss = distill_loss(self.table, states, opinion, following, negatives)
            if not math.isfinite(loss.value):
                raise CompressError(
                    f"the loss of step {step + 1} is not finite; lower --rate, now "
                    f"{self.settings.rate}"
                )
            states.backward(loss.gradient * weight)
            total += weight * loss.value
        self.tail.take_gradients()
        return total

    def _late(self, before: float) -> bool:
        limit = self.settings.max_seconds
        return limit is not None and before + time.monotonic() - self.began > limit

    def _save(self, optimizer: Any, progress: _Progress, best: Mapping[str, Any]) -> None:
        state: dict[str, Any] = {
            **self.tail.snapshot(),
            **{f"best/{k}": v for k, v in best.items()},
        }
        for name, weights in self.tail.floats.items():
            kept = optimizer.state[weights]
            state[f"first/{name}"] = kept["exp_avg"].numpy()
            state[f"second/{name}"] = kept["exp_avg_sq"].numpy()
        now = progress.seconds + time.monotonic() - self.began
        state["progress"] = np.frombuffer(progress.to_json(now), np.uint8)
        path = self.folder / "checkpoint.tmp.npz"
        np.savez(path, **state)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(self.folder / "checkpoint.npz")


@dataclass
class _Progress:
    """Where a run stands."""

    best: float
    step: int = 0
    best_step: int = 0
    worse: int = 0
    loss: float = math.nan
    stopped: str = ""
    seconds: float = 0.0  # of earlier processes
    history: list[tuple[int, float, float]] = field(default_factory=list)

    def to_json(self, seconds: float) -> bytes:
        return json.dumps({**asdict(self), "seconds": seconds}).encode()

    @classmethod
    def from_json(cls, saved: Mapping[str, NDArray[Any]]) -> _Progress:
        values = json.loads(saved["progress"].tobytes())
        values["history"] = [tuple(row) for row in values["history"]]
        return cls(**values)


class _Plan:
    """Which texts a step takes; a function of the seed and the step alone."""

    def __init__(self, caches: Mapping[str, Cache], vocab_size: int, settings: Settings) -> None:
        self._settings = settings
        self.sampler = Sampler(caches["texts"].top_ids, vocab_size)
        chats = caches.get("chats")
        share = settings.replay if chats else 1.0
        self._sets: list[tuple[str, list[list[int]], float]] = []
        if chats:
            self._sets.append(("chats", self._cut(chats, 1 - share), 1 - share))
        self._sets.append(("texts", self._cut(caches["texts"], share), share))

    def _cut(self, cache: Cache, share: float) -> list[list[int]]:
        most = max(16, int(self._settings.tokens * share))
        return batches([len(text) for text in cache.texts], most)

    def groups(self, step: int) -> list[tuple[str, list[int], float]]:
        """(set, its texts, weight of their loss) of one step."""
        chosen = []
        for which, (name, groups, weight) in enumerate(self._sets):
            epoch, at = divmod(step, len(groups))
            order = np.random.default_rng((self._settings.seed, which, epoch)).permutation(
                len(groups)
            )
            chosen.append((name, groups[order[at]], weight))
        return chosen


def _table(model: Model) -> Tensor:
    """The head [vocab, d_model] as a tensor."""
    torch = require_torch("fine-tuning")
    table = model.weights("head")
    return torch.from_numpy(table if table.flags.writeable else table.copy())


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _restore_optimizer(optimizer: Any, tail: Tail, saved: Mapping[str, NDArray[Any]]) -> None:
    torch = require_torch("fine-tuning")
    step = _Progress.from_json(saved).step
    for name, weights in tail.floats.items():
        optimizer.state[weights] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.from_numpy(saved[f"first/{name}"]),
            "exp_avg_sq": torch.from_numpy(saved[f"second/{name}"]),
        }


def _load(path: Path) -> dict[str, NDArray[Any]] | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _write(path: Path, data: bytes) -> None:
    new = path.with_suffix(".tmp")
    new.write_bytes(data)
    new.replace(path)
