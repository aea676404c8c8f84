"""Chats: the messages, the template that lays them out, and what keeps the two apart.

    messages ── check_messages ── disarm ── ChatTemplate.render ── Spans.restore ── text and spans

`disarm` puts a private-use letter in the place of each control spelling inside a message before the
template sees it; `Spans.restore` puts the spellings back and says where they lie, so that nothing
there is matched as a control token. Templates come with the model and run in a `sandbox`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flashlite.checkpoint.sandbox import compile_program
from flashlite.errors import TemplateError, UsageError

__all__ = ["ROLES", "ChatTemplate", "Message", "Spans", "check_messages", "disarm", "harmless"]

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]

_MAX_MESSAGES = 10_000
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


def check_messages(messages: object) -> list[Message]:
    """Messages as plain dictionaries of `role` and `content`.

    Raises:
        UsageError: there is none, or one has another key, an unknown role, or content that is not
            text.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UsageError(f"messages are {type(messages).__name__}, not a list of messages")
    if not messages:
        raise UsageError("there are no messages; give at least one of role `user`")
    if len(messages) > _MAX_MESSAGES:
        raise UsageError(f"there are {len(messages)} messages, allowed {_MAX_MESSAGES}")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UsageError(f"message {index} is {type(message).__name__}, not an object")
        if extra := sorted(str(key) for key in message if key not in ("role", "content")):
            raise UsageError(
                f"message {index} has the unknown key {extra[0][:40]!r}; known are role and content"
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise UsageError(
                f"message {index} has the role {str(role)[:40]!r}; known are {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise UsageError(
                f"message {index} has content of type {type(content).__name__}, not text"
            )
        checked.append({"role": role, "content": content})
    return checked


@dataclass(frozen=True)
class Spans:
    """The letters that stand for control spellings while a template runs."""

    spellings: Mapping[str, str]  # letter -> what it stands for

    def restore(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """Put the spellings back; also where each lies: (start, end), in order."""
        if not self.spellings:
            return rendered, []
        parts: list[str] = []
        masked: list[tuple[int, int]] = []
        length = 0
        for part in re.split(f"([{''.join(self.spellings)}])", rendered):
            if spelling := self.spellings.get(part):
                masked.append((length, length + len(spelling)))
                part = spelling
            parts.append(part)
            length += len(part)
        return "".join(parts), masked


def disarm(
    messages: Sequence[Message],
    find: Callable[[str], Iterable[tuple[int, int]]],
    template_source: str,
) -> tuple[list[Message], Spans]:
    """Put one private-use letter in the place of each control spelling inside the messages.

    Args:
        messages: checked messages.
        find: where a text spells control tokens: (start, end), in order, apart from each other.
        template_source: its letters are not used either.

    Raises:
        TemplateError: the messages hold every private-use letter.
    """
    letters: dict[str, str] = {}
    unused: Iterator[str] | None = None
    safe = []
    for message in messages:
        text, position, parts = message["content"], 0, []
        for start, end in find(text):
            spelling = text[start:end]
            if spelling not in letters:
                unused = unused or _unused_letters(messages, template_source)
                letters[spelling] = _next_letter(unused)
            parts += [text[position:start], letters[spelling]]
            position = end
        safe.append({**message, "content": "".join([*parts, text[position:]])})
    return safe, Spans({letter: spelling for spelling, letter in letters.items()})


def harmless(messages: Sequence[Message], template_source: str) -> list[Message]:
    """The same chat with texts that spell nothing.

    A blank text stays as it is, because templates ask whether there is any; every other becomes a
    single letter that occurs nowhere else.

    Raises:
        TemplateError: the messages hold every private-use letter.
    """
    letter = _next_letter(_unused_letters(messages, template_source))
    return [{**m, "content": letter if m["content"].strip() else m["content"]} for m in messages]


class ChatTemplate:
    """A checked, compiled chat template.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
        >>> template.render([{"role": "user", "content": "Hi"}])
        'Hi'
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Check and compile.

        Raises:
            TemplateError: the source is too long, is not Jinja, or uses what is not allowed.
        """
        self.source = source
        self._program = compile_program(source)
        self._variables = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "tools": None,
            "documents": None,
        }

    @property
    def literals(self) -> tuple[str, ...]:
        """Every text that stands in the source."""
        return self._program.literals

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a chat, scaffolding included.

        Raises:
            TemplateError: the template refuses the messages, fails, or uses more steps, time or
                memory than it may.
        """
        variables = {
            **self._variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        return self._program.run(
            variables,
            values=len(messages),
            characters=sum(len(message["content"]) for message in messages),
        )


def _unused_letters(messages: Sequence[Message], template_source: str) -> Iterator[str]:
    used = set(template_source).union(*(message["content"] for message in messages))
    return (chr(code) for code in _PRIVATE_USE if chr(code) not in used)


def _next_letter(letters: Iterator[str]) -> str:
    letter = next(letters, None)
    if letter is None:
        raise TemplateError(
            f"the messages hold all {len(_PRIVATE_USE)} private-use characters; remove some"
        )
    return letter
