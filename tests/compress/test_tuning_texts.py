"""Chats become ids of which the answers count; texts become batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashlite.checkpoint.convert_tokenizer import build_tokenizer
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.tokenizer import Tokenizer
from flashlite.compress.tuning_texts import (
    Text,
    answers,
    batches,
    chat_text,
    plain_prompt,
    plain_text,
    sequences,
)
from flashlite.errors import UsageError

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes ?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good bye"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf: Path) -> Tokenizer:
    return Tokenizer(build_tokenizer(open_checkpoint(tiny_gguf)))


def learned(tokenizer: Tokenizer, text: Text) -> list[str]:
    """The spans of ids that are learned, as text."""
    ids, learn = text.ids, text.learn
    rows = np.flatnonzero(learn)
    spans = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return [tokenizer.decode([int(i) for i in ids[span + 1]]) for span in spans]


def test_the_answers_of_a_template_count_with_their_end(tokenizer: Tokenizer) -> None:
    text = chat_text(tokenizer, TALK, template=True)
    whole = tokenizer.render_chat(TALK, add_generation_prompt=False)
    assert [int(i) for i in text.ids] == whole[: len(text.ids)]
    assert int(text.ids[-1]) in tokenizer.tokens.eos
    spans = learned(tokenizer, text)
    assert len(spans) == 2
    assert spans[0].strip().startswith("Yes ?")
    assert spans[1].strip().startswith("Good bye")
    assert not text.learn[-1]
    assert text.label == "Good bye"


def test_the_plain_layout_is_what_is_documented(tokenizer: Tokenizer) -> None:
    assert plain_prompt(TALK[:3]) == "User: Hi\nAssistant: Yes ?\nUser: Bye\nAssistant:"
    text = chat_text(tokenizer, TALK, template=False)
    prompt = tokenizer.encode_prompt(plain_prompt(TALK[:3]))
    assert [int(i) for i in text.ids[: len(prompt)]] == prompt
    assert int(text.ids[-1]) == tokenizer.tokens.eos[0]
    spans = learned(tokenizer, text)
    assert spans[0].strip() == "Yes ?"
    assert spans[1].strip().startswith("Good bye")


def test_a_chat_without_an_answer_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="must end with a message of role `assistant`"):
        chat_text(tokenizer, TALK[:3], template=False)


def test_labels_are_a_tree() -> None:
    def labelled(*ids: int) -> Text:
        text = plain_text([9, 9, *ids])
        learn = text.learn.copy()
        learn[0] = False
        return Text(text.ids, learn)

    tree = answers(
        [
            labelled(1, 2),
            labelled(1, 3),
            labelled(
                4,
            ),
        ]
    )
    assert tree.following == {(): (1, 4), (1,): (2, 3)}


@pytest.mark.parametrize("most", [1, 10, 64])
def test_batches_hold_every_text_once_and_no_more_than_they_may(most: int) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 40, 50)]
    groups = batches(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(50))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most


def test_sequences_are_cut() -> None:
    found = [[int(i) for i in text.ids] for text in sequences([[1, 2, 3, 4, 5], [6, 7]], 10, 3)]
    assert found == [[1, 2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("ids", [[1, 10], [-1, 2]])
def test_ids_of_another_model_are_refused(ids: list[int]) -> None:
    with pytest.raises(UsageError, match="an id that the model does not have"):
        sequences([ids], 10, 3)
