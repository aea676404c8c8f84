"""From a model or an artifact to a delta: find the source, the texts, tune, and describe it.

    artifact + its source + texts ──> compress/finetune ──> NAME.delta

Texts are those of a `sensitive_layers.json`, or the source writes them itself.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from flashlite import paths
from flashlite.analyze.analysis import read_analysis
from flashlite.analyze.digest import source_digest
from flashlite.artifact.delta import base_digest, delta_bytes
from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights, open_artifact, packed, tensor
from flashlite.checkpoint.pull import Pulled, pull
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.compress.finetune import finetune
from flashlite.compress.tail_cache import Model
from flashlite.compress.tuning import Material, Outcome, Report, Settings
from flashlite.compress.tuning_texts import (
    Text,
    chat_text,
    plain_text,
    read_chats,
    sequences,
)
from flashlite.errors import ArtifactError, CompressError, UsageError
from flashlite.model.source import SourceModel
from flashlite.runtime.prepare import artifact_path, make_artifact
from flashlite.runtime.texts import sample_texts

__all__ = ["MOST_LOST", "Tuned", "Wanted", "source_of", "tune"]

_LENGTH = 512  # tokens of a text
_HELD_SHARE = 10  # one of so many texts is held back
_RECIPE = 1  # raised when an old checkpoint must not be gone on with
MOST_LOST = 1.02  # general perplexity after tuning to a domain, over that before

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What shall be tuned, and on what.

    Attributes:
        artifact: the quantized model.
        source: the checkpoint it was made from.
        data: chats of a domain; None: heal.
        held: chats to measure on; None: one in ten of `data`, drawn by the seed.
        config: a `sensitive_layers.json` whose texts are used; None: the source writes some.
        tokens: of general text to learn from.
        others: more general texts, only measured, by name.
        fresh: forget what a killed run left.
    """

    artifact: Artifact
    source: Pulled
    data: Path | None = None
    held: Path | None = None
    config: Path | None = None
    tokens: int = 40_000
    others: Sequence[tuple[str, Sequence[Sequence[int]]]] = ()
    fresh: bool = False


@dataclass(frozen=True)
class Tuned:
    """A run's outcome and the delta it makes.

    Attributes:
        outcome: figures and tensors.
        delta: the bytes of the delta file.
        share: of the artifact's weights.
    """

    outcome: Outcome
    delta: bytes
    share: float

    @property
    def general_lost(self) -> float:
        """Perplexity of general text after, over that before."""
        name = "held-out"
        return self.outcome.after[name].perplexity / self.outcome.before[name].perplexity

    @property
    def worse(self) -> str | None:
        """What speaks against the delta, None if nothing does."""
        if not self.outcome.better:
            return "what was held back got no better"
        if self.outcome.domain_after is not None and self.general_lost > MOST_LOST:
            lost = 100 * (self.general_lost - 1)
            return f"perplexity of general text got {lost:.1f} % worse, allowed 2 %"
        return None


def source_of(artifact: Artifact, name: str | None) -> Pulled:
    """The checkpoint an artifact was made from.

    Args:
        artifact: the artifact.
        name: a known name, `hf:ORG/NAME` or a path; None: the known model of the artifact's name.

    Raises:
        UsageError: it is another file than the one the artifact names, or none is known.
        PullError: it is not on this machine.
    """
    from flashlite.checkpoint.fetch import sha256_file
    from flashlite.checkpoint.known_models import KNOWN_MODELS

    if name is None and artifact.name not in KNOWN_MODELS:
        raise UsageError(
            f"{artifact.path}: made from {artifact.provenance['source'] or 'an unknown file'}; say "
            "where that is with --source"
        )
    pulled = pull(name or artifact.name, offline=name is None)
    found = pulled.sha256 or (sha256_file(pulled.path) if pulled.path.is_file() else "")
    wanted = artifact.provenance["sha256"]
    if wanted and found and found != wanted:
        raise UsageError(
            f"{pulled.path}: sha256 {found[:12]}, {artifact.path} was made from {wanted[:12]}; "
            "name its source with --source"
        )
    return pulled


