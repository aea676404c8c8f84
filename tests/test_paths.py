"""Where things are kept, and the key that says they are ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashlite import paths


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHLITE_HOME", str(tmp_path / "home"))
    paths._key_at.cache_clear()
    return tmp_path / "home"


def read_again() -> bytes:
    paths._key_at.cache_clear()
    return paths.installation_key()


def test_the_key_is_made_once_and_is_the_users_alone(home: Path) -> None:
    key = paths.installation_key()
    file = home / "installation.key"
    assert file.read_bytes() == key == read_again()
    assert len(key) == 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in home.iterdir()] == ["installation.key"]


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_key_of_another_length_is_replaced(home: Path, content: bytes) -> None:
    paths.private_dir(home)
    (home / "installation.key").write_bytes(content)
    key = paths.installation_key()
    assert len(key) == 32
    assert (home / "installation.key").read_bytes() == key


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_could_read_or_write_is_replaced(home: Path, mode: int) -> None:
    known = paths.installation_key()
    (home / "installation.key").chmod(mode)
    key = read_again()
    assert key != known
    assert (home / "installation.key").stat().st_mode & 0o777 == 0o600
    assert read_again() == key


def test_concurrent_first_uses_agree_on_one_key(home: Path) -> None:
    code = "from flashlite import paths; print(paths.installation_key().hex())"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    keys = {process.communicate()[0] for process in started}
    assert keys == {f"{paths.installation_key().hex()}\n".encode()}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True, mode=0o755)
    assert paths.private_dir(folder).stat().st_mode & 0o777 == 0o700
