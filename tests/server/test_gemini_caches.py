"""Cached contents: what they hold, for whom and how long, and that their pages are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import Running, serving

from flashlite.errors import BodyError, MemoryCeiling
from flashlite.server.exchange import Turn
from flashlite.server.gemini.bodies import CacheRequest
from flashlite.server.gemini.caches import Cached, Caches, expiry
from flashlite.server.gemini.decode import Beginning
from flashlite.server.keys import Keys

QUESTION = {"role": "user", "parts": [{"text": "and then"}]}


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def caches(clock: Clock) -> Caches:
    return Caches(clock)


def keep(caches: Caches, text: str = "once", owner: str = "ada", seconds: float = 60) -> Cached:
    return caches.add(
        Beginning((Turn("user", text),)),
        owner=owner,
        model="m",
        display_name="d",
        tokens=3,
        expires=caches.now + seconds,
    )


def test_each_sees_their_own_until_it_expires(caches: Caches, clock: Clock) -> None:
    short, long = keep(caches, seconds=10), keep(caches, seconds=20)
    other = keep(caches, owner="bob")
    assert caches.of("ada") == [short, long]
    assert caches.find(other.name, "ada") is None
    clock.now += 10
    assert caches.find(short.name, "ada") is None
    later = caches.extend(long, caches.now + 100)
    clock.now += 99
    assert caches.of("ada") == [later]
    caches.remove(later)
    assert caches.of("ada") == []


def test_their_number_and_their_text_are_limited(caches: Caches, clock: Clock) -> None:
    for _ in range(64):
        keep(caches)
    with pytest.raises(MemoryCeiling, match="64"):
        keep(caches)
    clock.now += 61  # what has expired makes room
    keep(caches, "a" * (3 << 20))
    with pytest.raises(MemoryCeiling, match="characters"):
        keep(caches, "a" * (2 << 20))


def test_how_long_they_are_kept() -> None:
    now = 1_700_000_000.0
    assert expiry(CacheRequest(ttl="1.5s"), now, default=False) == now + 1.5
    assert expiry(CacheRequest(), now, default=True) == now + 3600
    for text in ("2023-11-14T22:13:30Z", "2023-11-14T23:13:30.000000000+01:00"):
        assert expiry(CacheRequest(expire_time=text), now, default=False) == now + 10
    for wrong in (
        CacheRequest(),
        CacheRequest(ttl="0s"),
        CacheRequest(expire_time="2023-11-14T22:13:20Z"),
        CacheRequest(expire_time="2030-01-01T00:00:00"),
        CacheRequest(expire_time="soon"),
        CacheRequest(ttl="1s", expire_time="2030-01-01T00:00:00Z"),
    ):
        with pytest.raises(BodyError):
            expiry(wrong, now, default=False)


@pytest.fixture(scope="module")
def running(tiny_gguf: Path) -> Iterator[Running]:
    with serving(tiny_gguf, rate_limit=0) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture
def name(running: Running) -> str:
    return running.state.registry.names[0]


def created(client: httpx.Client, name: str, text: str, **fields: Any) -> Any:
    body = {
        "model": f"models/{name}",
        "contents": [{"role": "user", "parts": [{"text": text}]}],
        "systemInstruction": {"parts": [{"text": "tell a story"}]},
    }
    response = client.post("/v1beta/cachedContents", json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_pages_of_a_cached_content_are_found(client: httpx.Client, name: str) -> None:
    long = "the little fox ran over the hill " * 12
    cached = created(client, name, long)
    assert cached["usageMetadata"]["totalTokenCount"] > 64
    short = {
        "contents": [QUESTION],
        "cachedContent": cached["name"],
        "generationConfig": {"maxOutputTokens": 8, "temperature": 0},
    }
    path = f"/v1beta/models/{name}:generateContent"
    reply = client.post(path, json=short).json()
    usage = reply["usageMetadata"]
    # All but the last, begun page of 32, and the template's words before the answer.
    assert cached["usageMetadata"]["totalTokenCount"] - usage["cachedContentTokenCount"] < 64
    whole = {
        "contents": [{"role": "user", "parts": [{"text": long}]}, QUESTION],
        "systemInstruction": {"parts": [{"text": "tell a story"}]},
        "generationConfig": short["generationConfig"],
    }
    repeated = client.post(path, json=whole).json()
    assert repeated["candidates"] == reply["candidates"]
    assert repeated["usageMetadata"]["promptTokenCount"] == usage["promptTokenCount"]
    inner = {"generateContentRequest": short}
    counted = client.post(f"/v1beta/models/{name}:countTokens", json=inner).json()
    assert counted["totalTokens"] == usage["promptTokenCount"]


def test_create_get_list_patch_delete(client: httpx.Client, name: str) -> None:
    made = created(client, name, "once", ttl="300s", displayName="tale")
    assert made["displayName"] == "tale"
    path = f"/v1/{made['name']}"
    assert client.get(path).json() == made
    assert made in client.get("/v1/cachedContents").json()["cachedContents"]
    page = client.get("/v1/cachedContents?pageSize=1").json()
    assert len(page["cachedContents"]) == 1
    later = client.patch(path, json={"ttl": "600s"}).json()
    assert later["expireTime"] > made["expireTime"]
    assert client.patch(path, json={}).status_code == 400
    assert client.patch(path, json={"contents": [QUESTION]}).status_code == 400
    assert client.delete(path).json() == {}
    asked = {"contents": [QUESTION], "cachedContent": made["name"]}
    for gone in (
        client.get(path),
        client.patch(path, json={"ttl": "1s"}),
        client.delete(path),
        client.post(f"/v1/models/{name}:generateContent", json=asked),
        client.post(f"/v1/models/{name}:countTokens", json={"generateContentRequest": asked}),
    ):
        assert gone.status_code == 404
        assert gone.json()["error"]["status"] == "NOT_FOUND"


def test_what_cannot_be_cached_is_refused(client: httpx.Client, name: str) -> None:
    for body, named in (
        ({"model": name}, "contents"),
        ({"model": name, "contents": [QUESTION], "ttl": "5 minutes"}, "ttl"),
        ({"model": name, "contents": [QUESTION], "foo": 1}, "foo"),
    ):
        response = client.post("/v1/cachedContents", json=body)
        assert response.status_code == 400
        assert named in response.json()["error"]["message"]
    missing = client.post("/v1/cachedContents", json={"model": "none", "contents": [QUESTION]})
    assert missing.status_code == 404


def test_a_cache_and_instructions_do_not_mix(client: httpx.Client, name: str) -> None:
    cached = created(client, name, "once")
    asked = {
        "contents": [QUESTION],
        "cachedContent": cached["name"],
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
    }
    response = client.post(f"/v1/models/{name}:generateContent", json=asked)
    assert response.status_code == 400
    assert "cachedContent" in response.json()["error"]["message"]


def test_keys_do_not_see_each_others(tiny_gguf: Path, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    ada, bob = keys.add("ada"), keys.add("bob")
    with serving(tiny_gguf, keys, rate_limit=0) as running:
        clients = [
            httpx.Client(base_url=running.url, headers={"x-goog-api-key": key}, timeout=60)
            for key in (ada, bob)
        ]
        made = created(clients[0], running.state.registry.names[0], "once")
        assert clients[0].get(f"/v1/{made['name']}").status_code == 200
        assert clients[1].get(f"/v1/{made['name']}").status_code == 404
        assert clients[1].get("/v1/cachedContents").json() == {"cachedContents": []}
        for client in clients:
            client.close()
