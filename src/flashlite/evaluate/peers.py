"""The engines flashlite is measured against, each in a Python environment of its own.

An environment is made on first use under the cache folder, `peers/NAME-VERSION-RECIPE`, and kept;
RECIPE is a digest of how it is built, so that another recipe builds another environment.
FLASHLITE_PEER_LLAMA_CPP, FLASHLITE_PEER_OPENVINO and FLASHLITE_PEER_SENTENCE_TRANSFORMERS name the
Python of one made by hand instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from filelock import FileLock

from flashlite import paths
from flashlite.errors import EvaluateError, UsageError

__all__ = ["PEERS", "Peer", "build_llama_cpp", "find_peers", "peer_python"]


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
    encodes: bool = False  # makes vectors of texts instead of text

    @property
    def override(self) -> str:
        """The variable that names a Python to use instead."""
        return "FLASHLITE_PEER_" + self.name.upper().replace(".", "_").replace("-", "_")

    @property
    def folder(self) -> str:
        """The name of its environment: of the engine, its version and its recipe."""
        recipe = [self.requirements, self.pip_options, sorted(self.environment.items())]
        return f"{self.name}-{self.version}-{blake3(json.dumps(recipe).encode()).hexdigest()[:8]}"


_HERE = Path(__file__).parent
_CPUINFO = Path("/proc/cpuinfo")
# Newest first; Debian names a compiler by its version alone.
_CLANGS = ("clang", *(f"clang-{version}" for version in range(30, 13, -1)))
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def build_llama_cpp(
    cpuinfo: Path = _CPUINFO, find: Callable[[str], str | None] = shutil.which
) -> dict[str, str]:
    """The variables that llama.cpp is built with, to be at its best on this CPU.

    On a CPU with AMX a gcc build crashes in `ggml_backend_amx_mul_mat`: its tile configuration is
    left uninitialised (https://github.com/ggml-org/llama.cpp/issues/20824). clang's works. Both
    ways out were measured in one run, medians of three rounds, two threads of a Xeon with AMX,
    tokens/s:

                                      prefill 512  prefill 2,048  decode @16  decode @1,024
        SmolLM2-135M  clang 14, AMX           352            306         104             42
                      gcc 12, no AMX          350            283         108             42
        Gemma-3-270M  clang 14, AMX           729            663          53             48
                      gcc 12, no AMX          679            603          51             47

    So clang is taken where there is one (and ggml's own threads, since OpenMP mostly lacks there),
    else the system's compiler without AMX.
    """
    arguments = ["-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF"]
    try:
        amx = "amx_tile" in cpuinfo.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        amx = False
    if not amx:
        return {"CMAKE_ARGS": " ".join(arguments)}
    for name in _CLANGS:
        cxx = name.replace("clang", "clang++")
        if find(name) and find(cxx):
            words = " ".join([*arguments, "-DGGML_OPENMP=OFF"])
            return {"CC": name, "CXX": cxx, "CMAKE_ARGS": words}
    for language in ("C", "CXX"):
        arguments.append(f'-DCMAKE_{language}_FLAGS="{_NO_AMX}"')
    return {"CMAKE_ARGS": " ".join(arguments)}


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="llama.cpp",
            version="0.3.36",
            requirements=("llama-cpp-python==0.3.36", "numpy"),
            script=_HERE / "peer_llama_cpp.py",
            module="llama_cpp",
            # Built here, for this CPU. pip also keeps what it built: a wheel of its cache may be
            # of another recipe or for another CPU.
            pip_options=("--no-binary=llama-cpp-python", "--no-cache-dir"),
            environment=build_llama_cpp(),
        ),
        Peer(
            name="openvino",
            version="2026.4.1",
            requirements=("openvino-genai==2026.4.1.0", "numpy"),
            script=_HERE / "peer_openvino.py",
            module="openvino_genai",
        ),
        Peer(
            name="sentence-transformers",
            version="6.2.0",
            requirements=("sentence-transformers==6.2.0", "torch==2.13.0"),
            script=_HERE / "peer_sentence_transformers.py",
            module="sentence_transformers",
            encodes=True,
        ),
    )
}


def find_peers(names: Sequence[str], *, encode: bool = False) -> list[Peer]:
    """The peers of these names, each once.

    Args:
        encode: those that make vectors of texts, instead of those that write.

    Raises:
        UsageError: a name is unknown.
    """
    known = [name for name, peer in PEERS.items() if peer.encodes == encode]
    for name in names:
        if name not in known:
            raise UsageError(f"peer {name!r} is unknown; known are {', '.join(known)}")
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
    folder = paths.cache_dir() / "peers" / peer.folder
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
