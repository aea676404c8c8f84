"""What a foreign program costs: decoding while another process keeps one core busy.

    python benchmarks/busy.py
    python benchmarks/busy.py --steps 512

Idle and busy timings of the same 256 greedy steps alternate; the foreign process is a loop that
never waits, tied to the last of our cores. A pool that spins at barriers loses whole time slices
to it. The gate: at most 2.5 times slower than idle. Peers are measured in the same rounds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import common
from common import OURS, SMOLLM2, Gate, Row
from flashlite.evaluate.process import Measurer

GATE = Gate(2.5, less=True)  # times the idle time
LOOP = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
while True:
    pass
"""


@contextmanager
def foreign_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped until somebody continues it."""
    process = subprocess.Popen([sys.executable, "-I", "-c", LOOP])
    try:
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = common.make_parser(__doc__, peers="llama.cpp,openvino")
    parser.add_argument("--steps", type=int, default=256, metavar="N", help="[default: 256]")
    options = common.arguments(parser)
    if not hasattr(os, "sched_setaffinity"):
        common.note("processes cannot be tied to a core here: the busy one may move about")
    artifact = common.ready_artifact(SMOLLM2)
    ids, draw = common.ordinary_ids(artifact), random.Random(0)
    samples: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as processes:
        foreign = processes.enter_context(foreign_process())
        running = []
        for one in common.contenders(SMOLLM2, options.peers, artifact):
            measurer = processes.enter_context(Measurer(one.name, one.command))
            measurer.open(one.model, threads=options.threads, context=512)
            measurer.decode(draw.choices(ids, k=16), 8)  # warms up
            running.append(measurer)
            samples[one.name] = {"idle": [], "busy": []}
        for lap in range(options.rounds):
            common.progress(lap, options.rounds)
            prompt = draw.choices(ids, k=16)
            first = lap % len(running)
            for measurer in running[first:] + running[:first]:
                taken = samples[measurer.name]
                taken["idle"].append(options.steps / measurer.decode(prompt, options.steps))
                foreign.send_signal(signal.SIGCONT)
                other = draw.choices(ids, k=16)  # no engine may have seen it
                taken["busy"].append(options.steps / measurer.decode(other, options.steps))
                foreign.send_signal(signal.SIGSTOP)
        common.progress(options.rounds, options.rounds)
    idle, busy = (
        {name: common.median(taken[state]) for name, taken in samples.items()}
        for state in ("idle", "busy")
    )
    slower = {name: idle[name] / busy[name] for name in samples}
    ours = slower.pop(OURS)
    rows = [
        Row("decoding, machine idle", "tok/s", idle.pop(OURS), idle),
        Row("decoding, one core busy", "tok/s", busy.pop(OURS), busy),
        Row("busy core: times slower", "x", ours, slower, gate=GATE),
    ]
    common.finish("busy", options, rows, samples=samples)


if __name__ == "__main__":
    main()
