"""Processes that measure, environments they run in, and turns they take."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from flashlite.errors import EvaluateError, UsageError
from flashlite.evaluate import peers as peers_module
from flashlite.evaluate import worker
from flashlite.evaluate.machine import describe_machine
from flashlite.evaluate.peers import PEERS, Peer, build_llama_cpp, find_peers, peer_python
from flashlite.evaluate.process import Measurer, peer_command
from flashlite.evaluate.speed import Contender, Figures, Measure, choose_measures, compare, ratios

# An engine of known speed: it answers what `SPEED` tokens per second would have taken.
ENGINE = """
import os, threading
print("a library that prints")
os.write(1, b"and one that writes\\n")
class Model:
    def __init__(self, path, threads, context):
        self.path, self.log = path, open(path + "." + "{name}", "a")
        self.log.write(f"open {{threads}} {{context}}\\n")
        if "{name}" == "spinning":
            threading.Thread(target=self.spin, daemon=True).start()
    def spin(self):
        while True:
            pass
    def prefill(self, ids):
        if "{name}" == "failing" and len(ids) > 3:
            raise ValueError("two\\nlines")
        if "{name}" == "dying":
            os.write(2, b"out of luck\\n"); os._exit(7)
        self.log.write(f"pp {{ids}}\\n"); self.log.flush()
        return len(ids) / {speed}
    def decode(self, ids, n):
        self.log.write(f"tg {{n}} {{ids}}\\n"); self.log.flush()
        return n / {speed}
    def close(self):
        self.log.close()
