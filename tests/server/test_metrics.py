"""/metrics counts what happened and names nothing that a client wrote."""

from __future__ import annotations

from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from running import Running, exchange, request, serving

CHAT = "/v1/chat/completions"


def scrape(running: Running) -> dict[tuple[str, ...], float]:
    reply = httpx.get(f"{running.url}/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_what_is_counted(tiny_gguf: Path) -> None:
    with serving(tiny_gguf, rate_limit=0) as running:
        asked = {"messages": [{"role": "user", "content": "tell me " * 20}], "max_tokens": 3}
        usages = []
        for stream in (False, True):
            body = asked | {"stream": stream}
            reply = httpx.post(f"{running.url}{CHAT}", json=body)
            if not stream:
                usages.append(reply.json()["usage"])
        for path in ("/canary-path", "/v1/models/canary-model?canary=1"):
            httpx.get(f"{running.url}{path}", headers={"user-agent": "canary"})
        with running.connect() as connection:
            exchange(connection, request("/", method="CANARY"))
        found = scrape(running)
        text = httpx.get(f"{running.url}/metrics").text
    (usage,) = usages
    assert found["flashlite_prompt_tokens_total",] == 2 * usage["prompt_tokens"]
    assert 2 <= found["flashlite_generated_tokens_total",] <= 6
    assert found["flashlite_cached_tokens_total",] >= 32
    labels = ("flashlite_requests_total", "method=POST", f"route={CHAT}", "status=200")
    assert found[labels] == 2
    assert found["flashlite_request_seconds_count", f"route={CHAT}"] == 2
    assert found["flashlite_rejections_total", "kind=path"] == 3
    assert found["flashlite_running",] == found["flashlite_waiting",] == 0
    pages = [value for name, value in found.items() if name[0] == "flashlite_kv_pages"]
    assert sum(pages) > 0
    assert "canary" not in text.lower()


def test_an_answer_that_is_left_is_counted_with_what_it_took(tiny_gguf: Path) -> None:
    with serving(tiny_gguf, rate_limit=0) as running:
        body = b'{"messages": [{"role": "user", "content": "once"}], "max_tokens": 400,'
        body += b'"stream": true, "logit_bias": {"0": -100, "2": -100}}'
        with running.connect() as connection:
            connection.sendall(request(CHAT, body))
            connection.recv(2000)
        running.wait_until_idle()
        found = scrape(running)
    assert found["flashlite_abandoned_total",] == 1
    assert found["flashlite_prompt_tokens_total",] > 0
    assert 0 < found["flashlite_generated_tokens_total",] < 400