def tune(
    wanted: Wanted,
    settings: Settings,
    *,
    progress: Progress | None = None,
    report: Callable[[Report], None] | None = None,
) -> Tuned:
    """Tune an artifact's last layers and describe them as a delta.

    Args:
        wanted: what, and on what.
        settings: the recipe.
        progress: called with (stage, done, total) while texts are made.
        report: called at every step.

    Raises:
        UsageError: a file of chats or texts that cannot be used, or an equal run goes on elsewhere.
        CompressError: the source is another model, or settings out of range.
        MissingExtra: PyTorch is not installed.
        FlashliteError: what reading, sampling or compiling raises.
    """
    import filelock

    from flashlite.checkpoint.open import open_checkpoint
    from flashlite.model.differentiable import require_torch
    from flashlite.model.families import describe

    torch = require_torch("fine-tuning")
    settings.check()
    artifact = wanted.artifact
    checkpoint = describe(open_checkpoint(wanted.source.path))
    if checkpoint.spec != artifact.spec:
        raise CompressError(f"{wanted.source.path} is another model than {artifact.path}")
    weights = load_weights(artifact)
    head = "embed" if artifact.spec.tied_head else "head"
    source = Model(artifact.spec, lambda n: checkpoint.tensor(head if n == "head" else n))
    student = Model(artifact.spec, lambda n: tensor(artifact, weights, n))
    material = _material(wanted, checkpoint, settings, progress)
    key = _key(wanted, settings, material, f"{torch.__version__} {torch.get_num_threads()}")
    folder = paths.private_dir(paths.cache_dir() / "finetune") / key
    try:
        with filelock.FileLock(f"{folder}.lock", timeout=0):
            if wanted.fresh:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
            outcome = finetune(
                source, student, lambda n: packed(artifact, weights, n), material, folder,
                settings, report,
            )  # fmt: skip
            delta = delta_bytes(
                artifact, settings.layers, outcome.arrays, _made(wanted, settings, outcome)
            )
            shutil.rmtree(folder, ignore_errors=True)
    except filelock.Timeout:
        raise UsageError("the same fine-tuning runs in another process; wait for it") from None
    return Tuned(outcome, delta, len(delta) / artifact.weights_size)


def _material(
    wanted: Wanted, source: SourceModel, settings: Settings, progress: Progress | None
) -> Material:
    artifact = wanted.artifact
    limit = min(_LENGTH, artifact.spec.max_context, settings.tokens)
    rng = np.random.default_rng(settings.seed)
    if wanted.config is not None:
        analysis = read_analysis(wanted.config)
        if analysis.model.digest != source_digest(source):
            raise UsageError(f"{wanted.config}: is about another model, {analysis.model.name}")
        vocab_size, calibration = artifact.spec.vocab_size, analysis.calibration
        texts = sequences(calibration.sequences, vocab_size, limit)
        held = sequences(calibration.held_back, vocab_size, limit)
        if not held:
            texts, held = _split(texts, rng)
        texts = _up_to(texts, wanted.tokens)
    else:
        texts, held = _written(wanted, settings, limit, progress)
    others = {
        name: [plain_text(list(ids[:limit])) for ids in several] for name, several in wanted.others
    }
    material = Material(texts, held, others=others)
    if wanted.data is None:
        if wanted.held is not None:
            raise UsageError("--eval goes with --data: it holds chats of the same domain")
        return material
    files = load_texts(artifact)
    tokenizer = Tokenizer(files, name=artifact.name)

    def chats(path: Path) -> list[Text]:
        made = []
        for number, messages in enumerate(read_chats(path), 1):
            text = chat_text(tokenizer, messages, template=files.chat_template is not None)
            if len(text) > limit:
                raise UsageError(f"{path}, chat {number}: {len(text)} tokens, at most {limit}")
            made.append(text)
        return made

    learned = chats(wanted.data)
    if wanted.held is not None:
        return replace(material, chats=learned, held_chats=chats(wanted.held))
    learned, back = _split(learned, rng)
    return replace(material, chats=learned, held_chats=back)


