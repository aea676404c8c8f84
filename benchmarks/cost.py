"""What a thousand tokens cost: CPU-seconds, and joules where the machine counts them.

    python benchmarks/cost.py
    python benchmarks/cost.py --rounds 5 --models smollm2 --threads 1

The compressed model on flashlite against its uncompressed source: on PyTorch (transformers, the
better of bfloat16 and float32 for each measure), and on llama.cpp with F16 weights made from the
same file. A request is a prompt of 512 random tokens and 128 greedy steps after it. CPU-seconds are
user and system time of all threads of the engine's process, spinning ones included. PyTorch comes
with `pip install 'flashlite[oracle,dev]'`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import common
import sources
from common import GEMMA, SMOLLM2, Gate, Row
from flashlite.evaluate.energy import find_meter
from flashlite.evaluate.peers import find_peers, peer_python
from flashlite.evaluate.process import Measurer, our_command, peer_command
from flashlite.evaluate.speed import Contender

PROMPT, STEPS = 512, 128
MODELS = {"smollm2": (SMOLLM2, "SmolLM2-135M"), "gemma": (GEMMA, "Gemma-3-270M")}
PHASES = ("prefill", "decoding")
LLAMA, TORCH = "llama.cpp F16", "PyTorch"
GATE = Gate(0.6, less=True, aim=0.25)  # 40 % less, and 75 %

Samples = dict[str, dict[str, list[float]]]  # per 1,000 tokens, by engine and phase


def contenders(model: str, preset: str) -> list[Contender]:
    """Ours compressed, the peers on the source."""
    import flashlite.evaluate

    script = Path(flashlite.evaluate.__file__).parent / "peer_torch.py"
    (llama,) = find_peers(["llama.cpp"])
    llama_command = peer_command(peer_python(llama, common.note), llama.script)
    return [
        Contender(common.OURS, our_command(), common.ready_artifact(model, preset).path),
        Contender(LLAMA, llama_command, sources.f16_gguf(model)),
        *(
            Contender(
                f"{TORCH} {dtype}",
                peer_command(Path(sys.executable), script),
                sources.torch_folder(model, dtype),
            )
            for dtype in sources.TORCH_TYPES
        ),
    ]


def measure(
    engines: Sequence[Contender], ids: Sequence[int], threads: int, rounds: int
) -> tuple[Samples, Samples]:
    """CPU-seconds and joules per 1,000 tokens; the engines take turns, one that does not is
    stopped. Joules are empty where nothing counts them: they are of the whole request, prompt and
    steps, by token.
    """
    draw = random.Random(0)
    cpu: Samples = {c.name: {phase: [] for phase in PHASES} for c in engines}
    joules: Samples = {c.name: {"request": []} for c in engines}
    meter = find_meter()
    with ExitStack() as processes:
        running = [processes.enter_context(Measurer(c.name, c.command)) for c in engines]
        for measurer, contender in zip(running, engines, strict=True):
            measurer.open(contender.model, threads=threads, context=1024)
            measurer.cost(draw.choices(ids, k=64), 4)
        for lap in range(rounds):
            common.progress(lap, rounds)
            prompt = draw.choices(ids, k=PROMPT)
            first = lap % len(running)  # nobody always comes first
            for measurer in running[first:] + running[:first]:
                before = meter.joules() if meter is not None else 0.0
                prefill, decode = measurer.cost(prompt, STEPS)
                cpu[measurer.name]["prefill"].append(prefill / PROMPT * 1000)
                cpu[measurer.name]["decoding"].append(decode / STEPS * 1000)
                if meter is not None:
                    # The prompt is read twice: once by itself, once before the steps.
                    taken = (meter.joules() - before) / (2 * PROMPT + STEPS) * 1000
                    joules[measurer.name]["request"].append(taken)
        common.progress(rounds, rounds)
    return cpu, joules if meter is not None else {}


def rows(title: str, unit: str, samples: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Row]:
    """Ours beside each peer at its best."""
    found = []
    for phase in samples[common.OURS]:
        medians = {name: common.median(of[phase]) for name, of in samples.items()}
        ours = medians.pop(common.OURS)
        torch = min(value for name, value in medians.items() if name.startswith(TORCH))
        for peer, theirs in ((LLAMA, medians[LLAMA]), (TORCH, torch)):
            measure = f"{title} {phase}, per 1,000 tokens"
            found.append(Row(measure, unit, ours, {peer: theirs}, peer, ours / theirs, GATE))
    return found


def main() -> None:
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument(
        "--models",
        default=",".join(MODELS),
        metavar="NAMES",
        help=f"of {', '.join(MODELS)} [default: all]",
    )
    parser.add_argument(
        "--preset", default="import", help="how ours is compressed [default: import]"
    )
    options = common.arguments(parser)
    names = [name for name in options.models.split(",") if name]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"model {unknown[0]!r} is unknown; known are {', '.join(MODELS)}")
    found, samples = [], {}
    for name in names:
        model, title = MODELS[name]
        engines = contenders(model, options.preset)
        ids = common.ordinary_ids(common.ready_artifact(model, options.preset))
        cpu, joules = measure(engines, ids, options.threads, options.rounds)
        found += rows(title, "CPU-s", cpu)
        found += rows(title, "J", joules) if joules else []
        samples[name] = {"cpu_seconds": cpu, "joules": joules}
    counted = find_meter() is not None
    if not counted:
        common.note("this machine has no energy counter (powercap): CPU-seconds alone are measured")
    common.finish("cost", options, found, samples=samples, energy_counter=counted)


if __name__ == "__main__":
    main()
