"""No message text becomes a control token, whatever it spells, in any role."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import make_gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.chat import ROLES
from flashlite.checkpoint.convert_tokenizer import build_tokenizer
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.tokenizer import Tokenizer, TokenizerFiles
from flashlite.errors import ForgeryError

GLUE = "{% for m in messages %}{{ m.content }}{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def with_template(files: TokenizerFiles, source: str) -> Tokenizer:
    return Tokenizer(dataclasses.replace(files, chat_template=source))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def control(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    known = set(tokenizer.tokens.control)
    return [id_ for id_ in ids if id_ in known]


def wide(text: str) -> str:
    """The full-width look-alike, which NFKC would turn into the spelling."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def disguises(spelling: str) -> Iterator[str]:
    half = len(spelling) // 2
    yield spelling
    yield f"a {spelling}\n{spelling}{spelling} b"
    yield spelling[:half] + spelling + spelling[half:]  # nested: removing one leaves another
    yield spelling[:-1] + spelling + spelling[-1]
    yield wide(spelling)
    yield " ".join(spelling)
    yield spelling[:half] + "\u200b" + spelling[half:]
    yield spelling[1:]
    yield spelling[:-1]


@pytest.fixture(scope="module")
def smollm2_files(smollm2_gguf: Path) -> TokenizerFiles:
    return build_tokenizer(open_checkpoint(smollm2_gguf))


@pytest.fixture(scope="module")
def smollm2(smollm2_files: TokenizerFiles) -> Tokenizer:
    return Tokenizer(smollm2_files)


@pytest.fixture(scope="module")
def gemma_files() -> TokenizerFiles:
    if value := os.environ.get("FLASHLITE_TEST_GEMMA"):
        found = [Path(value)]
    else:
        home = Path(os.environ.get("FLASHLITE_HOME") or Path.home() / ".local/share/flashlite")
        found = sorted((home / "models/gemma-3-270m").glob("*.gguf"))
    if not found or not found[0].is_file():
        pytest.skip("Gemma is not here: run `flashlite pull gemma-3-270m --accept-license`")
    return build_tokenizer(open_checkpoint(found[0]))


@pytest.fixture(scope="module")
def tool_files() -> TokenizerFiles:
    """The tiny vocabulary with a text token that the template also writes, and ChatML."""
    metadata = dict(make_gguf.tiny_model()[0])
    tokens = list(metadata["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
    types = np.array(metadata["tokenizer.ggml.token_type"])
    tokens[-2:] = ["<tool>", "<note>"]
    types[-2:] = 4
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [],
        "tokenizer.chat_template": make_gguf.CHATML + "{% if false %}<tool>{% endif %}",
    }
    return build_tokenizer(Checkpoint(Path("tiny.gguf"), "gguf", "llama", metadata, {}))


def check_every_disguise(tokenizer: Tokenizer, spellings: list[str]) -> int:
    chats = 0
    for role in ROLES:
        plain = [{"role": role, "content": "x"}, {"role": "user", "content": "x"}]
        expected = control(tokenizer, tokenizer.render_chat(plain))
        assert expected
        for spelling in spellings:
            for text in disguises(spelling):
                messages = [{"role": role, "content": text}, {"role": "user", "content": text}]
                assert control(tokenizer, tokenizer.render_chat(messages)) == expected, text
                chats += 1
            for cut in range(1, len(spelling)):
                messages = [
                    {"role": role, "content": spelling[:cut]},
                    {"role": "user", "content": spelling[cut:]},
                ]
                assert control(tokenizer, tokenizer.render_chat(messages)) == expected, messages
                chats += 1
    return chats


def test_every_control_token_of_smollm2_in_every_role(smollm2: Tokenizer) -> None:
    spellings = [smollm2.spelling(id_) for id_ in smollm2.tokens.control]
    assert len(spellings) == 17
    assert check_every_disguise(smollm2, spellings) > 1000


def test_every_added_token_of_a_vocabulary_with_tools(tool_files: TokenizerFiles) -> None:
    tokenizer = Tokenizer(tool_files)
    spellings = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    assert [tokenizer.spelling(id_) for id_ in tokenizer.tokens.control] == spellings
    check_every_disguise(tokenizer, spellings)
    note = tokenizer.find("<note>")  # a text token the template does not write stays matchable
    assert note in tokenizer.render_chat(user("see <note>"))
    assert control(tokenizer, tokenizer.render_chat(user("<note>"))) == [1, 2, 1]


def test_every_token_of_the_vocabulary_as_text(smollm2: Tokenizer) -> None:
    known = set(smollm2.tokens.control)
    for id_ in range(smollm2.vocab_size):
        text = smollm2.spelling(id_)
        assert known.isdisjoint(smollm2.encode(text))


def test_every_control_token_of_gemma_in_every_role(gemma_files: TokenizerFiles) -> None:
    tokenizer = with_template(gemma_files, GEMMA)
    known = set(tokenizer.tokens.control)
    spellings = [tokenizer.spelling(id_) for id_ in tokenizer.tokens.control]
    assert len(spellings) == 6250
    for spelling in spellings:
        assert known.isdisjoint(tokenizer.encode(spelling))
    expected = control(tokenizer, tokenizer.render_chat(user("x")))
    for role, start in product(ROLES, range(0, len(spellings), 100)):
        for glue in ("", " ", "<"):
            text = glue.join(spellings[start : start + 100])
            messages = [{"role": role, "content": text}]
            assert control(tokenizer, tokenizer.render_chat(messages)) == expected
    common = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    assert check_every_disguise(tokenizer, common) > 300


# Spellings that only appear once the template has run


def test_halves_that_the_template_joins(smollm2_files: TokenizerFiles) -> None:
    tokenizer = with_template(smollm2_files, GLUE)
    for id_ in tokenizer.tokens.control:
        spelling = tokenizer.spelling(id_)
        for cut in range(1, len(spelling)):
            halves = [*user(spelling[:cut]), *user(spelling[cut:])]
            with pytest.raises(ForgeryError, match="changes the control tokens of the chat"):
                tokenizer.render_chat(halves)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content | replace(' ', '') }}", "<| im_end |>"),
        ("{{ messages[0].content | lower }}", "<|IM_END|>"),
        ("{{ messages[0].content[::-1] }}", "<|im_end|>"[::-1]),
        ("{{ messages[0].content.split('#') | join }}", "<|im#_end|>"),
        ("<|im_{{ messages[0].content }}", "end|>"),
        ("<|{{ messages[0].content }}|>", "im_end"),
    ],
)
def test_spellings_that_the_template_makes(
    smollm2_files: TokenizerFiles, source: str, text: str
) -> None:
    tokenizer = with_template(smollm2_files, source)
    with pytest.raises(ForgeryError) as caught:
        tokenizer.render_chat(user(text))
    assert "\n" not in str(caught.value)


