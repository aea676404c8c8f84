"""Fetch a model from a hub of repositories: `hf:ORG/NAME[@REVISION][:FILE.gguf]`.

Only weights without code are taken: safetensors or one GGUF file, with the JSON, the tokenizer
and the template beside them. The hub library downloads and resumes; what came is checked here
against the sizes and digests the repository declares. HF_ENDPOINT chooses the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from flashlite.checkpoint.fetch import Progress, check_space, sha256_file, watch
from flashlite.errors import PullError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

__all__ = ["HubFile", "Repository", "Snapshot", "describe_snapshot", "fetch_snapshot", "parse"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"hf:(?P<org>{_PART})/(?P<name>{_PART})"
    rf"(?:@(?P<revision>{_PART}(?:/{_PART})*))?"
    rf"(?::(?P<file>{_PART}(?:/{_PART})*\.gguf))?"
)
_BESIDE = (".json", ".jinja")  # taken with the weights when they lie at the top
_BESIDE_NAMES = ("tokenizer.model", "1_Pooling/config.json")
_SMALL = 200_000_000  # bytes; nothing beside the weights is larger


@dataclass(frozen=True)
class Repository:
    """Which files of which repository are wanted."""

    org: str
    name: str
    revision: str | None
    file: str | None  # one GGUF file among several

    @property
    def id(self) -> str:
        """The repository as the hub names it."""
        return f"{self.org}/{self.name}"

    @property
    def label(self) -> str:
        """A name fit for a folder."""
        stem = f"--{PurePosixPath(self.file).stem}" if self.file else ""
        return f"{self.org}--{self.name}{stem}"

    @property
    def folder(self) -> str:
        """Where it goes, below the folder of hub models."""
        revision = f"@{self.revision.replace('/', '--')}" if self.revision else ""
        return f"{self.org}/{self.name}{revision}"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, as the repository declares it."""

    name: str
    size: int  # bytes
    sha256: str | None  # large files only


@dataclass(frozen=True)
class Snapshot:
    """What was fetched."""

    files: tuple[HubFile, ...]
    commit: str
    licence: str | None


def parse(reference: str) -> Repository:
    """Read `hf:ORG/NAME[@REVISION][:FILE.gguf]`.

    Raises:
        PullError: it is written otherwise.
    """
    match = _REFERENCE.fullmatch(reference)
    if not match or ".." in reference:
        raise PullError(
            f"{reference[:200]!r} is not hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:ORG/NAME:FILE.gguf"
        )
    return Repository(**match.groupdict())


def fetch_snapshot(wanted: Repository, folder: Path, progress: Progress) -> Snapshot:
    """Bring the weights and what belongs to them into `folder`.

    Raises:
        PullError: the repository is missing or closed, holds nothing flashlite reads, the
            network or the disk failed, or a file is not as declared.
    """
    with _explained(wanted):
        snapshot = _describe(wanted)
        _download(wanted, snapshot, folder, progress)
    for file in snapshot.files:
        _check(folder, file)
    return snapshot


def describe_snapshot(wanted: Repository) -> Snapshot:
    """What `fetch_snapshot` would bring, as the repository declares it; nothing is fetched.

    Raises:
        PullError: as `fetch_snapshot`.
    """
    with _explained(wanted):
        return _describe(wanted)


def _describe(wanted: Repository) -> Snapshot:
    from huggingface_hub import HfApi

    info = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(
        wanted.id, revision=wanted.revision, files_metadata=True
    )
    return _chosen(wanted, info)


@contextmanager
def _explained(wanted: Repository) -> Iterator[None]:
    """Turn what the hub library raises into one line."""
    import httpx2
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError:
        raise PullError(
            f"hf:{wanted.id} asks for its terms to be accepted: accept them on its page, "
            "then `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise PullError(
            f"hf:{wanted.id} does not exist, or is private: check the name, or set HF_TOKEN"
        ) from None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PullError(
            f"could not fetch hf:{wanted.id} ({reason[0][:200]}): check the network and "
            "HF_ENDPOINT, then pull again; what has come is kept"
        ) from error


def _chosen(wanted: Repository, info: ModelInfo) -> Snapshot:
    if not info.sha:
        raise PullError(f"hf:{wanted.id}: the hub names no commit")
    files = [_hub_file(sibling) for sibling in info.siblings or ()]
    weights = _weights(wanted, files)
    beside = [
        file
        for file in files
        if (("/" not in file.name and file.name.endswith(_BESIDE)) or file.name in _BESIDE_NAMES)
        and file.size <= _SMALL
    ]
    licence = getattr(info.card_data, "license", None)
    return Snapshot((*weights, *beside), info.sha, str(licence) if licence else None)


def _hub_file(sibling: Any) -> HubFile:
    lfs = sibling.lfs
    return HubFile(sibling.rfilename, int(sibling.size or 0), lfs.sha256 if lfs else None)


def _weights(wanted: Repository, files: Sequence[HubFile]) -> list[HubFile]:
    top = [file for file in files if "/" not in file.name]
    gguf = [file for file in files if file.name.endswith(".gguf")]
    if wanted.file:
        if not (found := [file for file in gguf if file.name == wanted.file]):
            raise PullError(f"hf:{wanted.id} holds no {wanted.file}: it has {_names(gguf)}")
        return found
    if tensors := [file for file in top if file.name.endswith(".safetensors")]:
        return tensors
    if len(gguf) > 1:
        raise PullError(
            f"hf:{wanted.id} holds {len(gguf)} GGUF files: choose one as "
            f"hf:{wanted.id}:FILE among {_names(gguf)}"
        )
    if not gguf:
        raise PullError(f"hf:{wanted.id} holds neither safetensors nor GGUF files")
    return gguf


def _names(files: Iterable[HubFile]) -> str:
    names = sorted(file.name for file in files)
    shown = ", ".join(names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "none"


def _download(wanted: Repository, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
    from huggingface_hub import snapshot_download
    from tqdm import tqdm

    class Quiet(tqdm):  # type: ignore[misc]
        """The library draws no bars of its own."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    total = sum(file.size for file in snapshot.files)
    folder.mkdir(parents=True, exist_ok=True)
    held = _held(folder)
    check_space(folder, max(0, total - held))
    with watch(lambda: _held(folder), 0, total, progress):
        snapshot_download(
            wanted.id,
            revision=snapshot.commit,
            local_dir=folder,
            allow_patterns=[_literal(file.name) for file in snapshot.files],
            endpoint=os.environ.get("HF_ENDPOINT"),
            max_workers=2,
            tqdm_class=Quiet,
        )
    progress(total, total)


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check(folder: Path, file: HubFile) -> None:
    path = folder / file.name
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise PullError(f"{file.name} was not fetched: pull again")
    size = path.stat().st_size
    if size != file.size or (file.sha256 and sha256_file(path) != file.sha256):
        path.unlink()
        raise PullError(f"{file.name} differs from what the hub declares: removed; pull again")
