"""`Text`: ids to tune on or to measure on, and how they are put into batches.

A chat of a domain teaches what its answers say; any other text teaches what the source model would
have said at every position. Chats come from a file of JSON lines:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

A model without a chat template gets this plain layout, with `Role: content` lines and the model's
end-of-text token behind every answer; a prompt to it ends with `Assistant:`.

    User: I lost my card
    Assistant: lost_or_stolen_card<eos>
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashlite.errors import UsageError

__all__ = [
    "Answers",
    "ChatTokenizer",
    "Text",
    "answers",
    "batches",
    "chat_text",
    "plain_prompt",
    "plain_text",
    "read_chats",
    "sequences",
]

_MAX_FILE = 1 << 30  # bytes of a file of chats
_MAX_CHATS = 1_000_000

Ids = NDArray[np.int32]
_Message = dict[str, str]


class ChatTokenizer(Protocol):
    """What is needed of `checkpoint.tokenizer.Tokenizer`."""

    tokens: Any

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text."""

    def render_chat(
        self, messages: Sequence[Any], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a chat."""


@dataclass(frozen=True)
class Text:
    """One text; row t of the model's output scores ids[t + 1].

    Attributes:
        ids: int32 [n].
        learn: bool [n], the rows that count; the last never does.
        label: the last answer of a chat, "" for other texts.
    """

    ids: Ids
    learn: NDArray[np.bool_]
    label: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Answers:
    """The labels of a domain as a tree: after these ids of an answer, these may follow."""

    following: dict[tuple[int, ...], tuple[int, ...]]


def plain_text(ids: Sequence[int]) -> Text:
    """A text of which every row counts.

    Raises:
        UsageError: it has fewer than two tokens.
    """
    if len(ids) < 2:
        raise UsageError(f"a text of {len(ids)} tokens teaches nothing; at least 2 are needed")
    learn = np.ones(len(ids), np.bool_)
    learn[-1] = False
    return Text(np.array(ids, np.int32), learn)


def plain_prompt(messages: Sequence[_Message]) -> str:
    """A chat for a model without a template, ready for the next answer."""
    lines = [f"{m['role'].capitalize()}: {m['content'].strip()}\n" for m in messages]
    return "".join([*lines, "Assistant:"])


def chat_text(tokenizer: ChatTokenizer, messages: Sequence[_Message], *, template: bool) -> Text:
    """A chat of which the assistant's answers count.

    Args:
        tokenizer: the model's.
        messages: the last is the assistant's.
        template: lay it out by the model's chat template; False: by the plain layout.

    Raises:
        UsageError: there is no answer, or its place in the laid out chat cannot be told.
        TemplateError, TokenizerError: as the tokenizer.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UsageError("a chat to learn from must end with a message of role `assistant`")
    whole, _ = _layout(tokenizer, messages, template=template)
    eos = tokenizer.tokens.eos if template else ()
    learn = np.zeros(len(whole), np.bool_)
    end = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        until, start = _layout(tokenizer, messages[: i + 1], template=template)
        if whole[:start] != until[:start]:
            raise UsageError("the chat template does not keep what came before an answer as it was")
        last = i + 1 == len(messages)
        end = len(until) if last or template else len(until) - 1  # plain: `eos` ends the last only
        end = next((j + 1 for j in range(start, end) if whole[j] in eos), end)
        learn[start - 1 : end - 1] = True
    return Text(np.array(whole[:end], np.int32), learn[:end], messages[-1]["content"].strip())


def _layout(
    tokenizer: ChatTokenizer, messages: Sequence[_Message], *, template: bool
) -> tuple[list[int], int]:
    """The ids of a chat, and where its last answer begins."""
    if template:
        prompt = tokenizer.render_chat(messages[:-1])
        ids = tokenizer.render_chat(messages, add_generation_prompt=False)
    else:
        text = plain_prompt(messages[:-1])
        prompt = tokenizer.encode_prompt(text)
        ids = tokenizer.encode_prompt(f"{text} {messages[-1]['content'].strip()}")
        ids += tokenizer.tokens.eos[:1]
    if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
        raise UsageError("the answer of a chat cannot be told from what stands before it")
    return ids, len(prompt)


def read_chats(path: Path) -> list[list[_Message]]:
    """The chats of a file of JSON lines.

    Raises:
        UsageError: it cannot be read, is too large, or a line is no chat; the line is named.
    """
    from flashlite.checkpoint.chat import check_messages

    try:
        size = path.stat().st_size
        if size > _MAX_FILE:
            raise UsageError(f"{path}: {size} bytes, at most {_MAX_FILE} are read")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    chats: list[list[_Message]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or "messages" not in value:
                raise UsageError("not an object with `messages`")
            chats.append(check_messages(value["messages"]))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: not JSON: {error}") from None
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        if chats[-1][-1]["role"] != "assistant":
            raise UsageError(f"{path}, line {number}: the chat must end with an assistant's answer")
        if len(chats) > _MAX_CHATS:
            raise UsageError(f"{path}: more than {_MAX_CHATS} chats")
    if not chats:
        raise UsageError(f"{path}: holds no chat")
    return chats


def sequences(found: Sequence[Sequence[int]], vocab_size: int, most: int) -> list[Text]:
    """Texts of calibration ids.

    Args:
        found: ids, text by text.
        vocab_size: ids are below it.
        most: tokens of one text; what is longer is cut into several.

    Raises:
        UsageError: an id is none of this model.
    """
    texts = []
    for ids in found:
        if not all(0 <= i < vocab_size for i in ids):
            raise UsageError("a calibration text holds an id that the model does not have")
        texts += [plain_text(ids[at : at + most]) for at in range(0, len(ids) - 1, most)]
    return texts


def answers(texts: Sequence[Text]) -> Answers:
    """The tree of the answers that these chats end with."""
    following: dict[tuple[int, ...], set[int]] = {}
    for text in texts:
        ids = _last_answer(text)
        for i in range(len(ids)):
            following.setdefault(tuple(ids[:i]), set()).add(ids[i])
    return Answers({key: tuple(sorted(value)) for key, value in following.items()})


def _last_answer(text: Text) -> list[int]:
    rows = np.flatnonzero(text.learn)
    breaks = np.flatnonzero(np.diff(rows) > 1)
    start = rows[breaks[-1] + 1] if len(breaks) else rows[0]
    return [int(i) for i in text.ids[start + 1 : rows[-1] + 2]]


def batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of texts that go together: of similar length, at most `most` positions, padding too.

    Texts are padded on the right to the longest; causal attention never looks there.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] * (len(groups[-1]) + 1) <= most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
