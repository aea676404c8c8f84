"""Drafts change when tokens come, never which."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlite.runtime.model import Model, load
from flashlite.runtime.sampling import SamplingParams
from flashlite.runtime.scheduler import Generation
from flashlite.runtime.speculate import DRAFT_BESIDE, MAX_DRAFT, Drafter, Pace


class Priced(Pace):
    """Every draft costs the same, so that it does not depend on the clock what is drafted."""

    def __init__(self, price: float | None) -> None:
        super().__init__()
        self.price = price

    def ratio(self, requests: int, tokens: int) -> float | None:
        return self.price


FREE = Priced(0.01)


def tiny(tiny_gguf: Path, **given: object) -> Model:
    fixed = {"threads": 2, "isa": "plain", "max_sequence_length": 512, "prefix_cache": False}
    model = load(tiny_gguf, **fixed | given)  # type: ignore[arg-type]
    model.scheduler._pace = FREE
    return model


def ask(model: Model, prompt: list[int], params: SamplingParams) -> tuple[Generation, list[object]]:
    generation = model.submit(prompt, params)
    return generation, [(p.text, p.drawn, p.finish_reason) for p in model.follow(generation)]


REPEATING = [7, 8, 9, 10, 11, 12, 13] * 12

SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "probabilities": {"logprobs": 5},
    "sampled": {"temperature": 0.8, "seed": 3},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "logprobs": 2},
    "everything": {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 5},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("own_prefixes")
def test_every_draw_is_the_one_of_single_steps(tiny_gguf: Path, name: str) -> None:
    params = SamplingParams(**{"max_tokens": 100} | SETTINGS[name])  # type: ignore[arg-type]
    drafted = accepted = 0
    with tiny(tiny_gguf) as fast, tiny(tiny_gguf, speculate=False) as slow:
        for prompt in (REPEATING, list(range(3, 80)), [5, 5, 5, 5], [1]):
            generation, seen = ask(fast, prompt, params)
            plain, expected = ask(slow, prompt, params)
            assert seen == expected
            assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
            drafted += generation.drafted_tokens
            accepted += generation.accepted_tokens
    assert drafted >= accepted
    if params.max_tokens == 100:
        assert drafted > accepted
        if name == "greedy":  # random weights repeat themselves
            assert accepted > 20


@pytest.mark.usefixtures("own_prefixes")
def test_a_stop_inside_a_draft_ends_the_answer(tiny_gguf: Path) -> None:
    """Whatever token the answer ends at, what was accepted beyond it does not exist."""
    with tiny(tiny_gguf, prefix_cache=True) as fast, tiny(tiny_gguf, speculate=False) as slow:
        whole, _ = ask(slow, REPEATING, SamplingParams(max_tokens=60))
        texts = [slow.tokenizer.decode([token]) for token in whole.generated]
        for n in range(1, 60, 7):
            stop = (texts[n],) if texts[n] else ()
            params = SamplingParams(max_tokens=n + 3, stop=stop)
            generation, seen = ask(fast, REPEATING, params)
            assert seen == ask(slow, REPEATING, params)[1]
            assert generation.generated == whole.generated[: len(generation.generated)]
            fast.scheduler.engine.pool.check_integrity()


@pytest.mark.usefixtures("own_prefixes")
def test_refused_drafts_never_reach_the_prefix_cache(tiny_gguf: Path) -> None:
    """Drafts cross page borders and are taken back; the pages left behind hold what they say."""
    rng = random.Random(1)
    with (
        tiny(tiny_gguf, prefix_cache=True) as fast,
        tiny(tiny_gguf, speculate=False) as slow,
    ):
        for n in range(25):
            prompt = [rng.randrange(3, 9) for _ in range(rng.choice((20, 40, 64, 90)))]
            params = SamplingParams(temperature=0.7, seed=n, max_tokens=70)
            first, seen = ask(fast, prompt, params)
            assert seen == ask(slow, prompt, params)[1]
            again = [*prompt, *first.generated, 4]
            params = SamplingParams(logprobs=5, max_tokens=3)
            second, seen = ask(fast, again, params)
            assert second.cached_tokens >= (len(again) - 2) // 32 * 32
            assert seen == ask(slow, again, params)[1]
            pool = fast.scheduler.engine.pool
            pool.check_integrity()
            assert pool.free == pool.n_pages


@pytest.mark.usefixtures("own_prefixes")
@pytest.mark.parametrize("together", [2, 3, 4])
def test_drafts_beside_others_are_short_and_end_when_many_decode(
    tiny_gguf: Path, together: int
) -> None:
    params = SamplingParams(max_tokens=40)
    with (
        tiny(tiny_gguf, max_sequences=4) as fast,
        tiny(tiny_gguf, speculate=False) as slow,
    ):
        expected = ask(slow, REPEATING, params)[0].generated
        jobs = [fast.submit(REPEATING, params) for _ in range(together)]
        while not fast.scheduler.idle:
            before = [job.drafted_tokens for job in jobs]
            decoding = sum(job.pending is not None for job in jobs)
            fast.scheduler.step()
            grown = [job.drafted_tokens - b for job, b in zip(jobs, before, strict=True)]
            most = {0: 0, 1: MAX_DRAFT, 2: DRAFT_BESIDE, 3: DRAFT_BESIDE}.get(decoding, 0)
            assert max(grown) <= most
        assert all(job.generated == expected for job in jobs)
        assert (sum(job.accepted_tokens for job in jobs) > 0) == (together < 4)


@pytest.mark.usefixtures("own_prefixes")
def test_nobody_drafts_while_a_prompt_is_computed(tiny_gguf: Path) -> None:
    with tiny(tiny_gguf, max_sequences=2) as model:
        one = model.submit(REPEATING, SamplingParams(max_tokens=100))
        for _ in range(4):
            model.scheduler.step()
        before = one.drafted_tokens
        assert before > 0
        two = model.submit(list(range(3, 90)) * 3, SamplingParams(max_tokens=2))
        model.scheduler.step()
        while two.first_token is None:
            model.scheduler.step()
        assert one.drafted_tokens == before


# Guesses


def test_a_guess_is_what_followed_the_last_time() -> None:
    assert Drafter([1, 2, 3, 4, 5, 9, 2, 3]).propose(FREE, 2, 0) == [4, 5]
    assert Drafter([2, 3, 7, 7, 2, 3, 8, 8, 2, 3]).propose(FREE, 2, 0) == [8, 8]
    drafter = Drafter([1, 2, 3, 4])
    assert drafter.propose(FREE, 5, 0) == []
    for token in (5, 6, 2, 3):
        drafter.push(token)
    assert drafter.propose(FREE, 5, 0) == [4, 5, 6, 2, 3]


def test_three_tokens_say_more_than_two() -> None:
    ids = [1, 2, 3, 50, 51, 9, 2, 3, 60, 61, 1, 2, 3]
    assert Drafter(ids).propose(FREE, 2, 0) == [50, 51]


def test_a_loop_goes_on() -> None:
    assert Drafter([4, 5, 4, 5, 4]).propose(FREE, 5, 0) == [5, 4, 5, 4, 5]
    assert Drafter([4, 4, 4]).propose(FREE, 5, 0) == [4] * 5


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=20))
def test_tokens_pushed_or_given_make_no_difference(start: list[int], then: list[int]) -> None:
    grown = Drafter(start)
    for token in then:
        grown.push(token)
    draft = grown.propose(FREE, 5, 0)
    assert draft == Drafter(start + then).propose(FREE, 5, 0)
    assert len(draft) in (0, 5)


# Whether it pays


def copies(drafter: Drafter, pace: Pace, rounds: int, right: bool) -> int:
    """Drafted tokens when every guess is right, or none is."""
    drafted = 0
    for _ in range(rounds):
        draft = drafter.propose(pace, MAX_DRAFT, 0)
        if draft:
            drafter.learn(len(draft), len(draft) if right else 0)
        drafted += len(draft)
    return drafted


def test_what_loses_is_given_up_and_tried_again_ever_more_rarely() -> None:
    drafter, pace = Drafter([1, 2] * 30), Priced(1.5)
    assert 0 < copies(drafter, pace, 60, right=False) <= 12
    tried = [copies(drafter, pace, 100, right=False) for _ in range(20)]
    assert 0 < sum(tried[:5]) <= 3 * 2
    assert sum(tried[-10:]) <= 2 * 2
    for _ in range(5):
        copies(drafter, pace, 600, right=True)
    assert copies(drafter, pace, 10, right=True) == 10 * MAX_DRAFT


def test_a_draft_that_costs_more_than_it_brings_is_not_made() -> None:
    drafter = Drafter([1, 2] * 30)
    copies(drafter, Priced(1.5), 20, right=True)
    assert copies(drafter, Priced(20.0), 20, right=True) == 0


def test_without_a_plain_step_to_compare_with_nothing_is_drafted() -> None:
    assert copies(Drafter([1, 2] * 30), Priced(None), 20, right=True) == 0


def test_the_pace_follows_fast_steps_and_forgives_slow_ones() -> None:
    pace = Pace()
    assert pace.ratio(1, 3) is None
    pace.note(1, 3, 9.0)  # nothing to compare it with
    pace.note(1, 1, 1.0)
    guessed = pace.ratio(1, 3)
    assert guessed is not None
    assert 1 < guessed < 1.5
    pace.note(1, 3, 2.0)
    assert pace.ratio(1, 3) == 2.0
    pace.note(1, 3, 12.0)  # another program ran
    assert pace.ratio(1, 3) == pytest.approx(3.0)
    pace.note(1, 3, 1.0)
    assert pace.ratio(1, 3) == pytest.approx(2.0)
    pace.restart()
    assert pace.ratio(1, 3) is None
    pace.note(1, 1, 4.0)
    assert pace.ratio(1, 3) == pytest.approx(2.0)
