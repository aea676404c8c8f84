"""Token ids against llama.cpp, decoding, streaming, and vocabularies that must be refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import make_gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.convert_tokenizer import build_tokenizer, build_tokenizer_checked
from flashlite.checkpoint.gguf_tokenizer import merges_of_scores
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pretokenizers import PRE_TOKENIZERS
from flashlite.checkpoint.tokenizer import SpecialTokens, Tokenizer, TokenizerFiles
from flashlite.errors import FlashliteError, TemplateError, TokenizerError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokens"
HARD_CASES: list[str] = json.loads((FIXTURES / "hard_cases.json").read_text(encoding="utf-8"))
CHATS: list[dict[str, Any]] = json.loads((FIXTURES / "chats.json").read_text(encoding="utf-8"))


def fixture(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    return data


def digest(ids: list[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()[:8]


def xquad_texts(path: Path) -> list[str]:
    return [
        text
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for text in (paragraph["context"], *(qa["question"] for qa in paragraph["qas"]))
    ]


def gguf(**changes: object) -> Checkpoint:
    """The tiny byte-level vocabulary, with keys `tokenizer.ggml.NAME` changed (None: removed)."""
    metadata = dict(make_gguf.tiny_model()[0])
    for name, value in changes.items():
        key = "tokenizer.chat_template" if name == "template" else f"tokenizer.ggml.{name}"
        metadata[key] = value
        if value is None:
            del metadata[key]
    return Checkpoint(Path("tiny.gguf"), "gguf", "llama", metadata, {})


def vocabulary() -> list[str]:
    tokens = make_gguf.tiny_model()[0]["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    return list(tokens)


def kinds(changes: Mapping[int, int] | None = None) -> np.ndarray[Any, Any]:
    types = np.array(make_gguf.tiny_model()[0]["tokenizer.ggml.token_type"])
    for index, kind in (changes or {}).items():
        types[index] = kind
    return types


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer(build_tokenizer(open_checkpoint(smollm2_gguf)))


@pytest.fixture(scope="session")
def gemma() -> Tokenizer:
    if value := os.environ.get("FLASHLITE_TEST_GEMMA"):
        found = [Path(value)]
    else:
        home = Path(os.environ.get("FLASHLITE_HOME") or Path.home() / ".local/share/flashlite")
        found = sorted((home / "models/gemma-3-270m").glob("*.gguf"))
    if not found or not found[0].is_file():
        pytest.skip("Gemma is not here: run `flashlite pull gemma-3-270m --accept-license`")
    return Tokenizer(build_tokenizer(open_checkpoint(found[0])))


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
    return Tokenizer(build_tokenizer(gguf()))


# The same ids as llama.cpp


def check_hard_cases(tokenizer: Tokenizer, name: str) -> None:
    expected = fixture(name)["hard"]
    assert len(expected) == len(HARD_CASES) > 150
    different = [
        ascii(text)
        for text, ids in zip(HARD_CASES, expected, strict=True)
        if tokenizer.encode(text) != ids
    ]
    assert different == []


def check_xquad(tokenizer: Tokenizer, name: str, data: Path) -> None:
    expected = fixture(name)["xquad"]
    assert len(expected) == 12
    compared = 0
    for file, digests in expected.items():
        texts = xquad_texts(data / "xquad_dev" / file)
        ours = [digest(tokenizer.encode(text)) for text in texts]
        theirs = [digests[i : i + 8] for i in range(0, len(digests), 8)]
        assert len(ours) == len(theirs)
        wrong = [ascii(texts[i]) for i in range(len(texts)) if ours[i] != theirs[i]]
        assert wrong == [], file
        compared += len(texts)
    assert compared == 4584


def test_smollm2_hard_cases_as_llama_cpp(smollm2: Tokenizer) -> None:
    check_hard_cases(smollm2, "smollm2")


def test_smollm2_twelve_languages_as_llama_cpp(smollm2: Tokenizer, flashlite_data: Path) -> None:
    check_xquad(smollm2, "smollm2", flashlite_data)


def test_gemma_hard_cases_as_llama_cpp(gemma: Tokenizer) -> None:
    check_hard_cases(gemma, "gemma")


def test_gemma_twelve_languages_as_llama_cpp(gemma: Tokenizer, flashlite_data: Path) -> None:
    check_xquad(gemma, "gemma", flashlite_data)


def test_smollm2_chats_as_llama_cpp(smollm2: Tokenizer) -> None:
    expected = fixture("smollm2")["chats"]
    for chat, ids in zip(CHATS, expected, strict=True):
        prompt = chat["add_generation_prompt"]
        assert smollm2.render_chat(chat["messages"], add_generation_prompt=prompt) == ids


def test_special_tokens_of_smollm2(smollm2: Tokenizer) -> None:
    tokens = smollm2.tokens
    assert smollm2.spelling(tokens.eos[0]) == "<|im_end|>"
    assert {smollm2.spelling(i) for i in tokens.eos} == {"<|im_end|>", "<|endoftext|>"}
    assert tokens.control == tuple(range(17))
    assert smollm2.encode_prompt("Hi") == smollm2.encode("Hi")


def test_special_tokens_of_gemma(gemma: Tokenizer) -> None:
    assert {gemma.spelling(i) for i in gemma.tokens.eos} == {"<eos>", "<end_of_turn>"}
    assert gemma.encode_prompt("Hi") == [gemma.find("<bos>"), *gemma.encode("Hi")]
    with pytest.raises(TemplateError, match="base model without a chat template; use `flashlite"):
        gemma.render_chat([{"role": "user", "content": "Hi"}])


# Merging by score


def by_score(text: str, scores: Mapping[str, float]) -> list[str]:
    """SentencePiece as it is defined: join the best neighbours, the leftmost first."""
    parts = list(text)
    while True:
        unions = [
            (-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores
        ]
        if not unions:
            return parts
        at = min(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def by_rank(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """BPE with explicit merges: the lowest rank, the leftmost first."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    parts = list(text)
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            return parts
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=24),
    st.lists(st.text("ab", max_size=24), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_one_merge_per_token_is_enough(
    tokens: list[str], texts: list[str], chance: random.Random
) -> None:
    order = ["a", "b", *tokens]
    chance.shuffle(order)
    scores = {token: -float(i) for i, token in enumerate(order)}
    merges = merges_of_scores(scores)
    assert len(merges) <= len(tokens)
    for text in texts:
        assert by_rank(text, merges) == by_score(text, scores)


def test_sentencepiece_model_with_space_prefix(stories260k: Path) -> None:
    checkpoint = open_checkpoint(stories260k)
    tokenizer = Tokenizer(build_tokenizer(checkpoint))
    scores = {
        token: float(score)
        for token, score, kind in zip(
            checkpoint.metadata["tokenizer.ggml.tokens"],  # type: ignore[call-overload]
            checkpoint.metadata["tokenizer.ggml.scores"],
            checkpoint.metadata["tokenizer.ggml.token_type"],
            strict=True,
        )
        if kind == 1
    }
    for text in ("Once upon a time", "Lily said  no\n", "x"):
        expected = by_score("▁" + text.replace(" ", "▁"), scores)
        ids = tokenizer.encode(text)
        assert "".join(map(tokenizer.spelling, ids)).replace("<0x0A>", "\n") == "".join(expected)
        assert [tokenizer.spelling(i) for i in ids if tokenizer.spelling(i) in scores] == [
            part for part in expected if part in scores
        ]
        assert tokenizer.decode(ids) == " " + text
    assert tokenizer.decode(tokenizer.encode("héllo 😀")) == " héllo 😀"


# Decoding and streaming


def test_hard_cases_come_back(tiny: Tokenizer, smollm2: Tokenizer) -> None:
    for text in HARD_CASES:
        assert tiny.decode(tiny.encode(text)) == text
    # SmolLM2 has no token for these bytes; llama.cpp drops them too.
    lacking = set(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")
    whole = [text for text in HARD_CASES if lacking.isdisjoint(text.encode())]
    assert len(whole) > 150
    for text in whole:
        assert smollm2.decode(smollm2.encode(text)) == text


def check_stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(id_) for id_ in ids]
    text = "".join([*pieces, stream.finish()])
    assert text == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
    assert text == tokenizer.decode(ids)
    assert stream.finish() == ""


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=40))
def test_stream_equals_decode_for_any_ids(tiny: Tokenizer, ids: list[int]) -> None:
    check_stream(tiny, ids)  # half of these ids are single bytes: most sequences are broken UTF-8


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=40))
def test_stream_equals_decode_for_any_ids_of_smollm2(smollm2: Tokenizer, ids: list[int]) -> None:
    check_stream(smollm2, ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_stream_holds_unfinished_characters_back(tiny: Tokenizer, text: str) -> None:
    stream, out = tiny.stream(), ""
    for id_ in tiny.encode(text):
        out += stream.push(id_)
        assert text.startswith(out)
    assert stream.finish() == ""
    assert out == text


def test_control_tokens_print_nothing(tiny: Tokenizer) -> None:
    assert [tiny.token_bytes(id_) for id_ in tiny.tokens.control] == [b"", b"", b""]
    ids = [1, *tiny.encode("a"), 2]
    assert tiny.decode(ids) == "a"
    assert tiny.spelling(2) == "<|im_end|>"


def test_ids_beyond_the_vocabulary(tiny: Tokenizer) -> None:
    assert tiny.token_bytes(tiny.vocab_size + 5) == b""  # rows that pad an embedding table
    with pytest.raises(TokenizerError, match="token id is -1, allowed 0 to 511"):
        tiny.token_bytes(-1)


def test_find_is_exact(tiny: Tokenizer) -> None:
    assert tiny.find("<|im_end|>") == 2
    assert tiny.find("<|im_end|") is None


def test_lone_surrogates_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D83D at character 1"):
        tiny.encode("a\ud83d")


def test_long_words_take_linear_time(tiny: Tokenizer) -> None:
    text = "a" * 300_000 + " " * 300_000
    assert tiny.decode(tiny.encode(text)) == text


# Special tokens


def test_special_tokens_survive_json() -> None:
    tokens = SpecialTokens(1, (2, 0), True, (0, 1, 2))
    assert SpecialTokens.from_json(json.loads(json.dumps(tokens.to_json()))) == tokens


@pytest.mark.parametrize(
    "change",
    [
        {"bos": "1"},
        {"bos": True},
        {"bos": -1},
        {"bos": None},
        {"eos": 2},
        {"eos": [2.0]},
        {"eos": ["2"]},
        {"add_bos": 1},
        {"control": [0, -3]},
        {"control": None},
        {"other": 1},
    ],
)
def test_special_tokens_are_strict(change: dict[str, object]) -> None:
    data = SpecialTokens(1, (2,), True, (0,)).to_json()
    with pytest.raises(TokenizerError):
        SpecialTokens.from_json(data | change)
    with pytest.raises(TokenizerError):
        SpecialTokens.from_json({"bos": 1})


def test_special_tokens_must_exist(tiny: Tokenizer) -> None:
    files = build_tokenizer(gguf())
    for tokens in (
        SpecialTokens(9999, (2,), False, (0,)),
        SpecialTokens(1, (512,), False, (0,)),
        SpecialTokens(1, (2,), False, (0, 70000)),
    ):
        with pytest.raises(TokenizerError, match="is not one of 512 tokens"):
            Tokenizer(dataclasses.replace(files, tokens=tokens))


def test_user_defined_tokens_match_text() -> None:
    tokens = vocabulary()
    tokens[-1] = "<tool>"
    checkpoint = gguf(tokens=tokens, token_type=kinds({511: 4}), merges=[], template=None)
    tokenizer = Tokenizer(build_tokenizer(checkpoint))
    assert tokenizer.encode("<tool>") == [511]
    assert tokenizer.decode([511]) == "<tool>"
    assert 511 not in tokenizer.tokens.control


@pytest.mark.parametrize("spelled", ["'<tool>'", "'<to' ~ 'ol>'"])
def test_tokens_the_template_spells_are_control(spelled: str) -> None:
    tokens = vocabulary()
    tokens[-2:] = ["<tool>", "\n\n"]
    template = "{% for m in messages %}{{ " + spelled + " ~ '\n\n' ~ m.content }}{% endfor %}"
    files = build_tokenizer(
        gguf(tokens=tokens, token_type=kinds({510: 4, 511: 4}), merges=[], template=template)
    )
    assert 510 in files.tokens.control
    assert 511 not in files.tokens.control  # white space stays text
    tokenizer = Tokenizer(files)
    assert 510 not in tokenizer.encode("<tool>")
    assert 511 in tokenizer.encode("a\n\nb")
    assert tokenizer.render_chat([{"role": "user", "content": "<tool>"}]).count(510) == 1


def test_merges_never_make_control_tokens() -> None:
    tokens = vocabulary()
    a, b = tokens.index("a"), tokens.index("b")
    tokens[-1] = "ab"
    checkpoint = gguf(tokens=tokens, token_type=kinds({511: 3}), merges=["a b"], template=None)
    assert Tokenizer(build_tokenizer(checkpoint)).encode("ab") == [a, b]


def test_whole_words_never_make_control_tokens() -> None:
    tokens = vocabulary()
    tokens[-1] = "abc"  # llama-bpe takes words that are in the vocabulary whole
    checkpoint = gguf(
        tokens=tokens, token_type=kinds({511: 3}), merges=[], pre="llama-bpe", template=None
    )
    tokenizer = Tokenizer(build_tokenizer(checkpoint))
    with pytest.raises(TokenizerError, match="would become control token 511"):
        tokenizer.encode("abc")


# Vocabularies that must be refused


def replaced(values: list[str], index: int, value: str) -> list[str]:
    return [*values[:index], value, *values[index + 1 :]]


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no model": ({"model": None}, "tokenizer.ggml.model is missing"),
    "unknown model": ({"model": "rwkv"}, "tokenizer model 'rwkv' is not known, known are gpt2"),
    "unknown pre": ({"pre": "klingon"}, "pre-tokenizer 'klingon' is not known.*smollm"),
    "pre of a wrong type": ({"pre": 3}, "pre is of type int, expected text"),
    "no tokens": ({"tokens": None}, "tokens is missing, expected a list of texts"),
    "empty": ({"tokens": [], "token_type": None}, "vocabulary is empty"),
    "tokens of a wrong type": ({"tokens": np.arange(512)}, "expected a list of texts"),
    "twice": ({"tokens": ["a"] * 512}, "tokens 0 and 511 are both 'a'"),
    "long token": ({"tokens": replaced(vocabulary(), 511, "x" * 5000)}, "allowed 4096"),
    "short types": ({"token_type": kinds()[:-1]}, "has 511 entries, the vocabulary 512"),
    "unknown type": ({"token_type": kinds({7: 9})}, "token 7 has type 9, allowed 0 to 6"),
    "negative type": ({"token_type": kinds({7: -1})}, "token 7 has type -1"),
    "text types": ({"token_type": ["1"] * 512}, "expected a list of numbers"),
    "byte spelled wrong": (
        {
            "tokens": replaced(vocabulary(), 511, "<0x-1>"),
            "token_type": kinds({511: 6}),
        },
        "byte token 511 is spelled '<0x-1>', expected <0xNN>",
    ),
    "no merges": ({"merges": None}, "merges is missing"),
    "merge of three": ({"merges": ["a b c"]}, "merge 0 is 'a b c'"),
    "merge of one": ({"merges": ["ab"]}, "merge 0 is 'ab'"),
    "eos beyond": ({"eos_token_id": 512}, "eos_token_id is 512, allowed 0 to 511"),
    "bos negative": ({"bos_token_id": -1}, "bos_token_id is -1"),
    "bos is true": ({"bos_token_id": True}, "bos_token_id is True"),
    "flag is a number": ({"add_bos_token": 1}, "expected true or false"),
    "template is a number": ({"template": 5}, "chat_template is of type int"),
    "no byte tokens": (
        {"model": "llama", "scores": np.zeros(512, np.float32)},
        "vocabulary lacks 256 byte tokens, the first is <0x00>",
    ),
    "no scores": ({"model": "llama"}, "scores is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_vocabularies(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(TokenizerError, match=message) as caught:
        build_tokenizer(gguf(**changes))
    assert "\n" not in str(caught.value)


def test_scores_must_be_finite() -> None:
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["a", "b", "ab"]
    scores = np.zeros(259, np.float32)
    scores[258] = math.nan
    types = np.array([6] * 256 + [1] * 3, np.int32)
    keys = {"merges": None, "template": None, "bos_token_id": None, "eos_token_id": None}
    keys |= {"unknown_token_id": None, "padding_token_id": None}
    with pytest.raises(TokenizerError, match="score of token 258 is nan, not finite"):
        build_tokenizer(gguf(model="llama", tokens=tokens, scores=scores, token_type=types, **keys))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_loads(name: str) -> None:
    tokenizer = Tokenizer(build_tokenizer(gguf(pre=name)))
    for text in ("I'LL take 12345 of 'em,  please!\r\n\n ok", "e\u0301 १२३ 你好…"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# The limited child


def test_checked_build_equals_build(tiny_gguf: Path) -> None:
    checkpoint = open_checkpoint(tiny_gguf)
    assert build_tokenizer_checked(checkpoint) == build_tokenizer(checkpoint)


def test_checked_build_reports_one_error() -> None:
    with pytest.raises(TokenizerError, match=r"tiny.gguf: pre-tokenizer 'klingon' is not known"):
        build_tokenizer_checked(gguf(pre="klingon"))
    with pytest.raises(TemplateError, match="uses import, which is not allowed"):
        build_tokenizer_checked(gguf(template="{% import 'os' as os %}"))


def test_checked_build_refuses_a_vocabulary_that_loses_text() -> None:
    tokens = replaced(vocabulary(), vocabulary().index("q"), "[NO Q]")
    with pytest.raises(TokenizerError, match="vocabulary turns"):
        build_tokenizer_checked(gguf(tokens=tokens, merges=[]))


def test_checked_build_is_killed_after_its_deadline() -> None:
    with pytest.raises(TokenizerError, match=r"was not built after 0.01 s and was given up"):
        build_tokenizer_checked(gguf(), timeout=0.01)


def hf_folder(path: Path, *, changes: Mapping[str, object] | None = None) -> Checkpoint:
    """A byte-level BPE as `save_pretrained` leaves it, its tokenizer.json changed."""
    names = ["<s>", "</s>", "<|user|>", "<note>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*names, *letters, "he", "hel"])}
    library = Library(models.BPE(vocab=vocab, merges=[("h", "e"), ("he", "l")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    library.add_special_tokens([AddedToken(name, normalized=False) for name in names[:3]])
    library.add_tokens([AddedToken("<note>", normalized=False)])
    library.enable_truncation(4)
    document = json.loads(library.to_str()) | dict(changes or {})
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}",
        encoding="utf-8",
    )
    return Checkpoint(path, "safetensors", "llama", {}, {})


def test_hugging_face_folder(tmp_path: Path) -> None:
    files = build_tokenizer_checked(hf_folder(tmp_path))
    assert files.tokens == SpecialTokens(0, (1,), True, (0, 1, 2))
    tokenizer = Tokenizer(files)
    assert tokenizer.decode(tokenizer.encode("hello, a text longer than 4 tokens")) == (
        "hello, a text longer than 4 tokens"
    )
    assert tokenizer.encode("hel") == [tokenizer.find("hel")]
    assert tokenizer.encode_prompt("hel") == [0, tokenizer.find("hel")]
    assert 3 in tokenizer.encode("a<note>b")
    ids = tokenizer.render_chat([{"role": "user", "content": "hel</s>"}])
    assert ids[:2] == [0, 2]
    assert ids.count(1) == 1


HOSTILE: dict[str, dict[str, object]] = {
    "panic while loading": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    },
    "panic in a prefix": {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
            "continuing_subword_prefix": "xxxxxxx",
        },
    },
    "unknown model": {"model": {"type": "Magic"}},
    "no decoder": {"decoder": None},
    "nothing comes back": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": ""},
    },
    "text that explodes": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100}
                for _ in range(6)
            ],
        },
    },
    "deep nesting": {"normalizer": json.loads('{"a":' * 200 + "1" + "}" * 200)},
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tokenizer_json(tmp_path: Path, case: str) -> None:
    checkpoint = hf_folder(tmp_path, changes=HOSTILE[case])
    with pytest.raises(TokenizerError) as caught:
        build_tokenizer_checked(checkpoint, timeout=20)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", "{}", '{"model": {}}'])
def test_broken_tokenizer_json(tmp_path: Path, content: str) -> None:
    checkpoint = hf_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(FlashliteError) as caught:
        build_tokenizer(checkpoint)
    assert isinstance(caught.value, TokenizerError)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "safetensors", "llama", {}, {})
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        build_tokenizer(checkpoint)


def test_library_errors_are_ours() -> None:
    tokens = SpecialTokens(None, (), False, ())
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be loaded"):
        Tokenizer(TokenizerFiles(b"{}", None, tokens))
