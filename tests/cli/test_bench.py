"""`flashlite bench`, end to end on a tiny model, beside a peer of known speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import flashlite
from flashlite.cli.main import main
from flashlite.evaluate import peers
from flashlite.evaluate.peers import Peer

PEER = """
class Model:
    def __init__(self, path, threads, context):
        assert path.endswith(".gguf") and threads == 2
    def prefill(self, ids):
        return len(ids) / 50.0
    def decode(self, ids, n):
        return n / 20.0
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the tiny model is quantized and compiled once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def known_peer(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    peer = Peer(name="steady", version="1", requirements=(), script=script, module="json")
    monkeypatch.setattr(peers, "PEERS", {"steady": peer})
    monkeypatch.setenv(peer.override, sys.executable)
    monkeypatch.setenv("FLASHLITE_HOME", str(home / "data"))
    monkeypatch.setenv("FLASHLITE_CACHE", str(home / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(flashlite.__file__).parents[1]))


def test_json_holds_figures_and_ratios(tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [str(tiny_gguf), "--peers", "steady", "--rounds", "2", "--threads", "2"]
    assert main(["bench", *words, "--prefill", "100", "--json"]) == 0
    data = json.loads(capfd.readouterr().out.splitlines()[-1])
    ours, peer = data["figures"]["flashlite"], data["figures"]["steady"]
    assert {"pp100", "tg128@16"} <= set(data["ratios"])
    for measure, of_peers in data["ratios"].items():
        mine, theirs = ours["tokens_per_s"][measure], peer["tokens_per_s"][measure]
        assert theirs == (20 if measure.startswith("tg") else 50)
        assert of_peers["steady"] == pytest.approx(mine / theirs, rel=1e-3)
        assert len(ours["samples"][measure]) == 2
    assert ours["open_s"] > 0
    assert ours["peak_rss_bytes"] > 1e6
    assert data["machine"]["threads"] == 2
    assert data["version"] == flashlite.__version__

    assert main(["bench", *words[:3], "--rounds", "1", "--threads", "2"]) == 0
    table = capfd.readouterr().out
    assert "x steady" in table
    assert "tg128@16 tokens/s" in table
    assert "peak RSS" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peers", "other"], "known are steady"),
        (["--prefill", "1000000"], "prefill is 1000000"),
        (["--threads", "0"], "--threads"),
        (["--rounds", "0"], "rounds"),
    ],
)
def test_a_bad_flag_is_named(
    tiny_gguf: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["bench", str(tiny_gguf), *words]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_peers_need_the_gguf_file(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = tmp_path / "tiny.fl"
    assert main(["quantize", str(tiny_gguf), "-o", str(artifact)]) == 0
    assert main(["bench", str(artifact), "--peers", "steady"]) == 2
    assert "peers read GGUF files" in capfd.readouterr().err
