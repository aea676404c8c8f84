"""What `flashlite analyze` does between its flags and its output: the parts are put together here.

model -> checkpoint -> calibration, written by the model's own engine -> measurements
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashlite.cli import output
from flashlite.errors import CompileError, UnsupportedTarget, UsageError

if TYPE_CHECKING:
    from flashlite.analyze.analysis import Analysis, Calibration
    from flashlite.analyze.calibration import Job, Sampler
    from flashlite.analyze.state import State
    from flashlite.checkpoint.pull import Pulled
    from flashlite.checkpoint.tokenizer import Tokenizer
    from flashlite.model.source import SourceModel
    from flashlite.runtime.prepare import Progress

__all__ = ["analyze_model", "source_digest"]

_LENGTH = 512  # tokens of a calibration sequence
_HELD_BACK = 2048  # tokens that exact losses are taken on
_BATCH = 36  # texts written at once
_MEASURED = 2  # formats whose loss is run when --exact does not say


def analyze_model(
    name: str,
    path: Path,
    text: Path | None,
    *,
    like: str | None,
    seed: int,
    tokens: int,
    formats: str | None,
    exact: str | None,
    gradients: bool,
    memory: int,
    fresh: bool,
    offline: bool,
    accept_license: bool,
    progress: Progress,
) -> tuple[Analysis, State]:
    """Everything from a model's name to its analysis, and the state to remove once it is written.

    Raises:
        FlashliteError: whatever stage failed.
    """
    from blake3 import blake3

    from flashlite.analyze.analysis import AnalysedModel
    from flashlite.analyze.pipeline import Settings, analyze
    from flashlite.analyze.sensitivity import Formats
    from flashlite.analyze.state import State
    from flashlite.checkpoint.convert_tokenizer import build_tokenizer_checked
    from flashlite.checkpoint.open import open_checkpoint
    from flashlite.checkpoint.pull import pull
    from flashlite.checkpoint.tokenizer import Tokenizer
    from flashlite.compress.roundings import round_trip, stored_bytes
    from flashlite.model.families import describe

    pulled = pull(
        name,
        accept_license=accept_license,
        offline=offline,
        progress=lambda done, total: progress("pull", done, total),
    )
    checkpoint = open_checkpoint(pulled.path, like=like)
    source = describe(checkpoint)
    chosen, measured = _formats(formats, exact)
    gradients = gradients and _torch()
    digest = source_digest(source, progress)
    key = {
        "version": 1,
        "digest": digest,
        "seed": seed,
        "tokens": tokens,
        "formats": chosen,
        "exact": measured,
        "gradients": gradients,
        "spec": source.spec.to_json(),
        "text": None if text is None else blake3(text.read_bytes()).hexdigest(),
    }
    state = State(path.with_name(f"{path.name}.partial"), key, fresh=fresh)
    tokenizer = Tokenizer(build_tokenizer_checked(checkpoint), name=pulled.name)
    calibration = _calibration(pulled, like, source.spec.max_context, tokenizer, text, seed, tokens,
                               state, progress)  # fmt: skip
    settings = Settings(measured, gradients, memory=memory, seed=seed)
    analysis = analyze(
        AnalysedModel(
            name,
            str(pulled.path.resolve()),
            digest,
            source.spec.family,
            sum(_size(shape) for _, shape in source.spec.shapes()),
        ),
        source.spec,
        source.tensor,
        calibration,
        Formats(chosen, lambda n, w, f: round_trip(source, n, w, f), stored_bytes),
        settings,
        state,
        progress,
    )
    return analysis, state


def _formats(formats: str | None, exact: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to predict, and what to measure: by default the formats of the fewest bytes."""
    from flashlite.compress.plan import PACKED
    from flashlite.compress.roundings import stored_bytes

    chosen = _list("--formats", formats, PACKED) or tuple(PACKED)
    by_size = sorted(chosen, key=lambda fmt: stored_bytes((16, 32), fmt))
    measured = _list("--exact", exact, chosen) or tuple(by_size[:_MEASURED])
    return chosen, tuple(fmt for fmt in chosen if fmt in measured)


