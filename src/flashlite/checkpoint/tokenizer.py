"""Text to token ids and back, at run time.

    TokenizerFiles ──> Tokenizer ──> encode(text)           ids of plain text
                                     encode_prompt(text)    the same behind BOS, if it is wanted
                                     render_chat(messages)  ids of a whole chat
                                     decode(ids), stream()  ids to text

A control token steers the model (`<|im_start|>`, `<eos>`); only the scaffolding of the model's own
chat template may produce one. Text never does, whatever it spells.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import tokenizers

from flashlite.errors import ForgeryError, MemoryCeiling, TemplateError, TokenizerError

if TYPE_CHECKING:
    from flashlite.checkpoint.chat import ChatTemplate

__all__ = [
    "BYTE_LETTERS",
    "SpecialTokens",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerFiles",
    "compact_json",
    "guarded",
    "load_library",
]

MAX_VOCABULARY = 1 << 22
_KNOWN_TOKENS = 1 << 13  # spellings kept: 1 MB, where all of a vocabulary would take 40
_T = TypeVar("_T")


def _byte_letters() -> tuple[str, ...]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in plain else next(spare)) for byte in range(256))


BYTE_LETTERS = _byte_letters()
_LETTER_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that mean something to the runtime.

    Attributes:
        bos: what a text begins with, None where the model has no such token.
        eos: every id that ends an answer: end of text, end of turn, end of message.
        add_bos: whether a prompt must begin with `bos`.
        control: ids that no text may become, in rising order.
    """

    bos: int | None
    eos: tuple[int, ...]
    add_bos: bool
    control: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> SpecialTokens:
        """Read what `to_json` wrote.

        Raises:
            TokenizerError: a key is unknown or missing, or a value has the wrong type.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise TokenizerError(f"special tokens: found {found}, expected {sorted(names)}")
        bos, add_bos = data["bos"], data["add_bos"]
        if bos is not None and not _is_id(bos):
            raise TokenizerError(f"special token bos is {bos!r}, not a token id")
        if not isinstance(add_bos, bool):
            raise TokenizerError(f"special token flag add_bos is {add_bos!r}, not true or false")
        if add_bos and bos is None:
            raise TokenizerError("special tokens ask for BOS and name none")
        for name in ("eos", "control"):
            ids = data[name]
            if not isinstance(ids, (list, tuple)) or not all(map(_is_id, ids)):
                raise TokenizerError(f"special tokens {name} is {ids!r:.80}, not a list of ids")
        return cls(bos, tuple(data["eos"]), add_bos, tuple(data["control"]))


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as an artifact keeps it."""

    tokenizer_json: bytes  # in the format of the `tokenizers` library; UTF-8
    chat_template: str | None  # Jinja source; None for a base model
    tokens: SpecialTokens


def guarded(action: Callable[[], _T], what: str) -> _T:
    """Run a call into the `tokenizers` library; its errors and panics become one kind.

    Raises:
        TokenizerError: the library refused or panicked.
    """
    try:
        return action()
    except BaseException as error:
        raise _library_error(error, what) from None


def _library_error(error: BaseException, what: str) -> TokenizerError:
    # A Rust panic reaches Python as a `BaseException`; interrupts must pass.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return TokenizerError(f"{what}: {error}")


def compact_json(document: object) -> bytes:
    """A `tokenizer.json` as `TokenizerFiles` keeps it.

    Raises:
        TokenizerError: a text in it holds half of a surrogate pair.
    """
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return guarded(text.encode, "tokenizer.json is no UTF-8")


