"""The engines flashlite is measured against, each in a Python environment of its own.

An environment is made on first use under the cache folder, `peers/NAME-VERSION`, and kept.
FLASHLITE_PEER_LLAMA_CPP and FLASHLITE_PEER_OPENVINO name the Python of one made by hand instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from flashlite import paths
from flashlite.errors import EvaluateError, UsageError

__all__ = ["PEERS", "Peer", "find_peers", "peer_python"]


@dataclass(frozen=True)
class Peer:
    """One engine, the version that is measured, and how it is installed at its best."""

    name: str
    version: str
    requirements: tuple[str, ...]
    script: Path  # defines `Model`; see worker.py
    module: str  # what must be importable afterwards
    pip_options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # of the installation

    @property
    def override(self) -> str:
        """The variable that names a Python to use instead."""
        return "FLASHLITE_PEER_" + self.name.upper().replace(".", "_")


_HERE = Path(__file__).parent

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="llama.cpp",
            version="0.3.36",
            requirements=("llama-cpp-python==0.3.36", "numpy"),
            script=_HERE / "peer_llama_cpp.py",
            module="llama_cpp",
            # Built here, for this CPU: a cached wheel may have been built for another one.
            pip_options=("--no-binary=llama-cpp-python",),
            environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF"},
        ),
        Peer(
            name="openvino",
            version="2026.4.1",
            requirements=("openvino-genai==2026.4.1.0", "numpy"),
            script=_HERE / "peer_openvino.py",
            module="openvino_genai",
        ),
    )
}


def find_peers(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, each once.

    Raises:
        UsageError: a name is unknown.
    """
    for name in names:
        if name not in PEERS:
            raise UsageError(f"peer {name!r} is unknown; known are {', '.join(PEERS)}")
    return [PEERS[name] for name in dict.fromkeys(names)]


def peer_python(peer: Peer, report: Callable[[str], None] = lambda _: None) -> Path:
    """The Python that has the peer; installs it on first use, which may take minutes.

    Args:
        report: told in a line what takes long.

    Raises:
        EvaluateError: the installation failed; the message names its log.
        UsageError: the override names no file.
    """
    if override := os.environ.get(peer.override):
        if not Path(override).is_file():
            raise UsageError(f"{peer.override} is {override!r}, which is no file")
        return Path(override)
    folder = paths.cache_dir() / "peers" / f"{peer.name}-{peer.version}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "ready").exists():
            report(f"installing {peer.name} {peer.version} for comparison, once")
            _install(peer, folder)
    return _python(folder)


def _install(peer: Peer, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted installation left
    log = folder.with_name(f"{folder.name}.log")
    environment = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    environment.update(peer.environment)
    python = str(_python(folder))
    commands = (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", *peer.pip_options, *peer.requirements],
        [python, "-I", "-c", f"import {peer.module}"],
    )
    with log.open("wb") as output:
        for command in commands:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            if done.returncode:
                raise EvaluateError(
                    f"{peer.name} {peer.version} could not be installed: {_last_line(log)}; "
                    f"see {log}, or name a Python that has it in {peer.override}"
                )
    (folder / "ready").touch()  # last: without it the folder is made anew


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    errors = [line.strip() for line in lines if "error" in line.lower()]
    return (errors or [line.strip() for line in lines if line.strip()] or ["no output"])[-1][:200]
