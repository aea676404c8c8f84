"""What fine-tuning brings back, what it teaches, and what that costs.

    python benchmarks/finetune.py                          # both parts, Gemma-3-270M in `q4`
    python benchmarks/finetune.py --part domain --minutes 10

Heal: the KL divergence from the source that is left on text that the source wrote and that was held
back, and on wikitext-2 valid, which nothing was tuned on. Domain: banking77's training file as
chats (a question, the name of its intent), one in ten held back by the seed; accuracy is that of
greedy decoding held to the 77 names. The delta is applied to a copy of the artifact and rolled
back, and every file is compared. Needs FLASHLITE_DATA.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import common
from common import GEMMA, Gate, Row
from flashlite.artifact.delta import write_delta
from flashlite.artifact.deltas import apply_delta, roll_back
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, open_artifact
from flashlite.checkpoint.pull import pull
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.compress.tuning import Report, Settings
from flashlite.runtime.prepare import make_artifact
from flashlite.runtime.process import resident_bytes
from flashlite.runtime.tune import Tuned, Wanted, tune

WIKI = "wikitext-2"


def main() -> None:
    parser = common.make_parser(__doc__, rounds=1, isa=False)
    parser.add_argument("--model", default=GEMMA, help=f"[default: {GEMMA}]")
    parser.add_argument("--preset", default="q4", help="of the artifact [default: q4]")
    parser.add_argument("--artifact", type=Path, help="an artifact of --model, instead of --preset")
    parser.add_argument("--config", type=Path, help="texts of a sensitive_layers.json")
    parser.add_argument("--part", choices=["heal", "domain", "both"], default="both")
    parser.add_argument("--minutes", type=float, default=25, help="each at most [default: 25]")
    parser.add_argument("--tokens", type=int, default=40_000, help="to heal on [default: 40000]")
    parser.add_argument("--steps", type=int, default=220, help="[default: 220]")
    parser.add_argument("--rate", type=float, default=1e-4, help="[default: 1e-4]")
    parser.add_argument("--chats", type=int, default=3000, help="to learn [default: 3000]")
    parser.add_argument("--held-chats", type=int, default=500, help="[default: 500]")
    parser.add_argument("--wiki-tokens", type=int, default=2048, help="[default: 2048]")
    parser.add_argument("--seed", type=int, default=0)
    options = common.arguments(parser)
    data = Path(os.environ["FLASHLITE_DATA"])
    import torch

    torch.set_num_threads(options.threads)
    source = pull(options.model, offline=True)
    rows: list[Row] = []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.artifact is None:
            artifact = make_artifact(source, options.preset, folder / "model.fl", head="off")
        else:
            artifact = open_artifact(Path(shutil.copytree(options.artifact, folder / "model.fl")))
        spec = artifact.spec
        parameters = sum(int(np.prod(shape)) for _, shape in spec.shapes())
        wiki = wikitext(artifact, data / "wikitext-2/valid.txt", options.wiki_tokens)
        for part in ("heal", "domain"):
            if options.part not in (part, "both"):
                continue
            settings = Settings(
                steps=options.steps,
                rate=options.rate,
                seed=options.seed,
                max_seconds=60 * options.minutes,
            )
            chats, held = None, None
            if part == "domain":
                chats, held = banking(data / "banking77/train.csv", folder, options)
            wanted = Wanted(
                artifact, source, chats, held, options.config, options.tokens, [(WIKI, wiki)]
            )
            began, cpu = time.monotonic(), time.process_time()
            tuned = tune(wanted, settings, report=watch)
            minutes = (time.monotonic() - began) / 60
            figures[part] = {
                "before": {n: q.to_json() for n, q in tuned.outcome.before.items()},
                "after": {n: q.to_json() for n, q in tuned.outcome.after.items()},
                "steps": tuned.outcome.steps,
                "stopped": tuned.outcome.stopped,
                "history": [[a, None if b != b else b, c] for a, b, c in tuned.outcome.history],
                "minutes": minutes,
                "cpu_seconds": time.process_time() - cpu,
            }
            rows += heal_rows(tuned) if part == "heal" else domain_rows(tuned)
            share = 100 * tuned.share
            rows.append(Row(f"{part}: delta of the model", "%", share, gate=Gate(8, less=True)))
            rows.append(Row(f"{part}: time", "min", minutes, gate=Gate(25, less=True)))
            exact = float(rolls_back(artifact, tuned, folder))
            rows.append(Row(f"{part}: rolled back to the bit", "1 = yes", exact, gate=Gate(1)))
    peak = resident_bytes("VmHWM")
    beside = {"FP32 model": 4 * parameters / 1e6}
    rows.append(
        Row("peak memory", "MB", peak / 1e6, beside, "FP32 model", peak / (4 * parameters),
            Gate(2.5, less=True))
    )  # fmt: skip
    common.finish("finetune", options, rows, figures=figures)


def heal_rows(tuned: Tuned) -> list[Row]:
    rows = []
    for name, before in tuned.outcome.before.items():
        after = tuned.outcome.after[name]
        gone = 100 * (1 - after.kl / before.kl)
        gate = Gate(25, aim=40) if name == "held-out" else None
        rows.append(Row(f"heal: {name}, KL removed", "%", gone, gate=gate))
        rows.append(Row(f"heal: {name}, KL after", "nats", after.kl, {"before": before.kl}))
    return rows


def domain_rows(tuned: Tuned) -> list[Row]:
    before, after = tuned.outcome.domain_before, tuned.outcome.domain_after
    if before is None or after is None:
        raise SystemExit("nothing was measured on the domain")
    gained = 100 * (after.accuracy - before.accuracy)
    old, new = (side[WIKI].perplexity for side in (tuned.outcome.before, tuned.outcome.after))
    return [
        Row("domain: accuracy gained", "points", gained, gate=Gate(5)),
        Row("domain: accuracy after", "%", 100 * after.accuracy, {"before": 100 * before.accuracy}),
        Row(f"domain: {WIKI} perplexity", "", new, {"before": old}, "before", new / old,
            Gate(1.02, less=True)),
    ]  # fmt: skip


def rolls_back(artifact: Artifact, tuned: Tuned, folder: Path) -> bool:
    """Apply the delta, roll it back, and compare every file."""

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in artifact.path.rglob("*") if p.is_file()}

    before = files()
    path = folder / "tuned.delta"
    write_delta(path, tuned.delta)
    applied = apply_delta(artifact.path, path)
    changed = applied.digest != artifact.digest and files() != before
    return changed and roll_back(artifact.path).digest == artifact.digest and files() == before


def wikitext(artifact: Artifact, path: Path, tokens: int) -> list[list[int]]:
    """Windows of 512, begun as the model asks."""
    text = path.read_text(encoding="utf-8")[: tokens * 8]
    ids = Tokenizer(load_texts(artifact)).encode(text)[:tokens]
    bos = artifact.tokens.bos
    begin = [bos] if artifact.tokens.add_bos and bos is not None else []
    step = 512 - len(begin)
    return [begin + ids[at : at + step] for at in range(0, len(ids) - 1, step)]


def banking(path: Path, folder: Path, options: Any) -> tuple[Path, Path]:
    """Chats to learn and chats held back, as files of JSON lines."""
    with path.open(encoding="utf-8", newline="") as file:
        found = [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]
    order = np.random.default_rng(options.seed).permutation(len(found))
    back = len(found) // 10
    sets = {"held": order[:back][: options.held_chats], "learn": order[back:][: options.chats]}
    paths = []
    for name in ("learn", "held"):
        paths.append(folder / f"{name}.jsonl")
        with paths[-1].open("w", encoding="utf-8") as file:
            for i in sets[name]:
                text, label = found[i]
                messages = [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": label.replace("_", " ")},
                ]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return paths[0], paths[1]


_SEEN = {"at": 0.0}


def watch(report: Report) -> None:
    """A line every quarter of a minute, on stderr."""
    if time.monotonic() - _SEEN["at"] > 15:
        _SEEN["at"] = time.monotonic()
        loss = "" if report.loss is None else f" loss {report.loss:.4f} held-out {report.held:.4f}"
        print(f"{report.stage} {report.done}/{report.total}{loss}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
