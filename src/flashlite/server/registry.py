"""The models of one server, under one memory ledger, found by name.

    ServerConfig ── open_registry ──> Registry ── chat(name), embedder(name) ──> Model, Encoder

With a ceiling, what is left after all weights and vocabularies is divided evenly between the
models for their contexts: each is opened with the others' shares reserved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from flashlite.artifact.format import TOKENIZER, Artifact
from flashlite.codegen.target import host_target
from flashlite.errors import BodyError, UnknownModel, UsageError
from flashlite.runtime.ceiling import within
from flashlite.runtime.encoder import Encoder, load_encoder
from flashlite.runtime.engine import default_threads
from flashlite.runtime.memory import TEMPLATE_BYTES, TOKENIZER_GROWTH, parse_size
from flashlite.runtime.model import Model, open_model
from flashlite.runtime.prepare import Progress, find_artifact
from flashlite.runtime.process import resident_bytes
from flashlite.server.config import ServerConfig

__all__ = ["Registry", "open_registry"]

# Terms of a ledger that are resident once the model is open, or that its neighbours count too.
_COUNTED = frozenset({"weights", "screen", "runtime", "margin", "server"})


class Registry:
    """The open models of a server; `close` releases them."""

    def __init__(
        self, models: Sequence[Model], encoder: Encoder | None = None, *, max_mem: int | None = None
    ) -> None:
        """The first model answers requests that name none.

        Raises:
            UsageError: there is none, or two have one name.
        """
        names = [model.name for model in models] + ([encoder.name] if encoder else [])
        if not names:
            raise UsageError("nothing to serve: name a model, or an encoder with --embed")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{twice[0]} is named twice; a name must mean one model")
        self.models: Mapping[str, Model] = {model.name: model for model in models}
        self.encoder = encoder
        self.max_mem = max_mem

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models, the encoder last."""
        return (*self.models, *((self.encoder.name,) if self.encoder else ()))

    def chat(self, name: str) -> Model:
        """The model that answers, "" for the first.

        Raises:
            UnknownModel: it is not served here.
            BodyError: it is an encoder, or only an encoder is served.
        """
        if not name and self.models:
            return next(iter(self.models.values()))
        if name in self.models:
            return self.models[name]
        if self.encoder is not None and name in ("", self.encoder.name):
            raise BodyError(
                "model", f"{self.encoder.name} is an encoder: it embeds and does not answer"
            )
        raise UnknownModel(name, list(self.models) or self.names)

    def embedder(self, name: str) -> Encoder:
        """The encoder, "" for it as well.

        Raises:
            UnknownModel: it is not served here.
            BodyError: no encoder is served, or the name is another model's.
        """
        if self.encoder is None:
            raise BodyError(
                "model",
                "this server has no encoder: start it with --embed all-minilm-l6-v2",
            )
        if name in self.models:
            raise BodyError("model", f"{name} does not embed; use {self.encoder.name}")
        if name and name != self.encoder.name:
            raise UnknownModel(name, [self.encoder.name])
        return self.encoder

    @property
    def memory(self) -> dict[str, Any]:
        """Bytes: what the process may hold, holds now and held at most, and each model's plan."""
        plans = {name: model.memory for name, model in self.models.items()}
        if self.encoder is not None:
            plans[self.encoder.name] = self.encoder.memory
        return {
            "max_mem": self.max_mem,
            "resident": resident_bytes(),
            "peak": resident_bytes("VmHWM"),
            "models": plans,
        }

    def close(self) -> None:
        """Release everything; calling it again does nothing."""
        for model in self.models.values():
            model.close()
        if self.encoder is not None:
            self.encoder.close()


def open_registry(
    config: ServerConfig, reserved: Mapping[str, int], progress: Progress | None = None
) -> Registry:
    """Open all models of a server.

    Args:
        config: which, and what they may take together.
        reserved: bytes that the server takes beside them, by name.
        progress: as `flashlite.load`.

    Raises:
        FlashliteError: as `flashlite.load`.
    """
    ceiling = None if config.max_mem is None else parse_size(config.max_mem)
    with ExitStack() as opened:
        encoder = None
        if config.embed is not None:
            encoder = opened.enter_context(
                load_encoder(
                    config.embed,
                    max_mem=ceiling,
                    threads=config.threads,
                    enable_integrity_check=config.enable_integrity_check,
                    accept_license=config.accept_license,
                    offline=config.offline,
                    isa=config.isa,
                    progress=progress,
                )
            )
        with within(ceiling, "found or made", default_threads()):
            artifacts = [_find(name, config, progress) for name in config.models]
        models: list[Model] = []
        for i, artifact in enumerate(artifacts):
            taken = dict(reserved)
            if encoder is not None:
                taken[encoder.name] = _still_to_come(encoder.memory["terms"])
            for model in models:
                taken[model.name] = _still_to_come(model.plan.terms, taken)
            taken |= _shares(artifacts[i:], ceiling, sum(taken.values()))
            models.append(
                opened.enter_context(
                    open_model(
                        artifact,
                        host_target(config.isa),
                        max_mem=ceiling,
                        max_sequence_length=config.max_sequence_length,
                        enable_integrity_check=config.enable_integrity_check,
                        threads=config.threads,
                        max_sequences=config.max_sequences,
                        prefix_cache=config.prefix_cache,
                        speculate=config.speculate,
                        exact_head=config.exact_head,
                        reserved=taken,
                    )
                )
            )
        registry = Registry(models, encoder, max_mem=ceiling)
        opened.pop_all()
        return registry


def _find(name: str, config: ServerConfig, progress: Progress | None) -> Artifact:
    return find_artifact(
        name,
        preset=config.preset,
        check=config.enable_integrity_check,
        accept_license=config.accept_license,
        offline=config.offline,
        progress=progress,
    )


def _still_to_come(terms: Mapping[str, int], shared: Iterable[str] = ()) -> int:
    """Of an open model's terms: what it may touch later, and no neighbour has counted."""
    counted = _COUNTED.union(shared)
    return sum(size for name, size in terms.items() if name not in counted)


def _shares(artifacts: Sequence[Artifact], ceiling: int | None, taken: int) -> dict[str, int]:
    """What the models behind the first will take, the even part of what is left included."""
    if ceiling is None or len(artifacts) == 1:
        return {}
    fixed = [
        a.weights_size + a.manifest.files[TOKENIZER].size * TOKENIZER_GROWTH + TEMPLATE_BYTES
        for a in artifacts
    ]
    left = max(0, ceiling - resident_bytes() - taken - sum(fixed))
    share = left // len(artifacts)
    return {a.name: size + share for a, size in zip(artifacts[1:], fixed[1:], strict=True)}
