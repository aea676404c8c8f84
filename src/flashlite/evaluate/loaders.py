"""Items of the evaluation sets, by the names that suite files use.

`core` reads what lies beside the suite; all others read a folder of FLASHLITE_DATA, whose texts are
data and never instructions. A loader returns all items in the order of the file; the suite draws.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flashlite.errors import EvaluateError
from flashlite.evaluate.items import Item, Passage, Prompt, Question

__all__ = ["LOADERS", "Loader", "load_items"]

Loader = Callable[[Path], list[Item]]
"""From the folder of a set to its items."""

_LANGUAGES = {
    "Albanian": "sq",
    "Arabic": "ar",
    "Bulgarian": "bg",
    "Croatian": "hr",
    "French": "fr",
    "German": "de",
    "Hungarian": "hu",
    "Italian": "it",
    "Lithuanian": "lt",
    "Macedonian": "mk",
    "Polish": "pl",
    "Portuguese": "pt",
    "Serbian": "sr",
    "Spanish": "es",
    "Turkish": "tr",
    "Vietnamese": "vi",
}
_MOST_BYTES = 64 << 20  # of one file of a set
_MALFORMED = (AttributeError, EOFError, LookupError, OSError, RecursionError, TypeError, ValueError,
              csv.Error, tarfile.TarError, zlib.error)  # fmt: skip
_PARAGRAPH = 400  # characters: shorter lines of wikitext are headings


def _passages(folder: Path) -> list[Item]:
    """`passages.jsonl`: {"language", "text"} a line."""
    return [Passage(row["language"], row["text"]) for row in _lines(folder / "passages.jsonl")]


def _questions(folder: Path) -> list[Item]:
    """`questions.jsonl`: {"language", "prompt", "options", "answer"} a line."""
    return [
        Question(row["language"], row["prompt"], tuple(row["options"]), int(row["answer"]))
        for row in _lines(folder / "questions.jsonl")
    ]


def _prompts(folder: Path) -> list[Item]:
    """`prompts.jsonl`: {"language", "text", "kind"} a line."""
    return [
        Prompt(row["language"], row["text"], "json" if row["kind"] == "json" else "text")
        for row in _lines(folder / "prompts.jsonl")
    ]


def _wikitext(folder: Path) -> list[Item]:
    lines = _text(folder / "valid.txt").split("\n")
    return [Passage("en", line.strip()) for line in lines if len(line) >= _PARAGRAPH]


def _xquad(folder: Path) -> list[Item]:
    """Paragraphs; the same ones in every language."""
    items: list[Item] = []
    for path in sorted(folder.glob("xquad.*.json")):
        language = path.name.split(".")[1]
        for article in _json(path)["data"]:
            items += [Passage(language, part["context"]) for part in article["paragraphs"]]
    return items


def _xcopa(folder: Path) -> list[Item]:
    """Cause or effect. The connective is left to a dash, which every language reads."""
    items: list[Item] = []
    for path in sorted(folder.glob("val.*.jsonl")):
        language = path.name.split(".")[1]
        for row in _lines(path):
            options = (row["choice1"], row["choice2"])
            if row["question"] == "cause":  # the premise follows from the choice
                first = row["premise"].rstrip(". ") + " ←"
            else:
                first = row["premise"].rstrip(". ") + " →"
            items.append(Question(language, first, tuple(f" {o}" for o in options), row["label"]))
    return items


def _exams(folder: Path) -> list[Item]:
    items: list[Item] = []
    with tarfile.open(folder / "dev.jsonl.tar.gz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            for line in (file or io.BytesIO()).read(_MOST_BYTES).decode().splitlines():
                row = json.loads(line)
                choices = row["question"]["choices"]
                labels = [choice["label"] for choice in choices]
                if row["answerKey"] not in labels:
                    continue
                items.append(
                    Question(
                        _LANGUAGES.get(row["info"]["language"], row["info"]["language"]),
                        row["question"]["stem"].strip(),
                        tuple(f" {choice['text'].strip()}" for choice in choices),
                        labels.index(row["answerKey"]),
                    )
                )
    return items


def _sst2(folder: Path) -> list[Item]:
    return [
        Question(
            "en",
            f"Review: {row['text_a'].strip()}\nSentiment:",
            (" negative", " positive"),
            int(row["label"]),
        )
        for row in _table(folder / "train.tsv")
    ]


def _rte(folder: Path) -> list[Item]:
    """0 is entailment in these files."""
    return [
        Question(
            "en",
            f"{row['sentence1'].strip()}\nQuestion: {row['sentence2'].strip()} True or False?\n"
            "Answer:",
            (" True", " False"),
            int(row["label"]),
        )
        for row in _table(folder / "train.tsv")
    ]


def _babi(folder: Path) -> list[Item]:
    """Single-word answers, to be told from those of the other questions of the same file."""
    items: list[Item] = []
    for path in sorted(folder.glob("*.json")):
        stories = _json(path)
        answers = sorted(
            {a for s in stories for a, t in zip(s["answer"], s["type"], strict=True) if t == 1}
        )
        answers = [a for a in answers if "," not in a][:6]
        for story in stories:
            told: list[str] = []
            for text, kind, answer in zip(
                story["text"], story["type"], story["answer"], strict=True
            ):
                if kind == 0:
                    told.append(text)
                elif answer in answers:
                    prompt = " ".join(told) + f"\nQuestion: {text}\nAnswer:"
                    options = tuple(f" {a}" for a in answers)
                    items.append(Question("en", prompt, options, answers.index(answer)))
                    break
    return items


def _schemas(folder: Path) -> list[Item]:
    items: list[Item] = []
    for path in sorted(folder.glob("*.json")):
        schema = json.dumps(_json(path)["schema"], ensure_ascii=False)
        if len(schema) <= 800:
            text = f"Write one JSON value that is valid under this JSON Schema: {schema}"
            items.append(Prompt("en", text, "json"))
    return items


LOADERS: Mapping[str, Loader] = {
    "core-passages": _passages,
    "core-questions": _questions,
    "core-prompts": _prompts,
    "wikitext-2": _wikitext,
    "xquad_dev": _xquad,
    "xcopa": _xcopa,
    "exams_qa": _exams,
    "glue/SST-2": _sst2,
    "glue/RTE": _rte,
    "babi": _babi,
    "jsonschemabench": _schemas,
}


def load_items(name: str, folder: Path) -> list[Item]:
    """All items of a set.

    Raises:
        EvaluateError: a file is missing or is not what the loader reads.
    """
    try:
        items = LOADERS[name](folder)
        for item in items:
            _check(item)
    except _MALFORMED as error:
        raise EvaluateError(
            f"{folder}: is not the set {name}: {type(error).__name__}: {error}; repair it, or take "
            "it out of FLASHLITE_DATA"
        ) from None
    return items


def _check(item: Item) -> None:
    """What comes from a file may be anything.

    Raises:
        ValueError: a text is none, or no option is the answer.
    """
    texts = [item.prompt, *item.options] if isinstance(item, Question) else [item.text]
    if not all(isinstance(text, str) for text in (item.language, *texts)):
        raise ValueError("a text is not a string")
    if isinstance(item, Question) and not 0 <= item.answer < len(item.options):
        raise ValueError(f"answer {item.answer} of {len(item.options)} options")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise EvaluateError(f"{path}: {path.stat().st_size} bytes, the limit is {_MOST_BYTES}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(f"{path}: cannot be read as text: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise EvaluateError(f"{path}: is not JSON: {error}") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in _text(path).splitlines():
        if line.strip():
            yield json.loads(line)


def _table(path: Path) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
