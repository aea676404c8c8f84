"""Keys: stored as hashes, asked for on every route there is (T19)."""

from __future__ import annotations

import json
import logging
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from running import Reply, Running, exchange, request, serving
from starlette.routing import Route

from flashlite.cli.keys import command
from flashlite.errors import UsageError
from flashlite.server.config import ServerConfig
from flashlite.server.keys import Keys, open_keys

SECRET = bytes(range(32))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json", SECRET)


# The file


def test_a_key_is_found_by_its_whole_self_alone(keys: Keys) -> None:
    laptop, phone = keys.add("laptop"), keys.add("phone")
    assert (keys.find(laptop), keys.find(phone)) == ("laptop", "phone")
    for wrong in ("", laptop[:-1], laptop + "x", laptop.upper(), f" {laptop}", "laptop", "\0"):
        assert keys.find(wrong) is None


def test_the_file_holds_no_key_and_is_the_owners_alone(keys: Keys) -> None:
    secret = keys.add("laptop")
    written = keys.path.read_text()
    assert secret not in written
    assert secret.removeprefix("fl-") not in written
    assert keys.path.stat().st_mode & 0o777 == 0o600
    assert len(secret) >= 43


def test_a_file_of_another_installation_lets_nobody_in(keys: Keys) -> None:
    secret = keys.add("laptop")
    assert Keys(keys.path, SECRET).find(secret) == "laptop"
    assert Keys(keys.path, bytes(32)).find(secret) is None


def test_a_revoked_key_ends_within_a_second(keys: Keys) -> None:
    secret = keys.add("laptop")
    other = Keys(keys.path, SECRET)
    assert other.find(secret) == "laptop"
    keys.revoke("laptop")
    time.sleep(1.1)
    assert other.find(secret) is None
    with pytest.raises(UsageError, match="there is no key 'laptop'; known: none"):
        keys.revoke("laptop")


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "ñ", "-x"])
def test_names_are_plain(keys: Keys, name: str) -> None:
    with pytest.raises(UsageError, match="key name"):
        keys.add(name)


def test_a_name_is_given_once(keys: Keys) -> None:
    keys.add("laptop")
    with pytest.raises(UsageError, match="the key laptop exists"):
        keys.add("laptop")


@pytest.mark.parametrize("content", ["", "[]", '{"keys": [{}]}', '{"keys": 3}', "[" * 100_000])
def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="no file of keys"):
        Keys(path, SECRET)


def test_a_file_that_others_may_read_is_refused(keys: Keys) -> None:
    keys.add("laptop")
    keys.path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        Keys(keys.path, SECRET)


def test_a_file_that_is_spoilt_while_we_run_lets_nobody_in(keys: Keys) -> None:
    secret = keys.add("laptop")
    time.sleep(1.1)
    keys.path.write_text("{")
    assert keys.find(secret) is None


