"""`fl_sample` against a float64 reference, its distribution, and the ways to misuse it."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

CSRC = Path(__file__).parents[2] / "src" / "flashlite" / "csrc"
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{CSRC}"]
OK, BAD_ARGUMENT = 0, 2

Floats = NDArray[np.float32]


class CSampling(ctypes.Structure):
    _fields_ = [
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("repetition_penalty", ctypes.c_float),
        ("presence_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float),
        ("seed", ctypes.c_uint64),
        ("draw", ctypes.c_uint64),
        ("history", ctypes.c_void_p),
        ("n_history", ctypes.c_uint32),
        ("bias_ids", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n_bias", ctypes.c_uint32),
    ]


class CDraw(ctypes.Structure):
    _fields_ = [
        ("token", ctypes.c_int32),
        ("logprob", ctypes.c_float),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
        ("n_top", ctypes.c_uint32),
        ("skip_logprob", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class Settings:
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    draw: int = 0
    history: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Drawn:
    status: int
    token: int = -1
    logprob: float = 0.0
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


Sampler = Callable[..., Drawn]


def build(folder: Path, compiler: list[str], flags: list[str]) -> Path:
    library = folder / "sample.so"
    source = str(CSRC / "fl_sample.c")
    command = [*compiler, *FLAGS, *flags, "-shared", "-fPIC", "-o", str(library), source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def load(library: Path) -> Sampler:
    function = ctypes.CDLL(str(library)).fl_sample
    function.argtypes = [ctypes.c_void_p, ctypes.c_uint32, *[ctypes.c_void_p] * 3]

    def sample(logits: Floats, s: Settings, n_top: int = 0, skip_logprob: int = 0) -> Drawn:
        values = np.array(logits, np.float32)
        scratch = np.full(2 * len(values), -1, np.int32)
        history = np.array(s.history, np.int32)
        bias_ids = np.array([i for i, _ in s.bias], np.int32)
        bias = np.array([b for _, b in s.bias], np.float32)
        sampling = CSampling(
            s.temperature,
            s.top_p,
            s.min_p,
            s.top_k,
            s.repetition_penalty,
            s.presence_penalty,
            s.frequency_penalty,
            s.seed,
            s.draw,
            history.ctypes.data,
            len(history),
            bias_ids.ctypes.data,
            bias.ctypes.data,
            len(bias),
        )
        ids, logprobs = np.zeros(max(n_top, 1), np.int32), np.zeros(max(n_top, 1), np.float32)
        draw = CDraw(-1, 0, ids.ctypes.data, logprobs.ctypes.data, n_top, skip_logprob)
        status = function(
            values.ctypes.data,
            len(values),
            ctypes.addressof(sampling),
            scratch.ctypes.data,
            ctypes.addressof(draw),
        )
        if status != OK:
            return Drawn(status)
        top = tuple(ids[:n_top].tolist()), tuple(logprobs[:n_top].tolist())
        return Drawn(status, draw.token, draw.logprob, *top)

    return sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler on PATH")
    return load(build(tmp_path_factory.mktemp("sample"), [cc], ["-O3"]))


# ---- the reference: float64, whole sorts, one line per step ----


def adjusted(logits: Floats, s: Settings) -> NDArray[np.float64]:
    z = logits.astype(np.float64)
    for token in set(s.history):
        z[token] = (
            z[token] / s.repetition_penalty if z[token] > 0 else z[token] * s.repetition_penalty
        )
        z[token] -= s.presence_penalty + s.history.count(token) * s.frequency_penalty
    for token, bias in s.bias:
        z[token] += bias
    return z


def log_softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = z - z.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def uniform(seed: int, draw: int) -> float:
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    counter = mix((seed + golden) & mask) + (draw + 1) * golden
    return (mix(counter & mask) >> 11) * 2.0**-53


def reference(logits: Floats, s: Settings) -> tuple[int, bool]:
    """The token, and whether rounding to float32 could have led to another one."""
    z = adjusted(logits, s)
    if s.temperature == 0:
        return int(np.argmax(z)), False
    order = np.lexsort((np.arange(len(z)), -z))
    if s.top_k:
        order = order[: s.top_k]
    weights = np.exp((z[order] - z.max()) / s.temperature)
    fragile = False
    if s.top_p < 1:
        reached = np.cumsum(weights) / weights.sum()
        n = min(int(np.searchsorted(reached, np.float32(s.top_p))) + 1, len(order))
        fragile |= bool(np.abs(reached - s.top_p).min() < 1e-6)
        order, weights = order[:n], weights[:n]
    likely = weights >= np.float32(s.min_p)
    fragile |= bool(np.abs(weights - s.min_p).min() < 1e-6) and s.min_p > 0
    by_id = np.sort(order[likely])
    edges = np.cumsum(np.exp((z[by_id] - z.max()) / s.temperature))
    target = uniform(s.seed, s.draw) * edges[-1]
    fragile |= bool(np.abs(edges - target).min() < 1e-5 * edges[-1])
    return int(by_id[np.searchsorted(edges, target, side="right")]), fragile


def random_case(rng: np.random.Generator) -> tuple[Floats, Settings]:
    vocab = int(rng.choice([1, 2, 15, 16, 17, 257, 1024, 5000, 40001]))
    logits = rng.normal(0, rng.choice([0.1, 3, 30]), vocab).astype(np.float32)
    if rng.random() < 0.4:  # many equals
        logits = np.round(logits)
    if rng.random() < 0.2 and vocab > 1:
        logits[rng.random(vocab) < 0.3] = -np.inf
        logits[rng.integers(vocab)] = 1.5
    history = rng.integers(0, vocab, rng.choice([0, 0, 3, 50]))
    biased = rng.choice(vocab, min(vocab, int(rng.choice([0, 0, 4]))), replace=False)
    return logits, Settings(
        temperature=float(rng.choice([0, 0.2, 0.7, 1, 1.3, 5])),
        top_p=float(rng.choice([1, 1, 0.0, 0.1, 0.5, 0.9, 0.99])),
        min_p=float(rng.choice([0, 0, 0.05, 0.4])),
        top_k=int(rng.choice([0, 0, 1, 2, 40, 700, 10**6])),
        repetition_penalty=float(rng.choice([1, 1.25, 0.5])),
        presence_penalty=float(rng.choice([0, 0.5, -0.25])),
        frequency_penalty=float(rng.choice([0, 0.25, -0.5])),
        seed=int(rng.integers(2**64, dtype=np.uint64)),
        draw=int(rng.integers(10000)),
        history=tuple(history.tolist()),
        bias=tuple((int(i), float(rng.choice([1, -3, 8]))) for i in biased),
    )


def test_token_and_logprobs_equal_the_float64_reference(sample: Sampler) -> None:
    rng = np.random.default_rng(7)
    fragile_cases, cases = 0, 1500
    for case in range(cases):
        logits, settings = random_case(rng)
        n_top = int(min(rng.choice([0, 1, 20, 64]), len(logits)))
        drawn = sample(logits, settings, n_top=n_top)
        assert drawn.status == OK, (case, settings)
        expected, fragile = reference(logits, settings)
        fragile_cases += fragile
        assert fragile or drawn.token == expected, (case, settings)
        z = adjusted(logits, settings)
        logprobs = log_softmax(z)
        assert drawn.logprob == pytest.approx(logprobs[drawn.token], rel=1e-5, abs=1e-5)
        finite = np.isfinite(logprobs[list(drawn.top_ids)])
        np.testing.assert_allclose(
            np.array(drawn.top_logprobs)[finite],
            logprobs[list(drawn.top_ids)][finite],
            rtol=1e-5,
            atol=1e-5,
        )
        assert np.all(np.isneginf(np.array(drawn.top_logprobs)[~finite]))
        exact = np.lexsort((np.arange(len(z)), -z.astype(np.float32)))[:n_top]
        # Penalties round in float32, so equals may differ: then only the values must agree.
        if not settings.history:
            assert list(drawn.top_ids) == exact.tolist(), case
        assert len(set(drawn.top_ids)) == n_top
    assert fragile_cases < cases * 0.05


def test_large_vocabulary_agrees_with_the_reference(sample: Sampler) -> None:
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 3, 262144).astype(np.float32)
    settings = Settings(temperature=1.0, seed=5)
    for change in ({}, {"top_k": 40}, {"top_k": 5000}, {"top_p": 0.95}, {"min_p": 0.01}):
        for draw in range(4):
            case = replace(settings, draw=draw, **change)
            expected, fragile = reference(logits, case)
            assert fragile or sample(logits, case).token == expected, case


@pytest.mark.parametrize("counter", ["draw", "seed"])
def test_draws_follow_the_distribution(sample: Sampler, counter: str) -> None:
    logits = np.array([2, 1.5, 1, 0.5, 0, -0.5, -1, -2], np.float32)
    draws, temperature = 20000, 0.8
    expected = np.exp(log_softmax(logits.astype(np.float64) / temperature)) * draws
    counts = np.zeros(len(logits))
    pairs = np.zeros((8, 8))
    last = 0
    for i in range(draws):
        seed, draw = (i, 0) if counter == "seed" else (0, i)
        settings = Settings(temperature=temperature, seed=seed, draw=draw)
        token = sample(logits, settings, skip_logprob=1).token
        counts[token] += 1
        pairs[last, token] += 1
        last = token
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 24.3  # 7 degrees of freedom: exceeded once in a thousand seeds
    joint = np.outer(expected, expected) / draws  # one draw says nothing about the next
    often = joint > 5
    chi2 = ((pairs - joint)[often] ** 2 / joint[often]).sum()
    assert chi2 < often.sum() + 4 * math.sqrt(2 * often.sum())


def test_a_draw_depends_on_seed_and_draw_alone(sample: Sampler) -> None:
    logits = np.random.default_rng(0).normal(0, 1, 3000).astype(np.float32)
    settings = [
        Settings(temperature=1.0, seed=s, draw=d) for s in (0, 1, 2**64 - 1) for d in range(9)
    ]
    forward = [sample(logits, s).token for s in settings]
    assert [sample(logits, s).token for s in reversed(settings)] == forward[::-1]
    assert len(set(forward)) > 20


@pytest.mark.parametrize("flags", [["-O0"], ["-O2", "-march=native"], ["-O3", "-march=native"]])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_every_build_gives_the_same_bits(
    sample: Sampler, tmp_path: Path, compiler: str, flags: list[str]
) -> None:
    if (found := shutil.which(compiler)) is None:
        pytest.skip(f"no {compiler} on PATH")
    other = load(build(tmp_path, [found], flags))
    rng = np.random.default_rng(11)
    for _ in range(150):
        logits, settings = random_case(rng)
        n_top = min(20, len(logits))
        assert other(logits, settings, n_top=n_top) == sample(logits, settings, n_top=n_top)


@pytest.mark.parametrize("vocab", [5, 1024, 5000])
def test_greedy_takes_the_first_of_equals(sample: Sampler, vocab: int) -> None:
    logits = np.zeros(vocab, np.float32)
    assert sample(logits, Settings(), n_top=5).top_ids == (0, 1, 2, 3, 4)
    logits[3:] = 7
    assert sample(logits, Settings()).token == 3
    logits[:] = -1
    logits[2], logits[4] = -0.0, 0.0  # equal as numbers
    assert sample(logits, Settings(), n_top=2).top_ids == (2, 4)
    assert sample(logits, Settings()).token == 2


def test_equals_at_a_cut_are_kept_in_order_of_id(sample: Sampler) -> None:
    logits = np.zeros(8192, np.float32)
    for settings in (Settings(temperature=1.0, top_k=3), Settings(temperature=1.0, top_p=3 / 8192)):
        tokens = {sample(logits, replace(settings, draw=d)).token for d in range(100)}
        assert tokens == {0, 1, 2}


def test_extremes_are_survived(sample: Sampler) -> None:
    big = np.finfo(np.float32).max
    logits = np.array([-big, big, big, -np.inf, 0], np.float32)
    for temperature in (0.0, 1e-45, 1e-30, 1.0, float(big)):
        drawn = sample(logits, Settings(temperature=temperature, top_p=0.5, draw=3), n_top=5)
        assert drawn.status == OK
        assert drawn.token in (1, 2)
        assert drawn.top_ids == (1, 2, 4, 0, 3)
        assert drawn.logprob == pytest.approx(-math.log(2))
    assert sample(np.zeros(1, np.float32), Settings(temperature=1.0)).token == 0
    only = np.full(70, -np.inf, np.float32)
    only[69] = -5
    assert sample(only, Settings(temperature=2.0, top_p=0.9)).token == 69
    assert sample(only, Settings(temperature=0.0)).logprob == 0


def test_a_forbidden_token_is_never_drawn(sample: Sampler) -> None:
    logits = np.array([9, 1, 1, 1], np.float32)
    settings = Settings(temperature=100.0, bias=((0, -math.inf), (3, -math.inf)))
    tokens = {sample(logits, replace(settings, draw=d)).token for d in range(200)}
    assert tokens == {1, 2}


def test_biases_of_one_token_add_up(sample: Sampler) -> None:
    logits = np.zeros(4, np.float32)
    assert sample(logits, Settings(bias=((2, 1.0), (1, 1.5), (2, 1.0)))).token == 2


def test_skipping_the_logprob_changes_nothing_else(sample: Sampler) -> None:
    logits = np.random.default_rng(2).normal(0, 2, 999).astype(np.float32)
    for settings in (Settings(), Settings(temperature=1.0, top_k=9, seed=4)):
        full, quick = sample(logits, settings), sample(logits, settings, skip_logprob=1)
        assert quick == replace(full, logprob=0.0)
        assert sample(logits, settings, n_top=1, skip_logprob=1).logprob == full.logprob


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "settings",
    [
        *[Settings(temperature=t) for t in (-0.1, NAN, INF)],
        *[Settings(temperature=1.0, top_p=p) for p in (-0.1, 1.1, NAN)],
        *[Settings(temperature=1.0, min_p=p) for p in (-0.1, 1.1, NAN)],
        *[Settings(top_k=k) for k in (-1, -(2**31))],
        *[Settings(repetition_penalty=p) for p in (0.0, -1.0, NAN, INF)],
        *[Settings(presence_penalty=p) for p in (NAN, INF, -INF)],
        *[Settings(frequency_penalty=p) for p in (NAN, INF, -INF)],
        *[Settings(history=(1, i)) for i in (-1, 8, 2**31 - 1, -(2**31))],
        *[Settings(bias=((i, 1.0),)) for i in (-1, 8, 2**31 - 1, -(2**31))],
        *[Settings(bias=((1, b),)) for b in (NAN, INF)],
        Settings(bias=tuple((i, -INF) for i in range(8))),  # nothing is left
        Settings(history=(1,) * 9, frequency_penalty=-3e38),  # a logit overflows
    ],
)
def test_bad_settings_are_refused(sample: Sampler, settings: Settings) -> None:
    logits = np.arange(8, dtype=np.float32)
    assert sample(logits, Settings()).status == OK
    assert sample(logits, settings).status == BAD_ARGUMENT


@pytest.mark.parametrize("place", [0, 15, 16, 1023, 1024, 2999])
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7F800000])
def test_nan_and_infinite_logits_are_refused(sample: Sampler, place: int, bits: int) -> None:
    logits = np.zeros(3000, np.float32)
    logits.view(np.uint32)[place] = bits
    for settings in (Settings(), Settings(temperature=1.0, top_k=5)):
        assert sample(logits, settings, skip_logprob=1).status == BAD_ARGUMENT


def test_missing_and_oversized_arguments_are_refused(sample: Sampler) -> None:
    assert sample(np.zeros(0, np.float32), Settings()).status == BAD_ARGUMENT
    assert sample(np.full(9, -np.inf, np.float32), Settings()).status == BAD_ARGUMENT
    assert sample(np.zeros(100, np.float32), Settings(), n_top=65).status == BAD_ARGUMENT
    assert sample(np.zeros(10, np.float32), Settings(), n_top=11).status == BAD_ARGUMENT
