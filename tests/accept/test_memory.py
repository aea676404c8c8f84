"""Minutes under a ceiling: sixteen full contexts at once, in every way a model is run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from flashlite.evaluate.peers import find_peers, peer_python
from flashlite.evaluate.process import Measurer, our_command, peer_command
from flashlite.runtime.memory import format_size, parse_size
from flashlite.runtime.prepare import find_artifact

pytestmark = [
    pytest.mark.accept,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]

MODEL = "smollm2-135m-instruct"
MINUTES = float(os.environ.get("FLASHLITE_SOAK_MINUTES", "5"))
FILL = Path(__file__).parent.parent / "runtime/fill_model.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def fill(seconds: float, **settings: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, FILL, MODEL, json.dumps(settings), str(seconds)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]  # a kill would be negative
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def enough(refused: str) -> int:
    """The size that a refusal says would do."""
    return parse_size(refused.partition("raise max_mem to ")[2].split()[0])


def test_sixteen_full_contexts_at_the_smallest_ceiling() -> None:
    settings = {"max_sequences": 16, "max_sequence_length": 2048}
    ceiling = enough(fill(0, max_mem="1MB", **settings)["refused"])
    report = fill(MINUTES * 60, max_mem=ceiling, **settings)
    print(
        f"\n16 x 2048 tokens within {format_size(ceiling)}: ledger {format_size(report['total'])}, "
        f"peak {format_size(report['peak'])}, {report['tokens']} tokens"
    )
    assert report["peak"] <= ceiling
    below = fill(0, max_mem=report["total"] - 25_000_000, **settings)
    assert "the model needs" in below["refused"]


def test_an_arena_for_sixteen_full_contexts() -> None:
    report = fill(60, max_mem="700MB", max_sequences=16, max_sequence_length=2048)
    print(
        f"\narena of {report['arena_tokens']} tokens: ledger {format_size(report['total'])}, "
        f"peak {format_size(report['peak'])}"
    )
    assert report["arena_tokens"] == 16 * 2048
    assert report["peak"] <= report["total"] <= 700_000_000


def peak_of_tree(pid: int) -> int:
    """VmHWM of a process and of all that it started, summed."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        total += int(match.group(1)) * 1024 if match else 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            children = (task / "children").read_text(encoding="ascii").split()
            total += sum(peak_of_tree(int(child)) for child in children)
    except OSError:
        pass  # it ended
    return total


def test_a_server_under_siege_keeps_its_ceiling() -> None:
    """More clients than sequences: long prompts, long answers, readers that do not read, bodies
    that are too large; nobody is killed and what does not fit is refused."""
    port, ceiling = 8123, 420_000_000
    words = ["-m", "flashlite", "serve", MODEL, "--port", str(port), "--max-mem", str(ceiling)]
    server = subprocess.Popen(
        [sys.executable, *words, "--max-sequences", "16", "--max-sequence-length", "1024"],
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                health = httpx.get(f"{url}/health").json()
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert health["memory"]["total"] <= ceiling
        assert "server" in health["memory"]["terms"]
        statuses: list[int] = []
        end = time.monotonic() + MINUTES * 60

        def visit(seed: int) -> None:
            kinds: list[dict[str, Any]] = [
                {"content": f"{seed} tell me more. " * 150, "max_tokens": 100},
                {"content": "hi", "max_tokens": 900},
                {"content": "7 " * 200_000, "max_tokens": 5},
                {"content": "x" * 2_000_000, "max_tokens": 5},
            ]
            n = seed
            while time.monotonic() < end:
                n += 1
                kind = kinds[n % 4]
                body = {
                    "messages": [{"role": "user", "content": kind["content"]}],
                    "max_tokens": kind["max_tokens"],
                    "stream": n % 3 == 0,
                }
                try:
                    with httpx.stream(
                        "POST", f"{url}/v1/chat/completions", json=body, timeout=300
                    ) as response:
                        statuses.append(response.status_code)
                        if n % 5 == 0:
                            time.sleep(2)  # does not read, then leaves
                        else:
                            response.read()
                except httpx.TransportError:
                    statuses.append(0)  # refused while it was sending

        visitors = [threading.Thread(target=visit, args=(i,)) for i in range(24)]
        for visitor in visitors:
            visitor.start()
        peak = 0
        while any(visitor.is_alive() for visitor in visitors):
            peak = max(peak, peak_of_tree(server.pid))
            time.sleep(0.5)
        health = httpx.get(f"{url}/health").json()
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        print(
            f"\nserver of 16 x 1024 within {format_size(ceiling)}: "
            f"ledger {format_size(health['memory']['total'])}, peak {format_size(peak)}, {counts}"
        )
        assert server.poll() is None
        assert counts.get(200, 0) > 0
        assert peak <= ceiling
        assert health["memory"]["peak"] <= ceiling
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


@pytest.mark.parametrize(("tokens", "gate"), [(2048, 0.95), (8192, 0.8)])
def test_peak_memory_against_llama_cpp(tokens: int, gate: float, smollm2_gguf: Path) -> None:
    (peer,) = find_peers(["llama.cpp"])
    artifact = find_artifact(MODEL).path
    peaks = []
    for name, command, model in (
        ("flashlite", our_command(), artifact),
        (peer.name, peer_command(peer_python(peer), peer.script), smollm2_gguf),
    ):
        with Measurer(name, command) as measurer:
            measurer.open(model, threads=2, context=tokens)
            measurer.prefill([1000 + i * 7919 % 40000 for i in range(tokens)])
            peaks.append(measurer.peak_memory())
    ours, theirs = peaks
    print(
        f"\n{tokens} tokens: {format_size(ours)}, llama.cpp {format_size(theirs)}: "
        f"{ours / theirs:.3f}, at most {gate}"
    )
    assert ours <= gate * theirs
