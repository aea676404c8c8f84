"""Texts a model writes: as long as asked, of its vocabulary, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashlite.artifact.format import Artifact
from flashlite.checkpoint.pull import pull
from flashlite.runtime.prepare import make_artifact
from flashlite.runtime.texts import sample_texts


@pytest.fixture(scope="module")
def chatty(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny random llama with its tokenizer and template."""
    folder = tmp_path_factory.mktemp("texts") / "tiny.fl"
    return make_artifact(pull(str(tiny_gguf)), "import", folder, head="off")


def test_texts_are_those_of_their_seed(chatty: Artifact) -> None:
    seen: list[int] = []
    texts = sample_texts(chatty, 900, length=48, progress=lambda done, _: seen.append(done))
    assert sum(map(len, texts)) >= 900 * 0.8
    assert all(16 <= len(ids) <= 48 for ids in texts)
    assert all(0 <= i < chatty.spec.vocab_size for ids in texts for i in ids)
    assert seen == sorted(seen)
    assert seen[-1] == 900
    assert sample_texts(chatty, 900, length=48) == texts
    assert sample_texts(chatty, 900, length=48, seed=1) != texts
    held = sample_texts(chatty, 900, length=48, held=True)
    assert not {tuple(ids[:12]) for ids in held} & {tuple(ids[:12]) for ids in texts}