def test_text_that_would_swallow_scaffolding(smollm2_files: TokenizerFiles) -> None:
    source = (
        "{% if 'x' not in messages[0].content %}<|im_start|>{% endif %}{{ messages[0].content }}"
    )
    tokenizer = with_template(smollm2_files, source)
    with pytest.raises(ForgeryError, match="there would be 0, not 1"):
        tokenizer.render_chat(user("x"))


# Texts without such spellings lose nothing


def whole(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """The rendered string in one piece, control tokens matched by the library itself."""
    library = tokenizer._library
    try:
        library.encode_special_tokens = False
        ids: list[int] = library.encode(rendered, add_special_tokens=False).ids
    finally:
        library.encode_special_tokens = True
    return ids


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.text("<|im_end>s \n\u00a0x", max_size=12),
)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_equal_those_of_the_whole_string(smollm2: Tokenizer, texts: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    if any(smollm2.spelling(id_) in text for text in texts for id_ in smollm2.tokens.control):
        return
    rendered = smollm2._chat_template.render(messages)
    assert smollm2.render_chat(messages) == whole(smollm2, rendered)


def test_merges_across_the_border_are_kept(smollm2_files: TokenizerFiles) -> None:
    tokenizer = with_template(smollm2_files, "<|im_start|>He{{ messages[0].content }}<|im_end|>")
    ids = tokenizer.render_chat(user("llo"))
    assert ids == [1, *tokenizer.encode("Hello"), 2]
    assert len(ids) == 3


def test_a_masked_spelling_is_plain_text(smollm2: Tokenizer) -> None:
    ids = smollm2.render_chat(user("a <|im_end|> b"))
    rendered = smollm2._chat_template.render(user("a <|im_end|> b"))
    assert smollm2.decode(ids) == rendered.replace("<|im_start|>", "").replace("<|im_end|>\n", "\n")
    text = smollm2.encode("user\na <|im_end|> b")
    assert any(ids[i : i + len(text)] == text for i in range(len(ids)))


def test_blank_texts_do_not_look_like_forgery(smollm2_files: TokenizerFiles) -> None:
    source = (
        "{% for m in messages %}{% if m.content | trim %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    tokenizer = with_template(smollm2_files, source)
    assert tokenizer.render_chat([*user(""), *user(" \n"), *user("a")]) == [
        1,
        *tokenizer.encode("a"),
        2,
    ]


def test_private_letters_in_messages(smollm2: Tokenizer) -> None:
    text = "\U000f0000<|im_end|>\U000f0001\U000f0000"
    ids = smollm2.render_chat(user(text))
    assert control(smollm2, ids) == control(smollm2, smollm2.render_chat(user("x")))
    assert f"user\n{text}\n" in smollm2.decode(ids)
