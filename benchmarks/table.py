"""Every benchmark in one table, from the JSON that each left behind.

    python benchmarks/table.py                    # what was measured last
    python benchmarks/table.py --run              # measure everything first (half an hour or more)
    python benchmarks/table.py --run speed start --rounds 9
    FLASHLITE_ISA=avx2 python benchmarks/table.py --run     # ours on an older instruction set

Results are kept as benchmarks/results/NAME.json, one line as the script printed it. The exit code
is 1 when a benchmark failed, or, with --strict, when a gate is not held.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common

__all__ = ["BENCHMARKS", "collect", "main", "render", "run"]

# In the order of the table; with what each is given beside --rounds.
BENCHMARKS: Mapping[str, Sequence[str]] = {
    "speed": (),
    "concurrency": (),
    "start": (),
    "memory": (),
    "busy": (),
    "encoder": (),
    "depth": (),
    "cost": (),
    "ablation": (),
    "curve": (),
    "lowrank": (),
    "kernels": ("--tables", "amx,avx512", "--seconds", "0.5"),
}
_HERE = Path(__file__).parent


def run(name: str, words: Sequence[str], results: Path, folder: Path = _HERE) -> bool:
    """Run a benchmark and keep its last line; False, and nothing kept, when it fails."""
    lines = []
    with subprocess.Popen(
        [sys.executable, str(folder / f"{name}.py"), *words], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if not line.startswith("{"):
                print(line, end="", file=sys.stderr, flush=True)
    try:
        found = json.loads(lines[-1])
        if process.returncode or found["benchmark"] != name:
            raise ValueError
    except (IndexError, KeyError, TypeError, ValueError):
        common.note(f"{name}: failed with exit code {process.returncode}, its old result is kept")
        return False
    results.mkdir(exist_ok=True)
    fresh = results / f"{name}.json.partial"
    fresh.write_text(lines[-1], encoding="utf-8")
    fresh.replace(results / f"{name}.json")
    return True


def collect(names: Sequence[str], results: Path) -> list[dict[str, Any]]:
    """The kept results of these benchmarks; those that have none are left out."""
    found = []
    for name in names:
        path = results / f"{name}.json"
        if path.is_file():
            found.append(json.loads(path.read_text(encoding="utf-8")))
        else:
            common.note(f"{name}: not measured yet; python benchmarks/table.py --run {name}")
    return found


def render(documents: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """The table, what it was measured on, and whether every gate is held."""
    rows = [common.row_from_json(row) for document in documents for row in document["rows"]]
    gated = [row for row in rows if row.held is not None]
    held = sum(bool(row.held) for row in gated)
    lines = [common.format_rows(rows), "", f"{held} of {len(gated)} gates held"]
    places: dict[str, list[str]] = {}
    for document in documents:
        places.setdefault(_place(document), []).append(document["benchmark"])
    for place, names in places.items():
        lines.append(place if len(places) == 1 else f"{', '.join(names)}: {place}")
    return "\n".join(lines), held == len(gated)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--run", action="store_true", help="measure first")
    parser.add_argument("--rounds", metavar="N", help="of every benchmark [default: its own]")
    parser.add_argument("--strict", action="store_true", help="fail when a gate is not held")
    parser.add_argument(
        "--results", type=Path, default=common.RESULTS, help="[default: benchmarks/results]"
    )
    options = parser.parse_args()
    names = options.names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"benchmark {unknown[0]!r} is unknown; known are {', '.join(BENCHMARKS)}")
    rounds = ["--rounds", options.rounds] if options.rounds else []
    done = []
    for name in names if options.run else ():
        common.note(f"== {name}")
        done.append(run(name, [*BENCHMARKS[name], *rounds], options.results))
    documents = collect(names, options.results)
    if not documents:
        raise SystemExit("nothing was measured yet; python benchmarks/table.py --run")
    text, held = render(documents)
    print(text)
    if not all(done) or (options.strict and not held):
        raise SystemExit(1)


def _place(document: Mapping[str, Any]) -> str:
    return f"{common.describe(document)}, {document['rounds']} rounds"


if __name__ == "__main__":
    main()
