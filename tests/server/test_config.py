"""Settings: flags win over the file, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashlite.errors import UsageError
from flashlite.server.config import ServerConfig, read_config


def write(path: Path, text: str) -> Path:
    (path / "serve.toml").write_text(text)
    return path / "serve.toml"


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, 'models = ["a", "b"]\nport = 9000\nmax_mem = "2GB"\n')
    config = read_config(file, {"port": 9001, "host": None})
    assert (config.models, config.port, config.max_mem) == (("a", "b"), 9001, "2GB")
    assert config.host == ServerConfig().host


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown key 'prot'; did you mean port"),
        ('port = "80"', "port is '80', expected a whole number"),
        ("port = true", "expected a whole number"),
        ('models = "a"', "models is 'a', expected a list of strings"),
        ('window = "summarize"', "expected error"),
        ("port = ", "cannot be read as TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        read_config(write(tmp_path, text), {})


def test_a_public_address_needs_keys_or_force() -> None:
    public = ServerConfig(host="0.0.0.0")
    with pytest.raises(UsageError, match="public-without-keys"):
        public.check()
    public.check(keys=True)
    ServerConfig(host="0.0.0.0", public_without_keys=True).check()