def _list(flag: str, given: str | None, known: Sequence[str]) -> tuple[str, ...]:
    if given is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UsageError(f"{flag} names {name[:40]!r}, known are {', '.join(known)}")
    if not names:
        raise UsageError(f"{flag} is empty; give some of {', '.join(known)}")
    return names


def _torch() -> bool:
    try:
        import torch
    except ImportError:
        output.note(
            "torch is not installed: predicting without gradients (pip install 'flashlite[train]')"
        )
        return False
    import os

    with contextlib.suppress(AttributeError):  # not Linux
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return True


def source_digest(source: SourceModel, progress: Progress) -> str:
    """Of every tensor's name, shape, type and bytes, whatever file they lie in."""
    from blake3 import blake3

    digest = blake3()
    tensors = source.checkpoint.tensors
    for at, name in enumerate(sorted(tensors)):
        progress("digest", at, len(tensors))
        info = tensors[name]
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        digest.update(source.checkpoint.raw(name).tobytes())
    return f"blake3:{digest.hexdigest()}"


def _calibration(
    pulled: Pulled,
    like: str | None,
    max_context: int,
    tokenizer: Tokenizer,
    text: Path | None,
    seed: int,
    tokens: int,
    state: State,
    progress: Progress,
) -> Calibration:
    from dataclasses import asdict

    from flashlite.analyze import calibration
    from flashlite.analyze.analysis import Calibration
    from flashlite.analyze.strict import read

    if (kept := state.load("calibration")) is not None:
        with contextlib.suppress(UsageError):
            return read(Calibration, kept, "")
    length = min(_LENGTH, max_context)
    if text is not None:
        found = calibration.from_file(
            text, tokenizer, seed=seed, tokens=tokens, held_back=_HELD_BACK, length=length
        )
    else:
        with _sampler(pulled, like, length, progress) as sampler:
            found = calibration.from_model(
                tokenizer,
                sampler,
                seed=seed,
                tokens=tokens,
                held_back=_HELD_BACK,
                length=length,
                progress=lambda done, total: progress("write the calibration", done, total),
            )
    state.save("calibration", asdict(found))
    return found


@contextlib.contextmanager
def _sampler(
    pulled: Pulled, like: str | None, length: int, progress: Progress
) -> Iterator[Sampler]:
    """The model itself, compiled, as a writer of texts."""
    import tempfile

    from flashlite.artifact.read import open_artifact
    from flashlite.errors import ArtifactError
    from flashlite.runtime import prepare
    from flashlite.runtime.writing import Writer, open_writing, write

    with tempfile.TemporaryDirectory() as folder:
        artifact = None
        if like is None:  # what was made for a file of weights alone may be like another model
            with contextlib.suppress(ArtifactError, OSError):
                artifact = open_artifact(prepare.artifact_path(pulled, "import"))
        if artifact is None:
            # A split head would take minutes to fit, and is not used here.
            directory = Path(folder) / "source.fl"
            artifact = prepare.make_artifact(
                pulled, "import", directory, head="off", like=like, progress=progress
            )
        ends = frozenset(artifact.tokens.eos)
        try:
            engine = open_writing(artifact, _BATCH, length)
        except (CompileError, UnsupportedTarget) as error:
            raise type(error)(
                f"{error}; or give a text to measure on with --calibration FILE"
            ) from None
        with engine:

            def sample(jobs: Sequence[Job]) -> list[list[int]]:
                texts = []
                for first in range(0, len(jobs), _BATCH):
                    part = jobs[first : first + _BATCH]
                    writers = [
                        Writer(engine, job.ids, max(1, job.length - len(job.ids)),
                               job.temperature, job.seed)
                        for job in part
                    ]  # fmt: skip
                    write(engine, writers, ends)
                    texts += [[*job.ids, *w.drawn] for job, w in zip(part, writers, strict=True)]
                return texts

            yield sample


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