def _split(texts: Sequence[Text], rng: np.random.Generator) -> tuple[list[Text], list[Text]]:
    """All but one in ten, and that one."""
    if len(texts) < 2:
        raise UsageError(f"{len(texts)} text is too few: one must be held back")
    order = rng.permutation(len(texts))
    n = max(1, len(texts) // _HELD_SHARE)
    return [texts[i] for i in order[n:]], [texts[i] for i in order[:n]]


def _up_to(texts: Sequence[Text], tokens: int) -> list[Text]:
    kept: list[Text] = []
    for text in texts:
        if kept and tokens < len(text):
            break
        kept.append(text)
        tokens -= len(text)
    return kept


def _written(
    wanted: Wanted, settings: Settings, limit: int, progress: Progress | None
) -> tuple[list[Text], list[Text]]:
    """What the source writes: it is run in 8 bits or in its own grid, which is next to exact."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            writer = open_artifact(artifact_path(wanted.source, "import"))
        except (ArtifactError, OSError):
            # A split head would take minutes to fit, and is not used here.
            place = Path(folder) / "source.fl"
            writer = make_artifact(wanted.source, "import", place, head="off", progress=progress)
        return _kept_texts(writer, wanted, settings, limit, progress)


def _kept_texts(
    writer: Artifact,
    wanted: Wanted,
    settings: Settings,
    limit: int,
    progress: Progress | None,
) -> tuple[list[Text], list[Text]]:
    """The same texts every time, written once."""
    share = max(limit, wanted.tokens // _HELD_SHARE)
    identity = json.dumps([writer.digest, wanted.tokens, limit, settings.seed])
    name = f"texts-{blake3(identity.encode()).hexdigest()[:16]}.json"
    path = paths.private_dir(paths.cache_dir() / "finetune") / name
    if path.exists():
        kept = json.loads(path.read_text())
    else:
        kept = []
        for tokens, held in ((wanted.tokens, False), (share, True)):
            stage = "write held-out texts" if held else "write texts"
            kept.append(
                sample_texts(
                    writer, tokens, length=limit, seed=settings.seed, held=held,
                    progress=_stage(progress, stage),
                )
            )  # fmt: skip
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps(kept))
        new.replace(path)
    texts, held_texts = ([plain_text(ids) for ids in several] for several in kept)
    return texts, held_texts


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _key(wanted: Wanted, settings: Settings, material: Material, engine: str) -> str:
    """Names a run: what an equal one left may be gone on with."""
    hasher = blake3()
    recipe = asdict(replace(settings, max_seconds=None))
    facts = [_RECIPE, base_digest(wanted.artifact), wanted.artifact.provenance["sha256"], engine]
    hasher.update(json.dumps([*facts, str(wanted.source.path), recipe]).encode())
    sets = {
        "texts": material.texts,
        "held": material.held,
        "chats": material.chats,
        "held chats": material.held_chats,
        **material.others,
    }
    for name, texts in sets.items():
        hasher.update(f"\0{name} {len(texts)}".encode())
        for text in texts:
            hasher.update(len(text).to_bytes(8, "little"))
            hasher.update(text.ids.tobytes()).update(text.learn.tobytes())
    return hasher.hexdigest()[:32]


def _made(wanted: Wanted, settings: Settings, outcome: Outcome) -> dict[str, Any]:
    domain = {}
    if outcome.domain_before is not None and outcome.domain_after is not None:
        domain = {
            "domain": [outcome.domain_before.to_json(), outcome.domain_after.to_json()],
            "data": wanted.data.name if wanted.data is not None else "",
        }
    return {
        "purpose": "heal" if wanted.data is None else "domain",
        "source": wanted.source.name,
        "texts": "written by the source" if wanted.config is None else wanted.config.name,
        "tokens": wanted.tokens,
        "seed": settings.seed,
        "steps": outcome.steps,
        "rate": settings.rate,
        "quality": {
            name: [outcome.before[name].to_json(), outcome.after[name].to_json()]
            for name in outcome.before
        },
        **domain,
    }
