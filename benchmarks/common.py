"""What every benchmark shares: its command line, its rows, the gates they are held to, its JSON.

A benchmark answers one question in `Row`s and ends with `finish`, which prints them and, on the
last line, one JSON object that `table.py` and `plot.py` read. Everything is measured with the
checkout this file lies in, whatever is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = str(ROOT / "src")
if SOURCE not in sys.path:
    sys.path.insert(0, SOURCE)
# The processes that measure are started with the same sources.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [SOURCE, *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != SOURCE)]
)

from flashlite.artifact.format import Artifact  # noqa: E402
from flashlite.codegen.target import ISAS, host_isa  # noqa: E402
from flashlite.evaluate import machine  # noqa: E402
from flashlite.evaluate.peers import PEERS, find_peers, peer_python  # noqa: E402
from flashlite.evaluate.process import our_command, peer_command  # noqa: E402
from flashlite.evaluate.speed import Contender, Figures  # noqa: E402

__all__ = [
    "GEMMA",
    "OURS",
    "RESULTS",
    "ROOT",
    "SMOLLM2",
    "Gate",
    "Row",
    "arguments",
    "contenders",
    "describe",
    "document",
    "finish",
    "format_rows",
    "make_parser",
    "median",
    "note",
    "ordinary_ids",
    "own_prefixes",
    "progress",
    "ready_artifact",
    "row_from_json",
    "rows_of",
    "speed_row",
]

OURS = "flashlite"
SMOLLM2 = "smollm2-135m-instruct"
GEMMA = "gemma-3-270m"
RESULTS = ROOT / "benchmarks" / "results"
BUSY = 0.5  # load average from which figures are doubtful


@dataclass(frozen=True)
class Gate:
    """What a measure has to reach: at least `limit`, or at most when `less` is better."""

    limit: float
    less: bool = False
    aim: float | None = None  # what is wished for beyond it

    def held(self, value: float) -> bool:
        """Whether a value keeps it."""
        return value <= self.limit if self.less else value >= self.limit


@dataclass(frozen=True)
class Row:
    """One measure: our figure beside the peers', and what is compared with the gate.

    `ratio` is ours over that of `against` (a peer, or ourselves under another condition). A row
    without one is judged by our figure itself, in its own unit.
    """

    measure: str
    unit: str
    ours: float
    peers: Mapping[str, float] = field(default_factory=dict)  # figures in the same unit, by name
    against: str = ""
    ratio: float | None = None
    gate: Gate | None = None

    @property
    def judged(self) -> float:
        """What the gate is about."""
        return self.ours if self.ratio is None else self.ratio

    @property
    def held(self) -> bool | None:
        """Whether the gate is; None without one."""
        return None if self.gate is None else self.gate.held(self.judged)


def speed_row(
    measure: str,
    unit: str,
    ours: float,
    peers: Mapping[str, float],
    against: str = "",
    gate: Gate | None = None,
) -> Row:
    """A row whose ratio is ours over a peer's figure; without that peer there is none to judge."""
    theirs = peers.get(against)
    if theirs is None:
        return Row(measure, unit, ours, peers)
    return Row(measure, unit, ours, peers, against, ours / theirs, gate)


def make_parser(
    about: str | None, *, peers: str | None = None, rounds: int = 5, isa: bool = True
) -> argparse.ArgumentParser:
    """The command line that benchmarks share.

    Args:
        about: the script's docstring, shown by --help.
        peers: the default of --peers; None: the question has no peers.
        rounds: the default of --rounds.
        isa: whether --isa makes sense.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=rounds,
        metavar="N",
        help=f"times each, in turns [default: {rounds}]",
    )
    parser.add_argument(
        "--threads", type=_positive, default=2, metavar="N", help="of each engine [default: 2]"
    )
    if peers is not None:
        parser.add_argument(
            "--peers",
            default=peers,
            metavar="NAMES",
            help=f"measured beside, installed on first use; '' for none [default: {peers}]",
        )
    if isa:
        parser.add_argument(
            "--isa",
            choices=[name for name in ISAS if name != "fp32"],
            help="run ours on an older instruction set; peers keep theirs [default: the best]",
        )
    return parser


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed command line; --isa is handed on to every process of ours."""
    options = parser.parse_args()
    if getattr(options, "isa", None):
        os.environ["FLASHLITE_ISA"] = options.isa
    load = machine.describe_machine()["load"] or 0
    if load > BUSY and not getattr(options, "child", None):
        note(f"the machine is busy (load {load}): figures will be doubtful")
    return options


def ready_artifact(model: str, preset: str = "import") -> Artifact:
    """The artifact of a model, pulled, quantized and compiled beforehand."""
    from flashlite.runtime import prepare

    artifact = prepare.find_artifact(model, preset=preset, accept_license=model == GEMMA)
    prepare.compile_artifact(artifact)
    return artifact


