"""`flashlite profile`, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flashlite
from flashlite.cli.main import main
from flashlite.compress.machine_profile import MachineProfile, Rates
from flashlite.evaluate import calibrate

SIZES = ["--prompt-tokens", "40", "--decode", "8", "--depth", "20", "--threads", "1"]


@pytest.fixture(scope="module")
def artifact(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, quantized once."""
    path = tmp_path_factory.mktemp("artifact") / "tiny.fl"
    assert main(["quantize", str(tiny_gguf), "-o", str(path)]) == 0
    return str(path)


def test_json_holds_every_part_of_every_layer(
    artifact: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    words = [artifact, *SIZES, "--rounds", "1", "--trace", str(trace)]
    assert main(["profile", *words, "--json"]) == 0
    data = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert data["threads"] == 1
    assert data["version"] == flashlite.__version__
    assert data["limits"]["read_gb_s"] > 0
    assert data["lost_marks"] == 0
    assert data["prefill"]["tokens"] == 40
    assert (data["decode"]["tokens"], data["decode"]["depth"]) == (8, 20)
    for phase in (data["prefill"], data["decode"]):
        assert phase["covered"] >= 0.95
        assert sum(part["share"] for part in phase["parts"]) == pytest.approx(1, abs=0.05)
        assert sum(line["us"] for line in phase["lines"]) == pytest.approx(
            sum(part["us"] for part in phase["parts"]), abs=0.1
        )
    assert len(data["redundancy"]) == len(data["decode"]["layers"])
    assert all(0 <= value <= 2 for value in data["redundancy"])
    assert json.loads(trace.read_text())["traceEvents"]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_the_table_fits_a_terminal(artifact: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [artifact, *SIZES, "--rounds", "1", "--by-time", "--max-mem", "2GB"]
    assert main(["profile", *words]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    start = next(i for i, line in enumerate(lines) if line.startswith("Decoding after 20 tokens"))
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("sum"))
    times = [float(line.split()[1].replace(",", "")) for line in lines[start + 2 : end]]
    assert times == sorted(times, reverse=True)
    assert any(line.startswith("layer") and line.endswith("1-cos") for line in lines)


def test_a_machine_is_written_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rates = Rates(1, 20.0, None, 4.0, 5.0, {"q8": 10.0}, {"q8": {2: 10.0, 256: 100.0}})
    machine = MachineProfile("Abacus", "plain", "abc", (rates,))
    monkeypatch.setattr(calibrate, "measure_machine", lambda *_: machine)
    file = tmp_path / "machine.json"
    assert main(["profile", "--machine", "-o", str(file), "--json"]) == 0
    assert MachineProfile.read(file) == machine
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == machine.to_json()
    assert main(["profile", "--machine"]) == 0
    assert "Abacus" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--decode", "0"], 2, "--decode"),
        (["--depth", "100000000"], 2, "depth is 100000000"),
        (["--trace", "no/such/folder/trace.json"], 2, "no such folder"),
        (["-o", "machine.json"], 2, "give --machine too"),
        (["--max-mem", "1MB"], 1, "the model needs"),
        (["--max-mem", "many"], 2, "is not a size"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    artifact: str, capfd: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(["profile", artifact, *words]) == code
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