def load_library(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    """Load a `tokenizer.json` so that special tokens are not matched in text.

    Raises:
        TokenizerError: the library cannot load it.
    """
    # Bytes are parsed where they lie; a `str` of them takes up to four times as much, twice.
    library = guarded(
        lambda: tokenizers.Tokenizer.from_buffer(tokenizer_json), "tokenizer.json cannot be loaded"
    )
    library.encode_special_tokens = True
    return library


class Tokenizer:
    """Encode and decode with one model's vocabulary; safe to share between threads.

    Example:
        >>> ids = tokenizer.encode("Hello")
        >>> tokenizer.decode(ids)
        'Hello'
    """

    def __init__(self, files: TokenizerFiles, *, name: str = "this model") -> None:
        """Load the vocabulary.

        Args:
            files: from `build_tokenizer_checked` or from a verified artifact.
            name: what errors call the model.

        Raises:
            TokenizerError: the files do not load, or a special id is outside the vocabulary.
        """
        self.name = name
        self.tokens = files.tokens
        self._template_source = files.chat_template
        self._library = load_library(files.tokenizer_json)
        self.vocab_size: int = self._library.get_vocab_size()
        if not 1 <= self.vocab_size <= MAX_VOCABULARY:
            raise TokenizerError(
                f"vocabulary has {self.vocab_size} tokens, allowed 1 to {MAX_VOCABULARY}"
            )
        added = self._library.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        self._control = frozenset(files.tokens.control)
        self._spell = _speller(self._library)
        self._bytes: dict[int, bytes] = {}
        self._most_text: int | None = None
        self._cached_text = 0  # bytes tokenized since the library's cache of words was cleared
        self._lock = threading.Lock()
        for id_ in (*files.tokens.control, *files.tokens.eos, files.tokens.bos):
            if id_ is not None and not self.spelling(id_):
                raise TokenizerError(f"special token {id_} is not one of {self.vocab_size} tokens")
        self._matcher = _ControlMatcher(
            {self.spelling(id_): id_ for id_ in files.tokens.control},
            strip_left={id_ for id_, token in added.items() if token.lstrip},
            strip_right={id_ for id_, token in added.items() if token.rstrip},
        )

    def with_limit(self, most: int) -> Tokenizer:
        """The same vocabulary for a process that must keep within a memory ceiling.

        It tokenizes at most `most` bytes of UTF-8 at once, and one text at a time: the library
        takes up to 400 bytes for each until it is done. The chat template is compiled now, so that
        what the tokenizer will hold it holds already.
        """
        limited = copy(self)
        limited._most_text = most
        limited._lock = threading.Lock()
        if self._template_source is not None:
            with suppress(TemplateError):  # told when a chat is asked for
                _ = limited._chat_template
        return limited

    # Text to ids

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: no BOS, and never a control token.

        Raises:
            TokenizerError: the text holds half of a surrogate pair, or the vocabulary is such that
                it would become a control token.
        """
        try:
            ids = self._encode(text)
        except (MemoryCeiling, MemoryError):
            raise
        except BaseException as error:
            if lone := _SURROGATE.search(text):
                raise TokenizerError(
                    f"text holds the lone surrogate U+{ord(lone[0]):04X} at character "
                    f"{lone.start()}, which is not Unicode; remove it"
                ) from None
            raise _library_error(error, "text cannot be tokenized") from None
        self._refuse_control(ids)
        return ids

    def encode_batch(self, texts: Sequence[str], *, parallel: bool = True) -> list[list[int]]:
        """`encode` of many texts; `parallel`: on all cores, unless memory has a ceiling.

        Raises:
            TokenizerError: as `encode`.
        """
        if not parallel or self._most_text is not None:
            return [self.encode(text) for text in texts]
        try:
            found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return [self.encode(text) for text in texts]  # says which text, and why
        batch: list[list[int]] = [encoding.ids for encoding in found]
        for ids in batch:
            self._refuse_control(ids)
        return batch

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued: BOS where the model wants it, then `encode`.

        Raises:
            TokenizerError: as `encode`.
        """
        return self._with_bos(self.encode(text))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a chat, laid out by the model's template.

        Control tokens come from the template alone. Where a message spells one, that span is
        tokenized as plain text; everything else is tokenized as the one string it is, so that
        merges across the border of scaffolding and message are kept.

        Args:
            messages: `{"role": "system" | "user" | "assistant" | "tool", "content": str}` each.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            UsageError: the messages are malformed.
            TemplateError: the model has no template, or it refused or failed.
            ForgeryError: the control tokens would differ from those of the same chat with
                harmless texts.
            TokenizerError: as `encode`.
        """
        from flashlite.checkpoint.chat import check_messages, disarm, harmless

        checked = check_messages(messages)
        if self._most_text is not None:
            self._check_length((message["content"] for message in checked), self._most_text)
        template = self._chat_template
        safe, spans = disarm(checked, self._matcher.find, template.source)
        text, masked = spans.restore(template.render(safe, add_generation_prompt))
        pieces = list(self._matcher.split(text, masked))
        plain = template.render(harmless(checked, template.source), add_generation_prompt)
        found = [piece for piece in pieces if isinstance(piece, int)]
        expected = [piece for piece in self._matcher.split(plain, ()) if isinstance(piece, int)]
        if found != expected:
            raise ForgeryError(
                "message text changes the control tokens of the chat: "
                f"{self._differ(found, expected)}; remove what spells them from the messages"
            )
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids.extend(self.encode(piece))
        return self._with_bos(ids)

    def find(self, text: str) -> int | None:
        """The id of the token the vocabulary spells exactly so, None where there is none."""
        return self._library.token_to_id(text)

    # Ids to text

    def token_bytes(self, id_: int) -> bytes:
        """What one token adds to the text: nothing for a control token or an unused id.

        Raises:
            TokenizerError: the id is negative.
        """
        known = self._bytes.get(id_)
        if known is None:
            if id_ < 0:
                raise TokenizerError(f"token id is {id_}, allowed 0 to {self.vocab_size - 1}")
            if len(self._bytes) >= _KNOWN_TOKENS:
                self._bytes.clear()
            known = self._bytes[id_] = self._look_up(id_)
        return known

    def spelling(self, id_: int) -> str:
        """How the vocabulary writes one token, control tokens included; "" for an unused id."""
        if id_ in self._added:
            return self._added[id_]
        token: str | None = self._library.id_to_token(id_)
        return token or ""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control tokens print nothing, broken UTF-8 becomes U+FFFD.

        Raises:
            TokenizerError: an id is negative.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    # Private

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        from flashlite.checkpoint.chat import ChatTemplate

        if self._template_source is None:
            raise TemplateError(
                f"{self.name} is a base model without a chat template; use `flashlite run`"
            )
        bos, eos = self.tokens.bos, self.tokens.eos
        return ChatTemplate(
            self._template_source,
            bos_token="" if bos is None else self.spelling(bos),
            eos_token=self.spelling(eos[0]) if eos else "",
        )

    def _encode(self, text: str) -> list[int]:
        if self._most_text is None:
            return self._library_ids(text)
        with self._lock:
            self._cached_text += self._check_length([text], self._most_text)
            ids = self._library_ids(text)
            if self._cached_text > self._most_text:
                self._cached_text = 0
                if hasattr(self._library.model, "_clear_cache"):
                    self._library.model._clear_cache()
            return ids

    def _library_ids(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def _check_length(self, texts: Iterable[str], most: int) -> int:
        """Bytes of the texts together.

        Raises:
            MemoryCeiling: they are more than `most`.
        """
        size = 0
        for text in texts:
            size += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            if size > most:
                raise MemoryCeiling(
                    f"the text has {size} bytes or more, and max_mem leaves room to tokenize "
                    f"{most} at once; shorten it, or raise max_mem or max_sequence_length"
                )
        return size

    def _refuse_control(self, ids: list[int]) -> None:
        if not self._control.isdisjoint(ids):
            found = next(id_ for id_ in ids if id_ in self._control)
            raise TokenizerError(
                f"text would become control token {found} ({self.spelling(found)!r}); rephrase it"
            )

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokens.bos
        if self.tokens.add_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _look_up(self, id_: int) -> bytes:
        if id_ in self._control:
            return b""
        if id_ in self._added:
            return self._added[id_].encode()
        token: str | None = self._library.id_to_token(id_)
        return b"" if token is None else self._spell(token)

    def _differ(self, found: list[int], expected: list[int]) -> str:
        for index, pair in enumerate(zip(found, expected, strict=False)):
            if pair[0] != pair[1]:
                one, other = map(self.spelling, pair)
                return f"number {index} would be {one!r}, not {other!r}"
        return f"there would be {len(found)}, not {len(expected)}"


class StreamDecoder:
    """Text of ids that arrive one by one, in whole characters.

    The pieces of `push` and `finish` joined are the text that `Tokenizer.decode` gives for all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The text that this id completes; bytes of an unfinished character are held back.

        Raises:
            TokenizerError: the id is negative.
        """
        return self._utf8.decode(self._tokenizer.token_bytes(id_))

    def finish(self) -> str:
        """What was held back, as U+FFFD; afterwards the decoder is as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _ControlMatcher:
    """Finds control tokens in a rendered chat: the longest that begins at the leftmost place."""

    def __init__(
        self, ids: Mapping[str, int], *, strip_left: set[int], strip_right: set[int]
    ) -> None:
        self._ids = dict(ids)
        self._strip_left = strip_left
        self._strip_right = strip_right
        self._first = re.compile(
            "[" + "".join(map(re.escape, sorted({spelling[0] for spelling in ids}))) + "]"
            if ids
            else r"(?!)"
        )
        lengths: dict[str, set[int]] = {}
        for spelling in ids:
            lengths.setdefault(spelling[0], set()).add(len(spelling))
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Where control tokens are spelled: (start, end), in order, apart from each other."""
        for start, end, _ in self._matches(text, ()):
            yield start, end

    def split(self, text: str, masked: Sequence[tuple[int, int]]) -> Iterator[str | int]:
        """Cut a text into control ids and the plain text between them.

        Args:
            text: a rendered chat.
            masked: spans, in order, where nothing is matched.
        """
        position = 0
        for start, end, id_ in self._matches(text, masked):
            before = text[position:start]
            if id_ in self._strip_left:
                before = before.rstrip()
            if before:
                yield before
            yield id_
            position = end
            if id_ in self._strip_right:
                position += len(text) - end - len(text[end:].lstrip())
        if position < len(text):
            yield text[position:]

    def _matches(
        self, text: str, masked: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, int]]:
        position = 0
        next_mask = 0
        while candidate := self._first.search(text, position):
            start = candidate.start()
            position = start + 1
            while next_mask < len(masked) and masked[next_mask][1] <= start:
                next_mask += 1
            limit = masked[next_mask][0] if next_mask < len(masked) else len(text)
            for length in self._lengths[text[start]]:
                end = start + length
                if end <= limit and (id_ := self._ids.get(text[start:end])) is not None:
                    yield start, end, id_
                    position = end
                    break


def _speller(library: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How this vocabulary's tokens spell bytes: read from the decoder it comes with."""
    decoder = library.decoder
    state = json.loads(decoder.__getstate__()) if decoder is not None else None
    kinds = set(_types(state))
    if "ByteLevel" in kinds:
        return _spell_letters
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return _spell_pieces
    if "WordPiece" in kinds:
        return _spell_wordpieces
    raise TokenizerError(
        f"tokenizer.json decodes by {sorted(kinds) or 'nothing'}; known are ByteLevel, "
        "ByteFallback, Metaspace and WordPiece"
    )


def _types(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node["type"]
        for value in node.values():
            yield from _types(value)
    elif isinstance(node, list):
        for value in node:
            yield from _types(value)


def _spell_letters(token: str) -> bytes:
    """Byte-level: a letter per byte; a letter that stands for none is itself."""
    try:
        return bytes([_LETTER_BYTES[letter] for letter in token])
    except KeyError:
        return token.encode()


def _spell_pieces(token: str) -> bytes:
    """SentencePiece: U+2581 is a space, <0xNN> one byte."""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode()


def _spell_wordpieces(token: str) -> bytes:
    """WordPiece: a token begins a word unless it begins with ##."""
    return token[2:].encode() if token.startswith("##") else b" " + token.encode()


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_VOCABULARY