def contenders(model: str, peers: str, artifact: Artifact) -> list[Contender]:
    """Ourselves and the named peers, all on the same source file."""
    from flashlite.checkpoint.pull import pull

    names = [name.strip() for name in peers.split(",") if name.strip()]
    source = pull(model, accept_license=model == GEMMA).path
    return [
        Contender(OURS, our_command(), artifact.path),
        *(
            Contender(peer.name, peer_command(peer_python(peer, note), peer.script), source)
            for peer in find_peers(names)
        ),
    ]


def ordinary_ids(artifact: Artifact) -> list[int]:
    """The token ids that random prompts are drawn from: all but control tokens."""
    control = {*artifact.tokens.control, *artifact.tokens.eos}
    return [i for i in range(artifact.spec.vocab_size) if i not in control]


def rows_of(figures: Mapping[str, Figures], measure: str) -> tuple[float, dict[str, float]]:
    """Median tokens/s of a measure: ours, and the peers' by name."""
    medians = {name: of.medians[measure] for name, of in figures.items()}
    return medians.pop(OURS), medians


@contextmanager
def own_prefixes() -> Iterator[Path]:
    """An empty cache of saved prefixes for this process and those it starts; builds are shared."""
    from flashlite import paths

    builds = paths.private_dir(paths.cache_dir() / "builds")
    before = os.environ.get("FLASHLITE_CACHE")
    with tempfile.TemporaryDirectory() as folder:  # mode 0700
        Path(folder, "builds").symlink_to(builds)
        os.environ["FLASHLITE_CACHE"] = folder
        try:
            yield Path(folder, "prefixes")
        finally:
            del os.environ["FLASHLITE_CACHE"]
            if before is not None:
                os.environ["FLASHLITE_CACHE"] = before


def median(values: Sequence[float]) -> float:
    """The middle of some timings."""
    return statistics.median(values)


def note(text: str) -> None:
    """A line for whoever watches, on stderr."""
    print(text, file=sys.stderr, flush=True)


def progress(done: int, total: int) -> None:
    """How far a long measurement is, on stderr, when somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{done}/{total} ", end="" if done < total else "\n", file=sys.stderr, flush=True)


def document(
    name: str, options: argparse.Namespace, rows: Sequence[Row], **more: Any
) -> dict[str, Any]:
    """The JSON object of a benchmark.

    Args:
        name: of the script.
        more: what else is worth keeping, such as `samples` and `curves`.
    """
    return {
        "benchmark": name,
        "commit": machine.commit(),
        "machine": {**machine.describe_machine(), "threads": options.threads, "isa": host_isa()},
        "rounds": options.rounds,
        "rows": [
            {**asdict(row), "peers": _rounded(row.peers), "held": row.held}
            | {"ours": _short(row.ours), "ratio": None if row.ratio is None else _short(row.ratio)}
            for row in rows
        ],
        **more,
    }


def finish(name: str, options: argparse.Namespace, rows: Sequence[Row], **more: Any) -> None:
    """Print the rows and, on the last line, `document`."""
    data = document(name, options, rows, **more)
    print(format_rows([row_from_json(row) for row in data["rows"]]))
    print(json.dumps(data), flush=True)


def describe(data: Mapping[str, Any]) -> str:
    """What a `document` was measured on, in words."""
    place = data["machine"]
    return (
        f"{place['cpu']}, {place['threads']} threads, {place['isa']}, "
        f"commit {data['commit'] or 'unknown'}"
    )


def row_from_json(data: Mapping[str, Any]) -> Row:
    """A row as `document` wrote it."""
    fields = {name: value for name, value in data.items() if name != "held"}
    gate = fields.pop("gate")
    return Row(**fields, gate=None if gate is None else Gate(**gate))


def format_rows(rows: Sequence[Row]) -> str:
    """One table: measure, ours, peers, ratio, gate, aim, held.

    What a row is compared with and is no peer (itself without a technique, a limit of the machine)
    stands in one column, `beside`.
    """
    found = dict.fromkeys(name for row in rows for name in row.peers)
    engines = [name for name in PEERS if name in found]
    names = [*engines, *(["beside"] if set(found) - set(engines) else [])]
    lines = [["measure", "unit", OURS, *names, "ratio", "gate", "aim", "held"]]
    for row in rows:
        beside = next((value for name, value in row.peers.items() if name not in PEERS), None)
        peers = [_figure(beside if name == "beside" else row.peers.get(name)) for name in names]
        gate, aim = _gate_texts(row)
        held = {None: "", True: "yes", False: "NO"}[row.held]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x {row.against}"
        lines.append([row.measure, row.unit, _figure(row.ours), *peers, ratio, gate, aim, held])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    figures = range(2, 3 + len(names))
    return "\n".join(
        "  ".join(
            text.rjust(width) if i in figures else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _gate_texts(row: Row) -> tuple[str, str]:
    if row.gate is None:
        return "", ""
    unit = f" {row.unit}" if row.ratio is None else "x"
    sign = "<=" if row.gate.less else ">="
    aim = "" if row.gate.aim is None else f"{sign} {row.gate.aim:g}{unit}"
    return f"{sign} {row.gate.limit:g}{unit}", aim


def _figure(value: float | None) -> str:
    """Three digits, and all of those before the point."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _short(value) for name, value in values.items()}


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 1000")
    return int(text)
