"""Texts that the model writes or the user gives, and what is held back of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from flashlite.analyze.calibration import Job, from_file, from_model
from flashlite.analyze.openings import LANGUAGES, OPENINGS
from flashlite.checkpoint.convert_tokenizer import build_tokenizer
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.errors import UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf: Path) -> Tokenizer:
    return Tokenizer(build_tokenizer(open_checkpoint(tiny_gguf)))


class Writes:
    """A sampler whose texts say which job they are of; some end early."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> list[list[int]]:
        self.jobs += jobs
        texts = []
        for job in jobs:
            n = job.length if job.seed % 3 else len(job.ids) + 1
            texts.append([*job.ids, *[job.seed % 200] * max(0, n - len(job.ids))])
        return texts


def test_openings_cover_the_languages() -> None:
    languages = [opening.language for opening in OPENINGS]
    assert len(set(languages)) == len(languages)
    assert set(LANGUAGES) <= set(languages)
    assert len(LANGUAGES) == 12
    for opening in OPENINGS:
        assert opening.texts[0] != opening.texts[1]
        assert opening.questions[0] != opening.questions[1]


def test_the_model_writes_as_much_as_was_asked(tokenizer: Tokenizer) -> None:
    writes = Writes()
    reports: list[tuple[int, int]] = []
    found = from_model(
        tokenizer, writes, seed=5, tokens=4096, held_back=512, length=128,
        progress=lambda done, total: reports.append((done, total)),
    )  # fmt: skip
    assert [len(ids) for ids in found.sequences] == [128] * 32
    assert [len(ids) for ids in found.held_back] == [128] * 4
    assert found.source == "model"
    assert reports[-1] == (4608, 4608)
    assert len({job.seed for job in writes.jobs}) == len(writes.jobs)
    assert {job.temperature for job in writes.jobs} == {0.7, 1.0}
    again = from_model(tokenizer, Writes(), seed=5, tokens=4096, held_back=512, length=128)
    assert again == found
    other = from_model(tokenizer, Writes(), seed=6, tokens=4096, held_back=512, length=128)
    assert other.sequences != found.sequences


def test_what_is_held_back_begins_otherwise(tokenizer: Tokenizer) -> None:
    writes = Writes()
    from_model(tokenizer, writes, seed=0, tokens=2048, held_back=512, length=128)
    first = {job.ids for job in writes.jobs if job.length == 64}
    second = {job.ids for job in writes.jobs if job.length == 56}
    assert len(first) > 20
    assert len(second) > 20
    chats = 3  # scaffolding that is cut to one beginning
    assert len(first & second) <= chats


def test_a_text_is_cut_into_sequences(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    lines = (f"In year {n} the lighthouse shone {n * n} times." for n in range(300))
    path.write_text("\n".join(lines), encoding="utf-8")
    found = from_file(path, tokenizer, seed=0, tokens=1024, held_back=256, length=64)
    assert found.source == "text.txt"
    assert len(found.sequences) == 16
    assert len(found.held_back) == 4
    assert {len(ids) for ids in (*found.sequences, *found.held_back)} == {64}
    assert not set(found.sequences) & set(found.held_back)


def test_chats_go_through_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi!"}]
    lines = [{"messages": turns}, turns, {"text": "plain words " * 40}] * 20
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    found = from_file(path, tokenizer, seed=0, tokens=512, held_back=128, length=64)
    chat = tuple(tokenizer.render_chat(turns, add_generation_prompt=False))
    rows = (*found.sequences, *found.held_back)
    assert any(row[: len(chat)] == chat for row in rows)
    assert found.held_back


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"too short", "give more text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b"{oops", "line 1: not JSON"),
        ("a.jsonl", b'\n{"x": 1}', "line 2: needs an object"),
        ("a.jsonl", b'{"messages": [{"role": "king", "content": "x"}]}', "line 1: .*king"),
        ("a.jsonl", b"[" * 100000, "line 1"),
    ],
)
def test_a_bad_file_is_one_line(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        from_file(path, tokenizer, seed=0, tokens=1024, held_back=256, length=64)
