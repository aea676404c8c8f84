"""`flashlite VERB ...`: find the verb, run it, turn every failure into one line.

Exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted.
FLASHLITE_DEBUG=1 lets an exception show its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from flashlite.cli import language, output
from flashlite.errors import FlashliteError

__all__ = ["VERBS", "analyze", "main", "quantize", "validate"]

# Every verb with its line of help. Its module (a dash is `_`) is imported when it is used: `--help`
# and a mistyped verb stay quick.
VERBS = {
    "pull": "Fetch a pretrained model.",
    "inspect": "Show what a model, a file or an artifact holds.",
    "analyze": "Measure what each part of a model loses in each format.",
    "quantize": "Compress a model into an artifact.",
    "export-h5": "Write a model's weights in FP32 into an HDF5 file.",
    "validate": "Prove what an artifact lost against its source.",
    "finetune": "Tune the last layers: heal a model, or teach it a domain.",
    "delta": "Apply, list and roll back what finetune made.",
    "compile": "Generate C for an artifact and build its library.",
    "run": "Complete a text.",
    "chat": "Talk with a model.",
    "embed": "Turn texts into vectors.",
    "serve": "Answer over HTTP.",
    "keys": "Make, list and revoke the keys that a server asks for.",
    "bench": "Measure speed and memory.",
    "profile": "Show where the time of a model goes.",
    "doctor": "Say what this machine can do.",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(
            f"flashlite.cli.{cmd_name.replace('-', '_')}"
        ).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def _version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from flashlite import __version__

        click.echo(f"flashlite {__version__}")
        ctx.exit()


_cli = _Verbs(
    "flashlite",
    help="Compress a language model, compile it for this machine and run it.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_version,
            help="Show the version and exit.",
        )
    ],
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; never raises for what a user or a machine did wrong.

    Args:
        arguments: the words after `flashlite`; None takes them from the process.

    Returns:
        The exit code.
    """
    if "_FLASHLITE_COMPLETE" in os.environ:  # a shell asks how a word may go on
        _cli.main(prog_name="flashlite")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except Exception as error:
        if os.environ.get("FLASHLITE_DEBUG") == "1":
            raise
        return _explain(error)
    except KeyboardInterrupt:
        return 130


def analyze() -> int:
    """`flashlite_analyze` is `flashlite analyze`."""
    return main(["analyze", *sys.argv[1:]])


def quantize() -> int:
    """`flashlite_quantize` is `flashlite quantize`."""
    return main(["quantize", *sys.argv[1:]])


def validate() -> int:
    """`flashlite_validate` is `flashlite validate`."""
    return main(["validate", *sys.argv[1:]])


def _run(words: list[str]) -> int:
    try:
        with _cli.make_context("flashlite", words or ["--help"]) as context:
            _cli.invoke(context)
        code = 0
    except click.exceptions.Exit as request:
        code = request.exit_code
    # A full disk or a closed pipe behind stdout shows here, not in the interpreter's last words.
    sys.stdout.flush()
    return code


def _explain(error: Exception) -> int:
    """Print one line about `error` and return the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader left, which is no error of ours; nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, click.Abort):
        return 130
    message, code = _describe(error)
    line = output.printable(" ".join(message.split()))
    with contextlib.suppress(OSError):  # stderr may be gone too; the exit code still tells
        click.echo(f"flashlite: {line}", err=True)
    return code


def _describe(error: Exception) -> tuple[str, int]:
    """What is said about an error, in the user's language, and the exit code."""
    translate = language.translate
    if isinstance(error, FlashliteError):
        return translate(str(error)), error.exit_code
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "flashlite"
        text = translate(error.format_message())
        return translate(f"{text} (see `{where} --help`)"), error.exit_code
    if isinstance(error, click.ClickException):
        return translate(error.format_message()), error.exit_code
    if isinstance(error, MemoryError):
        text = "out of memory: close something, or use a smaller model or a lower --max-mem"
        return translate(text), 1
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        named = error.filename if error.filename is not None else error.filename2
        if named is not None:
            reason = f"{named}: {reason}"
        if error.errno == errno.ENOSPC:
            return translate(f"{reason}: free some space and run the same command again"), 1
        return reason, 1
    name = type(error).__name__
    return translate(f"internal error, {name}: {error} (FLASHLITE_DEBUG=1 shows where)"), 1


if __name__ == "__main__":
    sys.exit(main())
