"""A measuring process: JSON lines in, JSON lines out. Run by the peer's own Python, so that it
imports the standard library alone.

    python -I worker.py peer_llama_cpp.py

The file named on the command line defines `Model(path, threads, context)` with

    prefill(ids) -> seconds   from an empty cache to the logits of the last id on the host
    decode(ids, n) -> seconds of n greedy steps after `ids`, whose prefill is not counted
    close()

and, where it runs several sequences in one step, takes their number as a fourth argument and has

    together(prompts, n) -> seconds of n greedy steps of all of them, prefill not counted

An encoder has, instead of all of these,

    embed(texts, batch) -> seconds, vectors   of texts, `batch` of them together if it does so

    {"cmd": "open", "model": PATH, "threads": 2, "context": 2048} -> {"seconds": 0.4}
    {"cmd": "prefill", "ids": [...]}           -> {"seconds": 0.9}
    {"cmd": "decode", "ids": [...], "n": 128}  -> {"seconds": 0.7}
    {"cmd": "together", "prompts": [[...]], "n": 64}  -> {"seconds": 0.9}   after an open with
                                                         "sequences": 16, "context" for them all
    {"cmd": "embed", "texts": ["..."], "batch": 32}   -> {"seconds": 0.2}, with "vectors": true
                                                         also {"vectors": [[...], ...]}
    {"cmd": "cost", "ids": [...], "n": 128}    -> {"prefill": 0.4, "decode": 1.3}   CPU-seconds of
                                                 all threads: user and system time together
    {"cmd": "rss"}                             -> {"bytes": 98000000}   highest so far (VmHWM)
    {"cmd": "close"}                           -> {}

A failure is answered with {"error": "one line"}. Whatever a peer prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from typing import IO, Any

__all__ = ["answer_lines", "main", "measure_cost", "peak_resident_bytes"]


def main() -> None:
    """Serve the peer named by the first argument until `close` or the end of stdin."""
    _end_with_parent()
    # Answers get a descriptor of their own: libraries write to descriptor 1 as they like.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer_lines(runpy.run_path(sys.argv[1])["Model"], sys.stdin, answers)


def answer_lines(model_class: Any, requests: IO[str], answers: IO[str]) -> None:
    """Answer each line of `requests` with one line."""
    model = None
    for line in requests:
        try:
            request = json.loads(line)
            command = request["cmd"]
            answer: dict[str, Any] = {}
            if command == "open":
                start = time.perf_counter()
                fields = ["model", "threads", "context", "sequences"]
                model = model_class(*(request[name] for name in fields if name in request))
                answer = {"seconds": time.perf_counter() - start}
            elif command == "rss":
                answer = {"bytes": peak_resident_bytes()}
            elif command == "close":
                if model is not None:
                    model.close()
            elif model is None:
                raise RuntimeError("no model is open")
            elif command == "prefill":
                answer = {"seconds": model.prefill(request["ids"])}
            elif command == "decode":
                answer = {"seconds": model.decode(request["ids"], request["n"])}
            elif command == "cost":
                answer = measure_cost(model, request["ids"], request["n"])
            elif command == "together":
                answer = {"seconds": model.together(request["prompts"], request["n"])}
            elif command == "embed":
                seconds, vectors = model.embed(request["texts"], request["batch"])
                answer = {"seconds": seconds}
                if request.get("vectors"):
                    answer["vectors"] = vectors.tolist()
            else:
                raise RuntimeError(f"unknown command {command!r}")
        except Exception as error:
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}"[:500]}
            command = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if command == "close":
            return


def measure_cost(model: Any, ids: list[int], n: int) -> dict[str, float]:
    """CPU-seconds of a prefill, and of `n` steps after it: what prefill and steps take together
    less what the prefill took.
    """
    start = time.process_time()
    model.prefill(ids)
    middle = time.process_time()
    model.decode(ids, n)
    prefill = middle - start
    return {"prefill": prefill, "decode": time.process_time() - middle - prefill}


def peak_resident_bytes() -> int:
    """The highest resident memory of this process."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _end_with_parent() -> None:
    """Idle workers are stopped by a signal and would outlive a parent that is killed."""
    if sys.platform == "linux":
        import ctypes
        import signal

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main()