"""


def engine(folder: Path, name: str, speed: float = 100.0) -> Contender:
    script = folder / f"{name}.py"
    script.write_text(ENGINE.format(name=name, speed=speed))
    return Contender(name, peer_command(Path(sys.executable), script), folder / "model")


def lines_of(contender: Contender) -> list[str]:
    return Path(f"{contender.model}.{contender.name}").read_text().splitlines()


def test_medians_and_ratios_follow_the_engines_speeds(tmp_path: Path) -> None:
    ours, fast, slow = (
        engine(tmp_path, name, speed)
        for name, speed in (("ours", 300), ("fast", 600), ("slow", 60))
    )
    measures = [Measure(5), Measure(3, 4)]
    reports: list[tuple[int, int]] = []
    figures = compare(
        [ours, fast, slow],
        measures,
        range(100, 200),
        threads=2,
        rounds=3,
        report=lambda done, total: reports.append((done, total)),
    )
    assert list(figures) == ["ours", "fast", "slow"]
    assert figures["ours"].medians == pytest.approx({"pp5": 300.0, "tg4@3": 300.0})
    assert all(len(taken) == 3 for taken in figures["slow"].samples.values())
    assert all(f.open_seconds > 0 and f.peak_bytes > 1e6 for f in figures.values())
    found = ratios(figures, "ours")
    assert found["pp5"] == pytest.approx({"fast": 0.5, "slow": 5.0})
    assert found["tg4@3"] == pytest.approx({"fast": 0.5, "slow": 5.0})
    assert reports[0] == (0, 6)
    assert reports[-1] == (6, 6)


def test_engines_share_prompts_and_none_repeats(tmp_path: Path) -> None:
    ours, peer = engine(tmp_path, "ours"), engine(tmp_path, "peer")
    measures = [Measure(6), Measure(6, 2)]
    compare([ours, peer], measures, range(1000, 9000), threads=1, rounds=4)
    timed = [line for line in lines_of(ours) if line.startswith(("pp", "tg 2"))]
    assert timed == [line for line in lines_of(peer) if line.startswith(("pp", "tg 2"))]
    prompts = [line.partition("[")[2] for line in timed]
    assert len(prompts) == len(set(prompts)) == 8
    ids = [int(text) for prompt in prompts for text in prompt.rstrip("]").split(", ")]
    assert len(ids) == 48
    assert all(1000 <= token < 9000 for token in ids)
    assert lines_of(ours)[0] == "open 1 256"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_idle_engine_uses_no_cpu(tmp_path: Path) -> None:
    spinning = engine(tmp_path, "spinning")

    def cpu_ticks(measurer: Measurer) -> int:
        stat = Path(f"/proc/{measurer._process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(stat[11]) + int(stat[12])

    with Measurer("spinning", spinning.command) as measurer:
        measurer.open(spinning.model, threads=1, context=64)
        before = cpu_ticks(measurer)
        time.sleep(0.5)
        assert cpu_ticks(measurer) - before <= 1
        assert measurer.prefill([1]) > 0  # and it wakes up


def test_an_engines_error_is_told_in_its_words(tmp_path: Path) -> None:
    failing = engine(tmp_path, "failing")
    with Measurer("failing", failing.command) as measurer:
        with pytest.raises(EvaluateError, match="no model is open"):
            measurer.prefill([1])
        measurer.open(failing.model, threads=1, context=64)
        with pytest.raises(EvaluateError) as caught:
            measurer.prefill([1, 2, 3, 4])
        assert str(caught.value) == "failing: ValueError: two lines"
        assert measurer.prefill([1]) > 0  # it goes on


def test_an_engine_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    dying = engine(tmp_path, "dying")
    with Measurer("dying", dying.command) as measurer:
        measurer.open(dying.model, threads=1, context=64)
        with pytest.raises(EvaluateError, match="dying ended with exit code 7: out of luck"):
            measurer.prefill([1])
        with pytest.raises(EvaluateError):
            measurer.prefill([1])
    measurer.close()
    with pytest.raises(EvaluateError, match="closed"):
        measurer.prefill([1])


def test_a_python_that_cannot_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="cannot be started"):
        Measurer("none", [str(tmp_path / "absent")])
    with (
        Measurer("broken", peer_command(Path(sys.executable), tmp_path / "absent.py")) as measurer,
        pytest.raises(EvaluateError, match=r"exit code 1: .*absent\.py"),
    ):
        measurer.peak_memory()


def test_every_line_is_answered() -> None:
    class Model:
        def __init__(self, path: str, threads: int, context: int) -> None:
            self.tokens = threads * context

        def prefill(self, ids: list[int]) -> float:
            return float(len(ids))

        def decode(self, ids: list[int], n: int) -> float:
            return float(self.tokens * n)

        def together(self, prompts: list[list[int]], n: int) -> float:
            return float(sum(map(len, prompts)) * n)

        def close(self) -> None:
            pass

    requests = [
        "nonsense",
        '{"cmd": "decode", "ids": [], "n": 1}',
        '{"cmd": "open", "model": "m", "threads": 2, "context": 5}',
        '{"cmd": "prefill", "ids": [1, 2, 3]}',
        '{"cmd": "decode", "ids": [1], "n": 3}',
        '{"cmd": "together", "prompts": [[1], [2, 3]], "n": 7}',
        '{"cmd": "dance"}',
        '{"cmd": "rss"}',
        '{"cmd": "close"}',
        '{"cmd": "rss"}',
    ]
    answers = io.StringIO()
    worker.answer_lines(Model, io.StringIO("\n".join(requests)), answers)
    answered = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [list(a) for a in answered] == [
        ["error"], ["error"], *[["seconds"]] * 4, ["error"], ["bytes"], []
    ]  # fmt: skip
    assert [a["seconds"] for a in answered[3:6]] == [3.0, 30.0, 21.0]


def test_engines_of_several_sequences_are_told_how_many() -> None:
    opened: list[tuple[object, ...]] = []

    class Model:
        def __init__(self, *given: object) -> None:
            opened.append(given)

    line = '{"cmd": "open", "model": "m", "threads": 2, "context": 5'
    requests = io.StringIO(line + "}\n" + line + ', "sequences": 16}\n')
    worker.answer_lines(Model, requests, io.StringIO())
    assert opened == [("m", 2, 5), ("m", 2, 5, 16)]


def test_measures_stay_within_the_context() -> None:
    names = [measure.name for measure in choose_measures(8192, 8000)]
    assert names == ["pp512", "pp2048", "pp8000", "tg128@16", "tg128@1024"]
    assert [m.name for m in choose_measures(1151)] == ["pp512", "tg128@16"]
    assert [m.name for m in choose_measures(1152)] == ["pp512", "tg128@16", "tg128@1024"]
    assert [m.name for m in choose_measures(100, 60)] == ["pp60"]
    assert len(choose_measures(4096, 512)) == 4
    for context, extra in ((8192, 8193), (8192, 0), (100, None)):
        with pytest.raises(UsageError):
            choose_measures(context, extra)


def test_medians_ignore_one_disturbed_round() -> None:
    taken = Figures(1.0, 1, {"pp512": [100.0, 3.0, 102.0]})
    assert taken.medians == {"pp512": 100.0}


def test_peers_are_found_by_name() -> None:
    assert [peer.name for peer in find_peers(["openvino", "llama.cpp", "openvino"])] == [
        "openvino",
        "llama.cpp",
    ]
    with pytest.raises(UsageError, match="known are llama"):
        find_peers(["llama"])
    for peer in PEERS.values():
        assert peer.script.is_file()
        assert any(peer.version in requirement for requirement in peer.requirements)


def test_an_override_names_the_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLITE_PEER_LLAMA_CPP", sys.executable)
    assert peer_python(PEERS["llama.cpp"]) == Path(sys.executable)
    monkeypatch.setenv("FLASHLITE_PEER_LLAMA_CPP", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="absent"):
        peer_python(PEERS["llama.cpp"])


def test_another_recipe_is_another_environment() -> None:
    peer = PEERS["llama.cpp"]
    changed = (
        replace(peer, version="0"),
        replace(peer, requirements=("numpy",)),
        replace(peer, pip_options=()),
        replace(peer, environment={"CC": "other"}),
    )
    folders = [one.folder for one in (peer, *changed)]
    assert len(set(folders)) == 5
    assert all(name.startswith("llama.cpp-0") for name in folders)
    assert replace(peer).folder == peer.folder


def test_llama_cpp_is_built_so_that_amx_works(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx512_vnni amx_tile amx_int8\n")

    def found(*names: str) -> dict[str, str]:
        return build_llama_cpp(cpuinfo, lambda name: name if name in names else None)

    both = found("clang-14", "clang++-14", "clang-9", "clang++-9", "gcc")
    assert (both["CC"], both["CXX"]) == ("clang-14", "clang++-14")
    assert "no-amx" not in both["CMAKE_ARGS"]
    for lacking in (found("gcc"), found("clang-14"), found()):
        flags = shlex.split(lacking["CMAKE_ARGS"])
        assert "CC" not in lacking
        for language in ("C", "CXX"):
            assert f"-DCMAKE_{language}_FLAGS=-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" in flags
    cpuinfo.write_text("flags : fpu avx512_vnni\n")
    assert found("clang", "clang++") == {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF"}
    cpuinfo.unlink()
    assert found("clang", "clang++") == {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF"}
    assert "--no-cache-dir" in PEERS["llama.cpp"].pip_options


def wheel(folder: Path) -> Path:
    """A package of one line."""
    path = folder / "toy_engine-1.0-py3-none-any.whl"
    info = "toy_engine-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_engine.py", "SPEED = 50.0\n")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-engine\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_peer_installs_itself_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLITE_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "toy.py"
    script.write_text(
        "import toy_engine\n"
        "class Model:\n"
        "    def __init__(self, path, threads, context): pass\n"
        "    def prefill(self, ids): return len(ids) / toy_engine.SPEED\n"
    )
    peer = Peer(
        name="toy.engine",
        version="1.0",
        requirements=(str(wheel(tmp_path)),),
        script=script,
        module="toy_engine",
        pip_options=("--no-index",),
    )
    notes: list[str] = []
    interrupted = tmp_path / "cache/peers" / peer.folder
    (interrupted / "bin").mkdir(parents=True)  # no `ready`: made anew
    python = peer_python(peer, notes.append)
    assert peer_python(peer, notes.append) == python
    assert len(notes) == 1
    assert python.is_relative_to(interrupted)
    with Measurer(peer.name, peer_command(python, script)) as measurer:
        measurer.open(tmp_path, threads=1, context=64)
        assert measurer.prefill([1] * 100) == pytest.approx(2.0)


@pytest.mark.skipif(shutil.which("false") is None, reason="needs the program `false`")
def test_a_failed_installation_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHLITE_CACHE", str(tmp_path))
    monkeypatch.delenv("FLASHLITE_PEER_OPENVINO", raising=False)
    peer = PEERS["openvino"]
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    for _ in range(2):
        with pytest.raises(EvaluateError, match="could not be installed") as caught:
            peer_python(peer)
        assert f"{peer.folder}.log" in str(caught.value)
        assert "FLASHLITE_PEER_OPENVINO" in str(caught.value)


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cpu"]
    assert 1 <= machine["cores"] <= (os.cpu_count() or 1)


def test_our_own_process_measures_a_compiled_model(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashlite.evaluate.process import our_command
    from flashlite.runtime.prepare import find_artifact

    monkeypatch.setenv("FLASHLITE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLASHLITE_CACHE", str(tmp_path / "cache"))
    source = str(Path(peers_module.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", source)
    artifact = find_artifact(str(tiny_gguf))
    ours = Contender("flashlite", our_command(), artifact.path)
    measures = [Measure(40), Measure(8, 8)]
    figures = compare([ours], measures, range(64, 128), threads=2, rounds=2)["flashlite"]
    assert all(speed > 0 for speed in figures.medians.values())
    assert figures.open_seconds > 0
    with Measurer(ours.name, ours.command) as measurer:
        measurer.open(ours.model, threads=2, context=256, sequences=3)
        prompts = [[70 + i] * (i + 1) for i in range(3)]
        assert measurer.together(prompts, 4) > 0
        with pytest.raises(EvaluateError, match="1 to 3 sequences"):
            measurer.together([*prompts, [80]], 4)
        assert measurer.together(prompts[:1], 4) > 0


@pytest.mark.accept
def test_real_peers_answer(smollm2_gguf: Path) -> None:
    contenders = [
        Contender(peer.name, peer_command(peer_python(peer), peer.script), smollm2_gguf)
        for peer in PEERS.values()
    ]
    measures = choose_measures(2048)
    figures = compare(contenders, measures, range(100, 40000), threads=2, rounds=1)
    for name in PEERS:
        assert all(speed > 1 for speed in figures[name].medians.values()), figures
        assert 100e6 < figures[name].peak_bytes < 3e9
