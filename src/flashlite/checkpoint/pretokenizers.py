"""How byte-level BPE vocabularies cut a text into words before they merge, by name.

A GGUF file names its rule in `tokenizer.ggml.pre`. A rule is a list of regular expressions, applied
one after the other: each cuts the pieces left by the one before into its matches and what lies
between them. The expressions are those of the models' own tokenizers; case-insensitive contractions
are spelled out, because Unicode case folding would also match the long s.

The names and their rules follow llama.cpp, `llm_tokenizer_bpe` in src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashlite.errors import TokenizerError

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "pre_tokenizer"]


@dataclass(frozen=True)
class PreTokenizer:
    """One rule.

    Attributes:
        patterns: regular expressions in the order they cut.
        whole_words: a word that is in the vocabulary is taken whole, without merging.
        add_bos: whether a prompt starts with BOS where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


# Letters, digits and punctuation that came with Unicode 16. The `tokenizers` library knows them;
# llama.cpp, the reference, does not yet, and takes each for neither a letter nor a digit.
_NEW = "".join(
    "-".join(f"\\x{{{code}}}" for code in codes.split("-"))
    for codes in (
        *("1B4E-1B4F", "1B7F", "1C89-1C8A", "A7CB-A7CD", "A7DA-A7DC", "105C0-105F3"),
        *("10D40-10D65", "10D6E-10D85", "10EC2-10EC4", "11380-11389", "1138B", "1138E"),
        *("11390-113B5", "113B7", "113D1", "113D3-113D5", "113D7-113D8", "116D0-116E3"),
        *("11BC0-11BE1", "11BF0-11BF9", "13460-143FA", "16100-1611D", "16130-16139"),
        *("16D40-16D79", "18CFF", "1CCF0-1CCF9", "1E5D0-1E5ED", "1E5F0-1E5FA", "1E5FF"),
    )
)
_L = rf"[\p{{L}}&&[^{_NEW}]]"
_N = rf"[\p{{N}}&&[^{_NEW}]]"
_OTHER = rf"[[^\s\p{{L}}\p{{N}}]{_NEW}]"  # neither white space nor letter nor digit
_PUNCTUATION = rf"[[\p{{P}}$+<=>^~|]&&[^{_NEW}]]+"

_SPACE = r"\s+(?!\S)|\s+"
_GPT2_WORDS = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_L}+| ?{_N}+| ?{_OTHER}+|{_SPACE}"
_CONTRACTION = "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"


def _modern_words(digits: str) -> str:
    """The split of Llama 3 and its kin, which differ in how many digits stay together."""
    return (
        rf"{_CONTRACTION}|[[^\r\n\p{{L}}\p{{N}}]{_NEW}]?{_L}+|{digits}"
        rf"| ?{_OTHER}+[\r\n]*|\s*[\r\n]+|{_SPACE}"
    )


_GPT2 = PreTokenizer((_GPT2_WORDS,))
_SINGLE_DIGITS = PreTokenizer((_N, _GPT2_WORDS))
_LLAMA3 = PreTokenizer((_modern_words(_N + "{1,3}"),), whole_words=True, add_bos=True)
_LLAMA3_MERGED = PreTokenizer((_modern_words(_N + "{1,3}"),))
_QWEN2 = PreTokenizer((_modern_words(_N),))
_DEFAULT = PreTokenizer((_PUNCTUATION, _GPT2_WORDS, _N + "+", "[0-9][0-9][0-9]"))
_FALCON = PreTokenizer((_PUNCTUATION.replace("|]", "|`]"), _GPT2_WORDS, "[0-9][0-9][0-9]"))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "exaone": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "lfm2": _LLAMA3,
    "dbrx": _LLAMA3_MERGED,
    "smaug-bpe": _LLAMA3_MERGED,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
    "megrez": _QWEN2,
    "falcon": _FALCON,
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The rule of this name.

    Raises:
        TokenizerError: the name is not known; the message lists those that are.
    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise TokenizerError(
            f"pre-tokenizer {name[:40]!r} is not known, known are {', '.join(PRE_TOKENIZERS)}; "
            "use the safetensors form of the model, which brings its tokenizer.json"
        ) from None
