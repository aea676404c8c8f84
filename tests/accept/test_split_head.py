"""The split head on a real model, against its own full head, on text that the model writes itself.

Fitted to one set of beginnings (`runtime/states.py`), chosen on a second, judged here on a third,
half of it in languages that neither of the others holds. Both heads read the same tokens; a logit
is contained when it has the full head's bits, since estimates never have.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.pull import pull
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.evaluate.ours import decode_seconds
from flashlite.model.metrics import kl_divergence
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import load_library
from flashlite.runtime.prepare import compile_artifact, find_artifact, make_artifact
from flashlite.runtime.sampler import Sampler
from flashlite.runtime.sampling import SamplingParams

pytestmark = pytest.mark.accept

MODELS = ["gemma-3-270m"]
BEGINNINGS = {  # `*`: languages that no text of the fit is in
    "en": ("The old bridge across the river", "Scientists have found that"),
    "es": ("El viejo puente sobre el río", "Los científicos descubrieron que"),
    "fr": ("Le vieux pont sur la rivière", "Les chercheurs ont découvert que"),
    "de": ("Die alte Brücke über den Fluss", "Forscher haben entdeckt, dass"),
    "ru": ("Старый мост через реку", "Учёные обнаружили, что"),
    "zh": ("河上的那座老桥", "科学家发现"),
    "ja": ("川にかかる古い橋は", "研究者たちは"),
    "ko": ("강을 가로지르는 오래된 다리는", "과학자들은"),
    "ar": ("الجسر القديم فوق النهر", "اكتشف العلماء أن"),
    "hi": ("नदी पर पुराना पुल", "वैज्ञानिकों ने पाया कि"),
    "code": ("class Stack:\n    def __init__(self", "SELECT name, COUNT(*) FROM"),
    "nl*": ("De oude brug over de rivier", "Onderzoekers hebben ontdekt dat"),
    "pl*": ("Stary most na rzece", "Naukowcy odkryli, że"),
    "sv*": ("Den gamla bron över floden", "Forskare har upptäckt att"),
    "uk*": ("Старий міст через річку", "Вчені виявили, що"),
    "el*": ("Η παλιά γέφυρα πάνω από το ποτάμι", "Οι επιστήμονες ανακάλυψαν ότι"),
    "id*": ("Jembatan tua di atas sungai", "Para ilmuwan menemukan bahwa"),
    "th*": ("สะพานเก่าข้ามแม่น้ำ", "นักวิทยาศาสตร์พบว่า"),
    "he*": ("הגשר הישן מעל הנהר", "מדענים גילו כי"),
    "cs*": ("Starý most přes řeku", "Vědci zjistili, že"),
}
STATES = 1050  # of every language: 21,000
LENGTH = 200  # tokens of a text
TEMPERATURES = (0.7, 1.0, 0.0)
GREEDY, TOKENS = 200, 64
TOGETHER = 20
CHUNK = 64  # rows of logits held at once, of each head


@dataclass(frozen=True)
class Ready:
    """A model with its split head, and the same model quantized without one."""

    split: Artifact
    plain: Artifact
    tokenizer: Tokenizer

    def engine(self, artifact: Artifact, *, exact_head: bool = False) -> Engine:
        return Engine(
            load_library(compile_artifact(artifact)),
            load_weights(artifact),
            max_tokens=TOGETHER * 320,
            threads=2,
            max_sequences=TOGETHER,
            exact_head=exact_head,
        )


@pytest.fixture(scope="module", params=MODELS)
def ready(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    split = find_artifact(request.param, accept_license=True)
    pulled, folder = pull(request.param, accept_license=True), tmp_path_factory.mktemp("heads")
    plain = make_artifact(pulled, "import", folder / "plain.fl", head="off")
    assert split.plan.screen is not None
    print(f"\n{request.param}: {split.plan.screen}")
    return Ready(split, plain, Tokenizer(load_texts(split), name=split.name))


Job = tuple[list[int], float, int]  # a beginning, the temperature and the seed of what follows


def write(engine: Engine, jobs: list[Job], tokens: int, ends: frozenset[int]) -> list[list[int]]:
    """What the model writes after every beginning, as many at a time as the engine holds."""
    written: list[list[int]] = []
    scratch = np.empty(engine.vocab_size, np.uint64)
    for first in range(0, len(jobs), TOGETHER):
        texts: list[list[int]] = []
        live = []
        for ids, temperature, seed in jobs[first : first + TOGETHER]:
            params = SamplingParams(temperature=temperature, seed=seed)
            sampler = Sampler(engine.library, params, np.array(ids, np.int32), tokens, scratch)
            texts.append([])
            sequence = engine.new_sequence(len(ids) + tokens)
            live.append((sequence, ids, texts[-1], sampler, params.need))
        held = [sequence for sequence, *_ in live]
        for sequence, ids, *_ in live:
            if len(ids) > 1:
                engine.step([Work(sequence, ids[:-1], "none")])
        for _ in range(tokens):
            work = [Work(s, text[-1:] or ids[-1:], need=need) for s, ids, text, _, need in live]
            logits = engine.step(work)
            for (*_, text, sampler, _), row in zip(live, logits, strict=True):
                text.append(sampler.draw(row).token)
            live = [item for item in live if item[2][-1] not in ends]
            if not live:
                break
        for sequence in held:
            sequence.release()
        written += texts
    return written


def beginnings(ready: Ready) -> list[tuple[str, list[int]]]:
    return [
        (language, list(ready.tokenizer.encode_prompt(text)))
        for language, texts in BEGINNINGS.items()
        for text in texts
    ]


def texts_of(ready: Ready, engine: Engine) -> Iterator[tuple[str, list[int], int]]:
    """(language, tokens, how many of them are the beginning), `STATES` states of every language."""
    missing = dict.fromkeys(BEGINNINGS, STATES)
    ends, seed = frozenset(ready.split.tokens.eos), 0
    while wanting := [each for each in beginnings(ready) if missing[each[0]] > 0]:
        for temperature in TEMPERATURES if seed == 0 else TEMPERATURES[:2]:
            jobs = [(ids, temperature, seed + i) for i, (_, ids) in enumerate(wanting)]
            texts = write(engine, jobs, LENGTH, ends)
            for (language, ids), text in zip(wanting, texts, strict=True):
                kept = text[: max(0, missing[language])]
                missing[language] -= len(kept)
                if kept:
                    yield language, ids + kept, len(ids)
            seed += len(jobs)


@dataclass
class Tally:
    """Of the states of one language."""

    states: int = 0
    argmax: int = 0
    top20: int = 0
    kl: float = 0.0

    def add(self, full: np.ndarray, split: np.ndarray) -> None:
        top = np.argpartition(-full, 20, axis=1)[:, :20]
        same = np.take_along_axis(full, top, axis=1) == np.take_along_axis(split, top, axis=1)
        best = full.argmax(axis=1)
        rows = np.arange(len(full))
        self.states += len(full)
        self.argmax += int((full[rows, best] == split[rows, best]).sum())
        self.top20 += int(same.all(axis=1).sum())
        self.kl += float(kl_divergence(full, split).sum())


def test_what_matters_is_exact_on_the_models_own_text(ready: Ready) -> None:
    tallies: dict[str, Tally] = defaultdict(Tally)
    with ready.engine(ready.split) as split, ready.engine(ready.split, exact_head=True) as full:
        for language, ids, known in texts_of(ready, full):
            pair = [engine.new_sequence(len(ids)) for engine in (full, split)]
            if known > 1:
                for engine, sequence in zip((full, split), pair, strict=True):
                    engine.step([Work(sequence, ids[: known - 1], "none")])
            for at in range(known - 1, len(ids) - 1, CHUNK):
                part = ids[at : min(at + CHUNK, len(ids) - 1)]
                rows = [
                    engine.step([Work(sequence, part, "all")])
                    for engine, sequence in zip((full, split), pair, strict=True)
                ]
                tallies[language].add(*rows)
            for sequence in pair:
                sequence.release()
        counts = split.head_counts
    for language, tally in tallies.items():
        print(
            f"{language:>5}: {tally.states} states, argmax {tally.argmax / tally.states:.4%}, "
            f"top 20 {tally.top20 / tally.states:.3%}, KL {tally.kl / tally.states:.5f}"
        )
    states = sum(tally.states for tally in tallies.values())
    argmax = sum(tally.argmax for tally in tallies.values()) / states
    top20 = sum(tally.top20 for tally in tallies.values()) / states
    kl = sum(tally.kl for tally in tallies.values()) / states
    in_full = counts.full / counts.rows
    print(
        f"{states} states: argmax {argmax:.4%}, top 20 {top20:.3%}, KL {kl:.5f}, "
        f"in full {in_full:.3%}, {counts.estimated / counts.rows:.0f} logits estimated twice, "
        f"{counts.exact / counts.rows:.0f} blocks exact"
    )
    assert states >= 20_000
    assert argmax >= 0.999
    assert min(tally.argmax / tally.states for tally in tallies.values()) >= 0.995
    assert top20 >= 0.99
    assert kl <= 0.002
    assert in_full <= 0.05


def test_greedy_text_is_the_full_heads(ready: Ready) -> None:
    """Texts of equal tokens, out of all; exact mode against the model made without a split head."""
    jobs: list[Job] = []
    with ready.engine(ready.plain) as plain:
        starts = [(ids, 1.0, 1000 + i) for i, (_, ids) in enumerate(beginnings(ready) * 5)]
        ends = frozenset(ready.split.tokens.eos)
        for (ids, _, seed), text in zip(starts, write(plain, starts, 8, ends), strict=True):
            jobs.append(([*ids, *text], 0.0, seed))
        expected = write(plain, jobs, TOKENS, frozenset())
    same = {}
    for exact_head in (False, True):
        with ready.engine(ready.split, exact_head=exact_head) as engine:
            got = write(engine, jobs, TOKENS, frozenset())
        same[exact_head] = sum(a == b for a, b in zip(expected, got, strict=True)) / len(jobs)
    print(f"{len(jobs)} x {TOKENS} tokens: {same[False]:.1%} equal, exact mode {same[True]:.1%}")
    assert len(jobs) == GREEDY
    assert same[False] >= 0.98
    assert same[True] == 1


@pytest.mark.xfail(strict=True, reason="wanted 1.8 x and 3 x; measured 1.44 x and 1.72 x")
def test_it_is_faster(ready: Ready) -> None:
    """Decoding, and the head alone: what a step takes more than the next one without logits, which
    finds the caches as that one left them.
    """
    prompts = [ids for _, ids in beginnings(ready)]
    with ready.engine(ready.split) as split, ready.engine(ready.split, exact_head=True) as full:
        decoding: dict[Engine, list[float]] = {split: [], full: []}
        heads: dict[Engine, list[float]] = {split: [], full: []}
        for prompt in prompts[:1] + prompts[:16]:  # the first of all warms up
            for engine in decoding:
                decoding[engine].append(decode_seconds(engine, [prompt], TOKENS))
                heads[engine].append(head_seconds(engine, prompt, TOKENS))
    step = {
        engine: 1e3 * float(np.median(taken[1:])) / TOKENS for engine, taken in decoding.items()
    }
    head = {engine: 1e3 * float(np.median(taken[1:])) for engine, taken in heads.items()}
    print(
        f"ms per token: {step[full]:.2f} -> {step[split]:.2f}, {step[full] / step[split]:.2f} x; "
        f"head {head[full]:.2f} -> {head[split]:.2f}, {head[full] / head[split]:.2f} x"
    )
    assert step[full] >= 1.8 * step[split]
    assert head[full] >= 3 * head[split]


def head_seconds(engine: Engine, ids: list[int], n: int) -> float:
    """Median over `n` pairs of steps, with logits and without."""
    sequence = engine.new_sequence(len(ids) + 2 * n)
    token = int(np.argmax(engine.step([Work(sequence, ids, need="largest")])[0]))
    differences = []
    for _ in range(n):
        begun = time.perf_counter()
        logits = engine.step([Work(sequence, [token], need="largest")])
        between = time.perf_counter()
        engine.step([Work(sequence, [token], "none")])
        differences.append(2 * between - begun - time.perf_counter())
        token = int(np.argmax(logits[0]))
    sequence.release()
    return float(np.median(differences))
