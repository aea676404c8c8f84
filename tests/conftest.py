"""Models and data that the tests of every package share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Tiny models gain nothing from threads of OpenMP, which spin while anything else runs here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))

import make_gguf

from flashlite import paths


@pytest.fixture
def own_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of prefixes for one test; what is compiled stays where it is."""
    builds = paths.private_dir(paths.cache_dir() / "builds")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    (cache / "builds").symlink_to(builds)
    monkeypatch.setenv("FLASHLITE_CACHE", str(cache))
    return cache / "prefixes"


@pytest.fixture(scope="session")
def flashlite_data() -> Path:
    """The folder of evaluation data, from FLASHLITE_DATA."""
    value = os.environ.get("FLASHLITE_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("FLASHLITE_DATA does not name a folder of evaluation data")
    return Path(value)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct, from FLASHLITE_TEST_GGUF or where `pull` puts it."""
    if value := os.environ.get("FLASHLITE_TEST_GGUF"):
        path = Path(value)
        if not path.is_file():
            pytest.skip(f"FLASHLITE_TEST_GGUF names no file: {path}")
        return path
    home = Path(os.environ.get("FLASHLITE_HOME") or Path.home() / ".local/share/flashlite")
    found = sorted((home / "models/smollm2-135m-instruct").glob("*.gguf"))
    if not found:
        pytest.skip("SmolLM2 is not here: run `flashlite pull smollm2-135m-instruct`")
    return found[0]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 260 thousand random weights in Q4_0, Q4_1, Q8_0, F16 and F32; ChatML, BPE."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return make_gguf.write_gguf(path, *make_gguf.tiny_model())


@pytest.fixture(scope="session")
def stories260k(flashlite_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real stories260K in F32, with its SentencePiece vocabulary of 512."""
    folder = flashlite_data / "tiny_lm/stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    path = tmp_path_factory.mktemp("stories") / "stories260k.gguf"
    return make_gguf.write_gguf(path, *make_gguf.stories260k(folder))
