"""The parent's side of a measuring process (see worker.py): ask it, keep it still, end it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from flashlite.errors import EvaluateError

__all__ = ["Measurer", "our_command", "peer_command"]

_HERE = Path(__file__).parent


def our_command(*, exact_head: bool = False, encode: bool = False) -> list[str]:
    """Starts the process that measures flashlite itself; `encode`: an encoder of it."""
    name = "ours_encoder.py" if encode else "ours_exact.py" if exact_head else "ours.py"
    script = _HERE / name
    return [sys.executable, "-m", "flashlite.evaluate.worker", str(script)]


def peer_command(python: Path, script: Path) -> list[str]:
    """Starts the process that measures a peer, isolated from this environment's packages."""
    return [str(python), "-I", str(_HERE / "worker.py"), str(script)]


class Measurer:
    """One engine in a process of its own.

    It is stopped by a signal except while it answers: some engines' threads spin when idle.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Start the process.

        Raises:
            EvaluateError: it cannot be started.
        """
        self.name = name
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._errors.close()
            raise EvaluateError(f"{name} cannot be started: {error}") from None
        self._pause()

    def open(self, model: Path, *, threads: int, context: int, sequences: int = 1) -> float:
        """Open a model for up to `context` tokens in all its sequences; the seconds it took.

        Raises:
            EvaluateError: as every method: the engine failed, in its words, or its process ended.
        """
        several = {"sequences": sequences} if sequences > 1 else {}
        answer = self._ask(
            cmd="open", model=str(model), threads=threads, context=context, **several
        )
        return float(answer["seconds"])

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from an empty cache to the token after `ids`."""
        return float(self._ask(cmd="prefill", ids=list(ids))["seconds"])

    def decode(self, ids: Sequence[int], n: int) -> float:
        """Seconds of `n` greedy steps after `ids`, whose prefill is not counted."""
        return float(self._ask(cmd="decode", ids=list(ids), n=n)["seconds"])

    def together(self, prompts: Sequence[Sequence[int]], n: int) -> float:
        """Seconds of `n` greedy steps of all prompts at once, whose prefill is not counted."""
        asked = [list(prompt) for prompt in prompts]
        return float(self._ask(cmd="together", prompts=asked, n=n)["seconds"])

    def embed(self, texts: Sequence[str], batch: int = 32) -> float:
        """Seconds to turn texts into vectors, `batch` together where the engine does so."""
        return float(self._ask(cmd="embed", texts=list(texts), batch=batch)["seconds"])

    def vectors(self, texts: Sequence[str], batch: int = 32) -> list[list[float]]:
        """The vectors of texts."""
        answer = self._ask(cmd="embed", texts=list(texts), batch=batch, vectors=True)
        found: list[list[float]] = answer["vectors"]
        return found

    def cost(self, ids: Sequence[int], n: int) -> tuple[float, float]:
        """CPU-seconds of a prefill of `ids`, and of `n` greedy steps after it."""
        answer = self._ask(cmd="cost", ids=list(ids), n=n)
        return float(answer["prefill"]), float(answer["decode"])

    def peak_memory(self) -> int:
        """Highest resident bytes so far."""
        return int(self._ask(cmd="rss")["bytes"])

    def close(self) -> None:
        """End the process, whatever it is doing; calling it again does nothing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that nobody read
                    stream.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise EvaluateError(f"{self.name}: its process is closed")
        self._resume()
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EvaluateError(f"{self.name} ended with exit code {code}: {self._last_words()}")
        self._pause()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EvaluateError(f"{self.name}: {answer['error']}")
        return answer

    def _pause(self) -> None:
        if sys.platform != "win32":
            self._process.send_signal(signal.SIGSTOP)

    def _resume(self) -> None:
        if sys.platform != "win32":
            self._process.send_signal(signal.SIGCONT)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no output")

    def __enter__(self) -> Measurer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
