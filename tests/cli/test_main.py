"""The frame of the command line: help, exit codes, one line per failure, two languages."""

from __future__ import annotations

import ast
import json
import os
import string
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import click
import pytest

import flashlite
from flashlite.cli import language, main, output
from flashlite.errors import ContextOverflow, MissingExtra, PullError, UsageError
from flashlite.runtime.memory import format_size

SOURCES = Path(flashlite.__file__).parent
ES = json.loads((SOURCES / "cli/es.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "FLASHLITE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a verb that raises `error`."""

    @click.command()
    def command() -> None:
        raise error

    module = ModuleType("flashlite.cli.fail")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashlite.cli.fail", module)
    monkeypatch.setitem(main.VERBS, "fail", "Fail.")
    return main.main(["fail"])


def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "flashlite", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **settings},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- help ----


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb, line in main.VERBS.items():
        assert f"{verb} " in shown
        assert line in shown


def module_of(verb: str) -> ModuleType:
    return import_module(f"flashlite.cli.{verb.replace('-', '_')}")


@pytest.mark.parametrize("verb", list(main.VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(
        import_module(f"flashlite.cli.{verb.replace('-', '_')}").command, click.Command
    )
    assert main.main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: flashlite {verb} ")
    assert "--help" in shown


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from flashlite.cli.main import main; main(['--help'])\n"
        "print('imported:', *sorted({n.partition('.')[0] for n in sys.modules}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(ran.stdout.rpartition("imported:")[2].split())
    assert "click" in imported
    assert not imported & {"numpy", "tokenizers", "jinja2", "blake3", "tqdm", "huggingface_hub"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"flashlite {flashlite.__version__}\n"


# ---- failures ----


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PullError("it\nbroke"), 1, "it broke"),
        (UsageError("--threads is 0"), 2, "--threads is 0"),
        (ContextOverflow(9000, 8192), 1, "FL-405: attention buffer overflow: 9000 tokens"),
        (MissingExtra("serving", "serve"), 1, "pip install 'flashlite[serve]'"),
        (OSError(28, "x"), 1, "No space left on device: free some space"),
        (FileNotFoundError(2, "x", "a.txt"), 1, "a.txt: No such file or directory"),
        (PermissionError(13, "x", "/root"), 1, "/root: Permission denied"),
        (MemoryError(), 1, "out of memory"),
        (ValueError("odd"), 1, "internal error, ValueError: odd (FLASHLITE_DEBUG=1 shows where)"),
        (PullError("\x1b[31mred\x07"), 1, "\ufffd[31mred\ufffd"),
    ],
)
def test_a_failure_is_one_line(
    error: Exception,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert failing(error, monkeypatch) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("flashlite: ")
    assert said.err.count("\n") == 1
    assert line in said.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHLITE_DEBUG", "1")
    with pytest.raises(PullError):
        failing(PullError("x"), monkeypatch)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_quiet(
    error: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failing(error, monkeypatch) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nothing"], "No such command 'nothing'. (see `flashlite --help`)"),
        (["pull"], "Missing argument 'MODEL'. (see `flashlite pull --help`)"),
        (["pull", "x", "--odd"], "No such option '--odd'. (see `flashlite pull --help`)"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words) == 2
    assert capsys.readouterr().err == f"flashlite: {line}\n"


def test_a_reader_who_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "flashlite", "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "flashlite", "--help"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ran.returncode == 1
    assert ran.stderr.startswith("flashlite: No space left on device")
    assert ran.stderr.count("\n") == 1


# ---- what the verbs print with ----


def test_sizes_are_decimal() -> None:
    sizes = [format_size(n) for n in (0, 999, 1000, 98_362_432, 1_117_320_768)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "98.4 MB", "1.1 GB"]
    assert [output.count(n) for n in (12, 49_152, 134_515_008)] == ["12", "49.2 k", "134.5 M"]


def test_a_table_keeps_numbers_to_the_right_and_names_harmless() -> None:
    text = output.table([("a", 5, "1.0 kB"), ("b\x1b[2J", 12, "10 B")], ("name", "n", "size"))
    assert text.splitlines() == [
        "name    n    size",
        "a       5  1.0 kB",
        "b\ufffd[2J  12    10 B",
    ]


def test_json_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit({"text": "¿qué\n?", "path": Path("x")})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert shown.count("\n") == 1
    assert json.loads(shown) == {"text": "¿qué\n?", "path": "x"}
    with pytest.raises(ValueError, match="JSON"):
        output.emit({"x": float("nan")})


# ---- Spanish ----


def test_the_first_locale_variable_that_is_set_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "es_ES.UTF-8")
    assert language.spanish()
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert not language.spanish()


def test_errors_and_help_come_in_spanish(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANG", "es_AR.UTF-8")
    failing(ContextOverflow(9000, 8192), monkeypatch)
    assert capsys.readouterr().err == (
        "flashlite: FL-405: desbordamiento del búfer de atención: 9000 tokens y en el contexto "
        "caben 8192; acorte el texto, aumente max_sequence_length o active la división "
        "automática\n"
    )
    main.main(["pull", "smollm2"])
    assert "ningún modelo se llama 'smollm2'" in capsys.readouterr().err
    main.main(["pull"])
    assert "Falta el argumento 'MODEL'. (véase `flashlite pull --help`)" in capsys.readouterr().err
    main.main(["pull", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("Uso: flashlite pull")
    assert "Opciones:" in shown
    assert "Usa solo lo que hay en esta máquina." in shown


@pytest.mark.parametrize("verb", main.VERBS)
def test_the_help_of_every_verb_is_spanish_throughout(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = module_of(verb).command
    options = (param for param in command.params if isinstance(param, click.Option))
    texts = [(option.help or "").partition("  [")[0] for option in options]
    texts += [part for part in command.help.split("\n\n") if not part.startswith("\b")]
    monkeypatch.setenv("LANG", "es_ES.UTF-8")
    english = [
        text for text in texts if text and language.translate(" ".join(text.split())) == text
    ]
    assert english == []


def templates(sources: Path) -> Iterator[str]:
    """Every text in the sources, with {} for what an f-string fills in."""
    for path in sources.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}"
                    for part in node.values
                )


def test_the_catalogue_translates_only_what_is_still_said() -> None:
    said: set[str] = set()
    for text in templates(SOURCES):
        words, bracket, rest = text.partition("  [")
        paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
        said |= {text, words, bracket.strip() + rest, *paragraphs}
    # click names its fields: "No such option: {name}".
    for text in templates(Path(click.__file__).parent):
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError:
            continue
        said.add("".join(lead + ("{}" if field is not None else "") for lead, field, _, _ in parts))
    # click puts these together from pieces.
    said |= {
        "Usage: ",
        "Examples:",
        "[required]",
        "[default: {}]",
        "Missing argument {}.",
        "Missing option {}.",
    }
    assert sorted(set(ES) - said) == []


def test_every_translation_fills_every_gap() -> None:
    for english, spanish in ES.items():
        gaps = english.count("{}")
        fields = {field for _, field, _, _ in string.Formatter().parse(spanish) if field}
        assert fields == {str(i) for i in range(gaps)}, english
