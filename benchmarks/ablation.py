"""What each technique brings, in tokens per second: with it, and with it turned off.

    python benchmarks/ablation.py
    python benchmarks/ablation.py --only speculation,shapes

Each technique is one entry of TECHNIQUES below: a function that opens what it needs and returns
pairs of timings, "with" and "without", which take turns in every round. The ratio is what the
technique brings. There are no gates: a technique that brings nothing is shown as bringing nothing.

  speculation  greedy answer to a prompt that repeats itself, drafts on and off
  prefix       a 512-token prompt asked again (with a new end), prefix cache on and off
  threads      the pool of --threads against one thread
  isa          this CPU's best instruction set against older ones
  batch        sixteen requests decoding in the same steps against one after the other
  chunks       tokens/s of a running answer while a prompt of 2,048 is prefilled beside it in chunks
               of 64, against the largest chunks that a step takes (256)
  split_head   Gemma-3-270M: logits that cannot matter estimated, against all of them computed
  shapes       sizes as compiled-in constants against sizes read at run time: the generated C,
               rewritten by runtime_shapes.py, calls the same kernels
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

import common
from common import GEMMA, SMOLLM2, Row
from flashlite.analyze.openings import OPENINGS
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.codegen.emit import emit_model
from flashlite.codegen.target import ISAS, check_isa, host_isa, host_target
from flashlite.codegen.toolchain import build_library
from flashlite.errors import UnsupportedTarget
from flashlite.evaluate.ours import decode_seconds, prefill_seconds
from flashlite.runtime import scheduler as scheduling
from flashlite.runtime.engine import Engine, Work
from flashlite.runtime.library import MAX_BATCH, load_library
from flashlite.runtime.model import Model, load, summarize
from flashlite.runtime.prepare import compile_artifact
from flashlite.runtime.sampling import SamplingParams
from runtime_shapes import with_runtime_shapes

Rate = Callable[[], float]
"""Measures tokens per second, once."""


@dataclass(frozen=True)
class Pair:
    """One comparison: the same work with a technique and without it."""

    measure: str
    on: Rate
    off: Rate


@dataclass(frozen=True)
class Bench:
    """What techniques are given: the model, its weights in memory once, and fresh prompts."""

    artifact: Artifact
    weights: np.ndarray
    threads: int
    ids: Sequence[int]
    draw: random.Random
    stack: ExitStack  # closes what a technique opened

    def prompt(self, n: int) -> list[int]:
        """Random tokens that no cache has seen."""
        return self.draw.choices(self.ids, k=n)

    def model(self, **settings: object) -> Model:
        """`flashlite.load`, closed at the end."""
        fixed = {"threads": self.threads, "max_sequence_length": 4096}
        return self.stack.enter_context(load(SMOLLM2, **fixed | settings))  # type: ignore[arg-type]

    def endless(self, n: int) -> SamplingParams:
        """Greedy answers of exactly `n` tokens: none ends them before."""
        ends = dict.fromkeys(self.artifact.tokens.eos, -100.0)
        return SamplingParams(max_tokens=n, temperature=0, logit_bias=ends)

    def engine(
        self,
        isa: str | None = None,
        *,
        threads: int | None = None,
        sequences: int = 1,
        rewrite: Callable[[str], str] = lambda text: text,
    ) -> Engine:
        """An engine on the shared weights; `rewrite` changes its generated C."""
        target = host_target(isa)
        built = build_library(rewrite(emit_model(self.artifact, target.isa)), target)
        engine = Engine(
            load_library(built),
            self.weights,
            max_tokens=4096,
            threads=threads or self.threads,
            max_sequences=sequences,
        )
        return self.stack.enter_context(engine)


def prefill_rate(bench: Bench, engine: Engine, n: int = 512) -> Rate:
    """Tokens/s of a prompt."""
    return lambda: n / prefill_seconds(engine, bench.prompt(n))


def decode_rate(bench: Bench, engine: Engine, n: int = 64, together: int = 1) -> Rate:
    """Tokens/s of `together` sequences, decoding in the same steps."""

    def rate() -> float:
        prompts = [bench.prompt(16) for _ in range(together)]
        return n * together / decode_seconds(engine, prompts, n)

    return rate


def speculation(bench: Bench) -> list[Pair]:
    """Guess what follows from the text itself, check several guesses in one step."""
    text = "def area(width, height):\n    return width * height\n\n"
    with_drafts, without = (bench.model(speculate=on) for on in (True, False))
    ids = with_drafts.tokenizer.encode_prompt(text * 6)

    def rate(model: Model) -> float:
        generation = model.submit(ids, bench.endless(128))
        return summarize(generation, list(model.follow(generation))).tokens_per_second

    measure = "speculation: answering a repetitive text"
    return [Pair(measure, lambda: rate(with_drafts), lambda: rate(without))]


def prefix(bench: Bench) -> list[Pair]:
    """Find the stored pages of an equal beginning instead of computing them."""
    cached, without = (bench.model(prefix_cache=on) for on in (True, False))
    beginning = bench.prompt(512)

    def rate(model: Model) -> float:
        prompt = [*beginning, *bench.prompt(16)]
        generation = model.submit(prompt, bench.endless(1))
        return (
            len(prompt) / summarize(generation, list(model.follow(generation))).time_to_first_token
        )

    rate(cached)  # stores it
    return [
        Pair("prefix cache: a 512-token prompt again", lambda: rate(cached), lambda: rate(without))
    ]


def threads(bench: Bench) -> list[Pair]:
    """Share every operation among a pool of threads."""
    pool, single = bench.engine(), bench.engine(threads=1)
    what = f"{bench.threads} threads against 1"
    return [
        Pair(f"{what}: decoding", decode_rate(bench, pool), decode_rate(bench, single)),
        Pair(f"{what}: prefill of 512", prefill_rate(bench, pool), prefill_rate(bench, single)),
    ]


def isa(bench: Bench) -> list[Pair]:
    """Kernels written for the newest instructions."""
    best = host_isa()
    pairs = []
    for older in ISAS[ISAS.index(best) + 1 : ISAS.index("plain") + 1]:
        try:
            check_isa(older)
        except UnsupportedTarget:
            continue
        new, old, what = bench.engine(best), bench.engine(older), f"{best} against {older}"
        decode = [decode_rate(bench, engine, 32) for engine in (new, old)]
        prefill = [prefill_rate(bench, engine, 256) for engine in (new, old)]
        pairs.append(Pair(f"{what}: decoding", *decode))
        pairs.append(Pair(f"{what}: prefill of 256", *prefill))
    return pairs


def batch(bench: Bench) -> list[Pair]:
    """Read the weights once for all requests of a step."""
    engine = bench.engine(sequences=16)
    alone = decode_rate(bench, engine, 32)

    def one_after_the_other() -> float:
        return 16 / sum(1 / alone() for _ in range(16))

    return [Pair("batch: 16 together", decode_rate(bench, engine, 32, 16), one_after_the_other)]


def chunks(bench: Bench) -> list[Pair]:
    """Prefill long prompts in small pieces, so that running answers go on."""
    model = bench.model(max_sequences=2, speculate=False, prefix_cache=False)

    @contextmanager
    def chunk_of(n: int) -> Iterator[None]:
        before = scheduling.CHUNK_BESIDE_DECODE
        scheduling.CHUNK_BESIDE_DECODE = n
        try:
            yield
        finally:
            scheduling.CHUNK_BESIDE_DECODE = before

    def rate(n: int) -> float:
        with chunk_of(n):
            answer = model.submit(bench.prompt(16), bench.endless(1024))
            while len(answer.generated) < 4:
                model.scheduler.step()
            prompt = model.submit(bench.prompt(2048), bench.endless(1))
            before, begun = len(answer.generated), time.perf_counter()
            while prompt.finish_reason is None:
                model.scheduler.step()
            seconds = time.perf_counter() - begun
            written = len(answer.generated) - before
            model.scheduler.cancel(answer)
            return written / seconds

    return [
        Pair(
            "chunked prefill: an answer beside a prompt",
            lambda: rate(scheduling.CHUNK_BESIDE_DECODE),
            lambda: rate(MAX_BATCH),
        )
    ]


def split_head(bench: Bench) -> list[Pair]:
    """Screen a large vocabulary with a small table; nothing where a model has no split head."""
    artifact = common.ready_artifact(GEMMA)
    if artifact.plan.screen is None:
        common.note(f"{GEMMA} has no split head")
        return []
    library, weights = load_library(compile_artifact(artifact)), load_weights(artifact)
    split, full = (
        bench.stack.enter_context(
            Engine(library, weights, max_tokens=256, threads=bench.threads, exact_head=exact)
        )
        for exact in (False, True)
    )
    # The model's own text: random tokens lead to states that the screen was not made for.
    ids = Tokenizer(load_texts(artifact), name=artifact.name).encode_prompt(OPENINGS[0].texts[1])

    def rate(engine: Engine) -> Rate:
        return lambda: 64 / decode_seconds(engine, [ids], 64)

    return [Pair("split head of Gemma-3-270M: decoding", rate(split), rate(full))]


def shapes(bench: Bench) -> list[Pair]:
    """Compile the sizes of one model into its code."""
    constant, variable = bench.engine(), bench.engine(rewrite=with_runtime_shapes)
    sequences = [engine.new_sequence(32) for engine in (constant, variable)]
    ids = bench.prompt(16)
    one, other = (
        engine.step([Work(sequence, ids)]).copy()
        for engine, sequence in zip((constant, variable), sequences, strict=True)
    )
    if not np.array_equal(one, other):
        raise SystemExit("the rewritten C computes something else")
    for sequence in sequences:
        sequence.release()
    what = "sizes compiled in"
    return [
        Pair(f"{what}: decoding", decode_rate(bench, constant), decode_rate(bench, variable)),
        Pair(f"{what}: prefill", prefill_rate(bench, constant), prefill_rate(bench, variable)),
    ]


# One line per technique; the function's name is what --only takes. A new technique is a
# function that returns its pairs, and a line here.
TECHNIQUES: tuple[Callable[[Bench], list[Pair]], ...] = (
    speculation,
    prefix,
    threads,
    isa,
    batch,
    chunks,
    split_head,
    shapes,
)


def main() -> None:
    parser = common.make_parser(__doc__)
    names = [technique.__name__ for technique in TECHNIQUES]
    parser.add_argument("--only", metavar="NAMES", help=f"some of {', '.join(names)}")
    options = common.arguments(parser)
    only = options.only.split(",") if options.only else names
    if unknown := sorted(set(only) - set(names)):
        parser.error(f"technique {unknown[0]!r} is unknown; known are {', '.join(names)}")
    artifact = common.ready_artifact(SMOLLM2)
    compile_artifact(artifact)
    ids, weights = common.ordinary_ids(artifact), load_weights(artifact)
    rows, samples = [], {}
    with common.own_prefixes():
        for technique in TECHNIQUES:
            if technique.__name__ not in only:
                continue
            common.note(technique.__name__)
            with ExitStack() as stack:
                draw = random.Random(0)
                bench = Bench(artifact, weights, options.threads, ids, draw, stack)
                for pair in technique(bench):
                    on, off = in_turns(pair, options.rounds)
                    with_it, without = common.median(on), common.median(off)
                    rows.append(
                        Row(
                            pair.measure,
                            "tok/s",
                            with_it,
                            {"without": without},
                            "without",
                            with_it / without,
                        )
                    )
                    samples[pair.measure] = {"with": on, "without": off}
            gc.collect()  # the engines of one technique go before the next one's come
    common.finish("ablation", options, rows, samples=samples)


def in_turns(pair: Pair, rounds: int) -> tuple[list[float], list[float]]:
    """Timings with and without, alternating, after one of each that warms up."""
    pair.on(), pair.off()
    on, off = list[float](), list[float]()
    for lap in range(rounds):
        common.progress(lap, rounds)
        for rate, taken in [(pair.on, on), (pair.off, off)][:: 1 if lap % 2 == 0 else -1]:
            taken.append(rate())
    common.progress(rounds, rounds)
    return on, off


if __name__ == "__main__":
    main()