def test_the_verb_makes_lists_and_revokes(tmp_path: Path) -> None:
    runner, path = CliRunner(), str(tmp_path / "keys.json")

    def run(*arguments: str) -> dict[str, object]:
        result = runner.invoke(command, [*arguments, "--file", path, "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
        return found

    secret = run("add", "laptop")["key"]
    listed = run("list")["keys"]
    assert isinstance(listed, list)
    assert [entry["name"] for entry in listed] == ["laptop"]
    assert str(secret) not in json.dumps(listed)
    assert len(open_keys(path) or ()) == 1
    run("revoke", "laptop")
    with pytest.raises(UsageError, match="holds no keys"):
        open_keys(path)


def test_a_public_server_needs_keys() -> None:
    public = ServerConfig(host="0.0.0.0")
    public.check(keys=True)
    with pytest.raises(UsageError, match="no keys are set"):
        public.check()


# Over sockets


@pytest.fixture(scope="module")
def guarded(
    tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, str]]:
    keys = Keys(tmp_path_factory.mktemp("keys") / "keys.json", SECRET)
    secret = keys.add("laptop")
    with serving(tiny_gguf, keys, rate_limit=0) as running:
        yield running, secret


def ask(running: Running, raw: bytes) -> Reply | None:
    with running.connect() as connection:
        return exchange(connection, raw)


def paths_of(running: Running) -> list[tuple[str, str]]:
    """(method, path) of every route of the application: one added later is asked as well."""
    found = []
    for route in running.app.routes:
        assert isinstance(route, Route), f"{route} is no plain route: teach this test its paths"
        path = re.sub(r"\{[^}]*\}", "m", route.path)
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


OPEN = ("/health", "/v1/health")


def test_every_route_is_refused_without_a_key(guarded: tuple[Running, str]) -> None:
    running, secret = guarded
    asked = paths_of(running)
    assert len(asked) > 15
    wrong: list[dict[str, Any]] = [
        {},
        {"authorization": "Bearer fl-wrong"},
        {"authorization": f"Bearer {secret[:-1]}"},
        {"authorization": f"Basic {secret}"},
        {"authorization": "Bearer"},
        {"x-goog-api-key": "fl-wrong"},
        {"x-http-method-override": "OPTIONS"},
        {"x-original-url": "/health"},
        {"x-forwarded-prefix": "/health"},
        {"x-forwarded-for": "127.0.0.1"},
    ]
    for method, path in asked:
        variants = {
            path, f"/{path}", f"{path}/", f"/health/..{path}", f"/health%2f..{path}",
            f"/.{path}", path.replace("/", "/%2f"), f"{path}?x=/health", f"{path}%00",
            f"http://127.0.0.1{path}", f"{path};/health", f"{path}?key=fl-wrong", path.upper(),
        }  # fmt: skip
        for variant in variants:
            for headers in wrong if variant == path else wrong[:1]:
                reply = ask(running, request(variant, method=method, **headers))
                assert reply is not None, (method, variant)
                if path in OPEN and variant.partition("?")[0] == path and method != "POST":
                    assert reply.body in (b'{"status":"ok"}', b"")
                else:
                    assert reply.status in (401, 404), (method, variant, headers, reply)
                    assert b"tiny" not in reply.body


@pytest.mark.parametrize("host", ["127.0.0.1/health?", "127.0.0.1#", "a@127.0.0.1", "", "x.test"])
def test_a_bad_host_is_refused(guarded: tuple[Running, str], host: str) -> None:
    running, secret = guarded
    reply = ask(running, request("/v1/models", host=host, authorization=f"Bearer {secret}"))
    assert reply is not None
    assert reply.status == 400


@pytest.mark.parametrize("form", ["bearer", "BEARER", "google", "query"])
def test_a_key_is_taken_as_clients_send_it(
    guarded: tuple[Running, str], form: str, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    running, secret = guarded
    path = "/v1/models"
    headers: dict[str, Any] = {}
    if form == "query":
        path += f"?key={secret}"
    elif form == "google":
        headers = {"x-goog-api-key": secret}
    else:
        headers = {"authorization": f"{form} {secret}"}
    with caplog.at_level(logging.DEBUG):
        reply = ask(running, request(path, **headers))
    assert reply is not None
    assert reply.status == 200
    assert secret not in caplog.text
    assert secret not in "".join(capfd.readouterr())


def test_a_refusal_asks_for_a_key_in_the_right_shape(guarded: tuple[Running, str]) -> None:
    running, _ = guarded
    reply = ask(running, request("/v1/chat/completions", b"{}"))
    assert reply is not None
    assert reply.headers["www-authenticate"] == "Bearer"
    assert json.loads(reply.body)["error"]["code"] == "invalid_api_key"
    reply = ask(running, request("/v1/models", x_goog_api_key="x"))
    assert reply is not None
    assert json.loads(reply.body)["error"]["status"] == "UNAUTHENTICATED"


@pytest.mark.accept
def test_the_time_of_a_comparison_tells_nothing(keys: Keys) -> None:
    """Welch's t of a guess with a right beginning against one without."""
    secret = keys.add("laptop")
    near, far = secret[:-1] + "~", "~" + secret[1:]
    times: dict[str, list[float]] = {near: [], far: []}
    for i in range(20_000):
        guess = (near, far)[i % 2]
        began = time.perf_counter_ns()
        keys.find(guess)
        times[guess].append(time.perf_counter_ns() - began)
    a, b = (sorted(times[guess])[: len(times[guess]) * 9 // 10] for guess in (near, far))
    spread = statistics.variance(a) / len(a) + statistics.variance(b) / len(b)
    assert abs(statistics.mean(a) - statistics.mean(b)) / spread**0.5 < 4.5
