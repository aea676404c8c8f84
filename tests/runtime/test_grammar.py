"""Answers under a grammar: always what it allows, with the draws of single steps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.errors import EngineError, UnsupportedSchema
from flashlite.runtime.engine import Work
from flashlite.runtime.generation import Generation
from flashlite.runtime.grammar import Grammar, GrammarSpec, Guide, compile_grammar, json_rule
from flashlite.runtime.library import MAX_BATCH
from flashlite.runtime.model import Model, load
from flashlite.runtime.sampler import Sampler
from flashlite.runtime.sampling import SamplingParams
from flashlite.runtime.speculate import Pace

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "married": {"type": "boolean"},
    },
    "required": ["name", "age", "colours", "married"],
    "additionalProperties": False,
}
ROWS: dict[str, Any] = {
    "type": "array",
    "minItems": 2,
    "maxItems": 4,
    "items": {
        "type": "object",
        "properties": {"identifier": {"enum": [1, 2]}, "identified": {"type": "boolean"}},
        "required": ["identifier", "identified"],
        "additionalProperties": False,
    },
}
SPECS = {
    "person": GrammarSpec.json_schema(PERSON),
    "rows": GrammarSpec.json_schema(ROWS),
    "constant": GrammarSpec.json_schema({"const": {"every": ["word", "of", "it"], "n": 1}}),
    "choice": GrammarSpec.choice(["yes", "yesterday", "no", "n\u00e3o"]),
    "regex": GrammarSpec.regex(r"[a-c]{2}-\d{3}"),
    "long": GrammarSpec.choice(["word " * 200 + "one", "word " * 200 + "two"]),
    "lark": GrammarSpec.lark(f'start: "call " part\npart: {json_rule(PERSON)}'),
}


class _AlwaysDraft(Pace):
    def ratio(self, requests: int, tokens: int) -> float | None:
        return 0.01


@pytest.fixture
def steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[list[Work]]:
    """Every step that the engine makes."""
    made: list[list[Work]] = []
    step = model.scheduler.engine.step

    def recorded(work: list[Work]) -> NDArray[np.float32]:
        made.append(list(work))
        return step(work)

    monkeypatch.setattr(model.scheduler.engine, "step", recorded)
    return made


@pytest.fixture(scope="module", params=["tiny", "stories"])
def model(request: pytest.FixtureRequest, tiny_gguf: Path, stories260k: Path) -> Iterator[Model]:
    path = tiny_gguf if request.param == "tiny" else stories260k
    with load(
        path,
        isa="plain",
        threads=2,
        max_sequence_length=512,
        max_sequences=16,
        prefix_cache=False,
    ) as opened:
        opened.scheduler._pace = _AlwaysDraft()
        yield opened


def grammar_of(model: Model, spec: GrammarSpec) -> Grammar:
    return compile_grammar(spec, model.tokenizer)


def single_steps(
    model: Model, prompt: list[int], params: SamplingParams, spec: GrammarSpec
) -> list[tuple[int, float]]:
    """(token, logprob) one engine step at a time: the definition of an answer."""
    engine, ends = model.scheduler.engine, model.tokenizer.tokens.eos
    room = min(model.max_sequence_length - len(prompt), params.max_tokens or 1 << 30)
    scratch = np.empty(engine.vocab_size, np.uint64)
    sampler = Sampler(engine.library, params, np.asarray(prompt, np.int32), room, scratch)
    guide = grammar_of(model, spec).start()
    sequence = engine.new_sequence(len(prompt) + room)
    row = engine.step([Work(sequence, prompt, need="all")])[0].copy()
    answer: list[tuple[int, float]] = []
    forced = guide.force()
    while len(answer) < room:
        if forced:
            drawn = sampler.note(forced.pop(0))
        elif guide.finished:
            break
        else:
            guide.allow(row)
            drawn = sampler.draw(row)
            if drawn.token not in ends:
                forced = guide.accept(drawn.token)
        answer.append((drawn.token, drawn.logprob))
        if drawn.token in ends:
            break
        if len(answer) < room:
            row = engine.step([Work(sequence, [drawn.token], need="all")])[0].copy()
    sequence.release()
    return answer


def run(model: Model, *jobs: Generation) -> list[str]:
    while any(job.finish_reason is None for job in jobs):
        model.scheduler.step()
    return ["".join(piece.text for piece in job.pieces) for job in jobs]


def answer_of(job: Generation) -> list[tuple[int, float]]:
    return [(p.drawn.token, p.drawn.logprob) for p in job.pieces if p.drawn is not None]


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "probabilities": {"logprobs": 3},
    "sampled": {"temperature": 1.0, "seed": 3, "logprobs": 0},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "logprobs": 2},
    "everything": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 5},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", SPECS)
def test_the_answer_is_the_one_of_single_steps(model: Model, name: str, settings: str) -> None:
    params = SamplingParams(**{"max_tokens": 420, **SETTINGS[settings]})
    prompt = model.tokenizer.encode_prompt("Once there was a red red red ball.")
    expected = single_steps(model, prompt, params, SPECS[name])
    for speculate in (False, True):
        model.scheduler.speculate = speculate
        job = model.submit(prompt, params, grammar_of(model, SPECS[name]))
        run(model, job)
        assert answer_of(job) == expected
        assert (job.drafted_tokens > 0) <= speculate


def test_sixteen_grammars_do_not_disturb_each_other(model: Model) -> None:
    model.scheduler.speculate = False
    specs = [None, *SPECS.values()] * 2
    params = [SamplingParams(max_tokens=60, temperature=1, seed=i) for i in range(len(specs))]
    prompts = [model.tokenizer.encode_prompt(f"The {i}th of them" * (i + 1)) for i in range(16)]
    grammars = [None if spec is None else grammar_of(model, spec) for spec in specs]
    given = list(zip(prompts, params, grammars, strict=True))
    alone = []
    for one in given:
        job = model.submit(*one)
        run(model, job)
        alone.append(answer_of(job))
    jobs = [model.submit(*one) for one in given]
    run(model, *jobs)
    assert [answer_of(job) for job in jobs] == alone


@pytest.mark.parametrize("seed", range(12))
def test_what_finishes_validates_however_wild_the_draws(model: Model, seed: int) -> None:
    params = SamplingParams(max_tokens=200, temperature=20.0, seed=seed)
    jobs = [
        model.submit([3 + seed, 4], params, grammar_of(model, GrammarSpec.json_schema(schema)))
        for schema in (PERSON, ROWS)
    ]
    for text, schema, job in zip(run(model, *jobs), (PERSON, ROWS), jobs, strict=True):
        assert job.finish_reason == "stop"
        jsonschema.validate(json.loads(text), schema)


def test_forced_tokens_take_no_steps_of_their_own(model: Model, steps: list[list[Work]]) -> None:
    model.scheduler.speculate = False
    job = model.submit([5, 6], SamplingParams(), grammar_of(model, SPECS["constant"]))
    assert run(model, job) == ['{"every": ["word", "of", "it"], "n": 1}']
    assert (job.finish_reason, len(steps)) == ("stop", 1)
    assert job.forced_tokens == len(job.generated)
    steps.clear()
    job = model.submit([5, 6], SamplingParams(), grammar_of(model, SPECS["rows"]))
    run(model, job)
    assert job.forced_tokens > len(job.generated) / 3
    assert len(steps) <= 1 + len(job.generated) - job.forced_tokens


def test_forced_text_longer_than_a_step(model: Model, steps: list[list[Work]]) -> None:
    words = 400 // len(model.tokenizer.encode("xyzzy")) * "xyzzy"
    spec = GrammarSpec.regex(f"(a|b){words}")
    job = model.submit([5, 6], SamplingParams(), grammar_of(model, spec))
    assert run(model, job)[0][1:] == words
    assert job.forced_tokens > MAX_BATCH
    assert len(steps) <= 4


def test_the_end_comes_only_where_the_text_is_complete(model: Model) -> None:
    eager = dict.fromkeys(model.tokenizer.tokens.eos, 100.0)
    params = SamplingParams(logit_bias=eager, max_tokens=200)
    job = model.submit([5], params, grammar_of(model, SPECS["person"]))
    jsonschema.validate(json.loads(run(model, job)[0]), PERSON)
    job = model.submit([5], params, grammar_of(model, GrammarSpec.regex("ab?c*")))
    assert run(model, job) == ["a"]
    assert job.finish_reason == "stop"


@pytest.mark.parametrize("most", range(1, 30, 3))
def test_the_length_is_kept_within_forced_text(model: Model, most: int) -> None:
    job = model.submit([5], SamplingParams(max_tokens=most), grammar_of(model, SPECS["constant"]))
    text = run(model, job)[0]
    assert len(job.generated) <= most
    whole = '{"every": ["word", "of", "it"], "n": 1}'
    assert whole.startswith(text)
    assert job.finish_reason == ("stop" if text == whole else "length")


def test_stop_strings_hold_within_forced_text(model: Model) -> None:
    params = SamplingParams(stop=("word",))
    job = model.submit([5], params, grammar_of(model, SPECS["constant"]))
    assert run(model, job) == ['{"every": ["']
    assert job.finish_reason == "stop"


def test_forced_tokens_have_probability_one_and_forbidden_ones_are_not_listed(
    model: Model,
) -> None:
    params = SamplingParams(logprobs=5)
    job = model.submit([5], params, grammar_of(model, GrammarSpec.regex("(a|b)xyz(c|d)")))
    run(model, job)
    drawn = [p.drawn for p in job.pieces if p.drawn is not None]
    assert any(d.logprob == 0 and d.top == ((d.token, 0.0),) for d in drawn)
    assert all(math.isfinite(logprob) for d in drawn for _, logprob in d.top)
    first = drawn[0]
    assert sum(math.exp(logprob) for _, logprob in first.top) == pytest.approx(1, abs=1e-4)


def test_a_dead_end_fails_its_request_alone(model: Model) -> None:
    digits = [id_ for id_ in range(model.tokenizer.vocab_size) if _has_digit(model, id_)]
    params = SamplingParams(logit_bias=dict.fromkeys(digits, -math.inf), max_tokens=40)
    plain = SamplingParams(max_tokens=40, temperature=1, seed=1)
    alone = model.submit([7, 8], plain)
    run(model, alone)
    beside = model.submit([7, 8], plain)
    job = model.submit([5], params, grammar_of(model, GrammarSpec.regex("a[0-9]+")))
    run(model, beside, job)
    assert job.finish_reason == "error"
    assert isinstance(job.error, EngineError)
    assert "\n" not in str(job.error)
    assert answer_of(beside) == answer_of(alone)
    model.scheduler.engine.pool.check_integrity()
    with pytest.raises(EngineError, match="grammar"):
        list(model.follow(job))


def _has_digit(model: Model, id_: int) -> bool:
    return any(48 <= byte < 58 for byte in model.tokenizer.token_bytes(id_))


def test_a_grammar_asks_for_every_logit(model: Model, steps: list[list[Work]]) -> None:
    run(model, model.submit([5], SamplingParams(), grammar_of(model, SPECS["person"])))
    assert steps
    assert all(work.need == "all" for made in steps for work in made if work.logits != "none")


def test_cancelling_gives_the_pages_back(model: Model) -> None:
    free = model.scheduler.engine.pool.free
    jobs = [
        model.submit([5, i], SamplingParams(), grammar_of(model, SPECS["person"]))
        for i in range(16)
    ]
    for job in jobs:
        model.scheduler.step()
        model.scheduler.cancel(job)
    assert model.scheduler.idle
    assert model.scheduler.engine.pool.free == free


def test_control_tokens_are_never_part_of_an_answer(model: Model) -> None:
    guide = grammar_of(model, GrammarSpec.regex(r"(?s:.)*")).start()
    row = np.zeros(model.scheduler.engine.vocab_size, np.float32)
    guide.allow(row)
    tokens = model.tokenizer.tokens
    for id_ in tokens.control:
        assert math.isfinite(row[id_]) == (id_ in tokens.eos)
    assert np.isfinite(row).sum() > 100


def test_equal_specs_are_compiled_once_and_few_are_kept(model: Model) -> None:
    one = grammar_of(model, GrammarSpec.regex("abc"))
    assert grammar_of(model, GrammarSpec.regex("abc")) is one
    for n in range(40):
        grammar_of(model, GrammarSpec.regex(f"x{n}"))
    assert grammar_of(model, GrammarSpec.regex("abc")) is not one


@pytest.mark.parametrize(
    "make",
    [
        lambda: GrammarSpec.choice([]),
        lambda: GrammarSpec.choice([""]),
        lambda: GrammarSpec.choice(["a"] * 1001),
        lambda: GrammarSpec.json_schema({"a": math.nan}),
        lambda: GrammarSpec.json_schema({"a": {1, 2}}),
    ],
)
def test_a_bad_spec_is_refused_in_one_line(make: Any) -> None:
    with pytest.raises(UnsupportedSchema) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["(", "a(?=b)", "\\p{Nope}", "x" * (1 << 20)])
def test_a_bad_pattern_is_refused(model: Model, source: str) -> None:
    with pytest.raises(UnsupportedSchema):
        grammar_of(model, GrammarSpec.regex(source))
    with pytest.raises(UnsupportedSchema):
        grammar_of(model, GrammarSpec.lark(source))


def test_forced_tokens_are_those_the_vocabulary_cuts_the_text_into(model: Model) -> None:
    guide: Guide = grammar_of(model, SPECS["constant"]).start()
    forced = guide.force()
    assert model.tokenizer.decode(forced) == '{"every": ["word", "of", "it"], "n": 1}'
    assert guide.finished


# The real model

MEMORY = """
    import flashlite as fl
    from flashlite.runtime.grammar import GrammarSpec, compile_grammar
    from flashlite.runtime.process import resident_bytes, return_unused
    from flashlite.runtime.sampling import SamplingParams

    with fl.load("smollm2-135m-instruct", max_sequence_length=1024) as model:
        prompt = model.tokenizer.render_chat([{"role": "user", "content": "Hi"}])
        list(model.follow(model.submit(prompt, SamplingParams(max_tokens=5))))
        return_unused()
        before = resident_bytes()
        schema = {"type": "object", "properties": {"name": {"type": "string"}}}
        grammar = compile_grammar(GrammarSpec.json_schema(schema), model.tokenizer)
        list(model.follow(model.submit(prompt, SamplingParams(max_tokens=50), grammar)))
        return_unused()
        print(resident_bytes() - before)
"""


@pytest.mark.usefixtures("smollm2_gguf")
def test_the_first_schema_takes_less_than_35_megabytes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 35e6


@pytest.mark.usefixtures("smollm2_gguf")
def test_a_real_model_fills_a_schema() -> None:
    with load("smollm2-135m-instruct", max_sequence_length=1024) as model:
        prompt = model.tokenizer.render_chat(
            [{"role": "user", "content": "Bob is 42, married, and likes red. Answer in JSON."}]
        )
        params = SamplingParams(max_tokens=200)
        found = {}
        for speculate in (False, True):
            model.scheduler.speculate = speculate
            job = model.submit(prompt, params, grammar_of(model, SPECS["person"]))
            found[speculate] = run(model, job)[0]
            assert job.finish_reason == "stop"
            assert job.forced_tokens > 10
        assert found[False] == found[True]
        person = json.loads(found[False])
        jsonschema.validate(person, PERSON)
        assert person["age"] == 42
        expected = single_steps(model, prompt, params, SPECS["person"])
        assert [token for token, _ in expected] == job.generated
