"""Clients take turns, whoever sends more."""

from __future__ import annotations

import threading
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from flashlite.runtime.library import MAX_BATCH
from flashlite.runtime.model import load
from flashlite.runtime.queue import FairQueue
from flashlite.runtime.sampling import SamplingParams


def drained(queue: FairQueue[int]) -> list[int]:
    found = []
    while queue:
        head = queue.head()
        assert queue.pop() == head
        found.append(head)
    return found


def test_one_client_is_served_in_order() -> None:
    queue = FairQueue[int]()
    for item in range(5):
        queue.push("a", item)
    assert drained(queue) == [0, 1, 2, 3, 4]


def test_clients_take_turns() -> None:
    queue = FairQueue[int]()
    for item in range(4):
        queue.push("a", item)
    queue.push("b", 10)
    queue.push("c", 20)
    queue.push("b", 11)
    assert drained(queue) == [0, 10, 20, 1, 11, 2, 3]


def test_an_item_can_leave() -> None:
    queue = FairQueue[int]()
    queue.push("a", 1)
    queue.push("b", 2)
    queue.discard("a", 1)
    queue.discard("a", 1)
    queue.discard("c", 1)
    assert drained(queue) == [2]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_nobody_waits_longer_than_a_turn_of_each(moves: list[tuple[str, bool]]) -> None:
    queue, lines = FairQueue[int](), dict[str, list[int]]()
    waited: dict[str, int] = {}  # pops since the client's item came to the front of its line
    for number, (client, push) in enumerate(moves):
        if push:
            queue.push(client, number)
            if not lines.get(client):
                waited[client] = 0
            lines.setdefault(client, []).append(number)
        elif len(queue):
            item = queue.pop()
            owner = next(name for name, line in lines.items() if item in line)
            assert lines[owner].pop(0) == item
            assert waited[owner] <= 2  # the other two, once each
            for name, line in lines.items():
                waited[name] = 0 if name == owner else waited.get(name, 0) + bool(line)
    assert len(queue) == sum(map(len, lines.values()))


def test_no_item_is_lost_between_threads() -> None:
    queue, found = FairQueue[int](), list[int]()

    def push() -> None:
        for item in range(20_000):
            queue.push("a", item)

    thread = threading.Thread(target=push)
    thread.start()
    while thread.is_alive() or queue:
        if queue:
            found.append(queue.pop())
    thread.join()
    assert found == list(range(20_000))


def test_a_client_with_many_requests_does_not_starve_another(tiny_gguf: Path) -> None:
    with load(
        tiny_gguf, isa="plain", max_sequence_length=256, max_sequences=2, prefix_cache=False
    ) as model:
        scheduler, params = model.scheduler, SamplingParams(max_tokens=3)
        many = [scheduler.submit([5, 6, i], params, client="a") for i in range(20)]
        one = scheduler.submit([7, 8], params, client="b")
        while one.finish_reason is None:
            scheduler.step()
        assert sum(job.finish_reason is not None for job in many) <= 2
        scheduler.cancel(many[-1])
        while not scheduler.idle:
            scheduler.step()
        assert sum(job.finish_reason != "cancelled" for job in many) == 19


def test_a_long_prompt_shares_the_step_with_other_clients(tiny_gguf: Path) -> None:
    with load(
        tiny_gguf, isa="plain", max_sequence_length=512, max_sequences=4, prefix_cache=False
    ) as model:
        scheduler, params = model.scheduler, SamplingParams(max_tokens=2)
        long = [list(range(3, 400)) for _ in range(2)]
        jobs = [scheduler.submit(prompt, params, client="a") for prompt in long]
        short = scheduler.submit([7, 8, 9], params, client="b")
        scheduler.step()
        assert short.first_token is not None
        assert jobs[0].prefilled == MAX_BATCH - 3
        assert jobs[1].prefilled == 0
