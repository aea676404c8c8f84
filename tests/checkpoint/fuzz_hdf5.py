"""Damage HDF5 files by the hundred: each becomes numbers or one line, soon, in little memory.

A process of its own, which imports h5py once and forks a limited child for every file, as
`flashlite` starts one. Prints one JSON object.

    python fuzz_hdf5.py SEED MUTATIONS FILE...
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import h5py

from flashlite.checkpoint import hdf5, hdf5_child
from flashlite.checkpoint.open import open_checkpoint
from flashlite.errors import FlashliteError
from flashlite.model.families import describe
from flashlite.runtime.process import resident_bytes

__all__ = ["main"]

assert h5py  # every child finds it imported

BOUNDARY = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


def forked(path: Path) -> tuple[int, bytes]:
    """`hdf5._run_child` without the start of an interpreter."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(into, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["hdf5_child", str(path)]
        status = 1
        try:
            status = hdf5_child.main()
            sys.stdout.flush()
        finally:
            os._exit(status)
    os.close(into)
    with open(out, "rb") as stream:  # noqa: PTH123
        signal.setitimer(signal.ITIMER_REAL, hdf5._SECONDS)
        output = stream.read(hdf5._MAX_REPLY + 1)
        signal.setitimer(signal.ITIMER_REAL, 0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output


def damage(raw: bytes, rng: random.Random) -> bytes:
    """One file cut short, with bytes flipped, a field changed, or a stretch copied or cleared."""
    data = bytearray(raw)
    kind = rng.randrange(5)
    if kind == 0:
        return raw[: rng.randrange(len(raw))]
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(data))
        if kind == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[place] = rng.randrange(256)
        elif kind == 3:
            place -= place % 8
            value = rng.choice([*BOUNDARY, rng.randrange(len(raw)), place])
            data[place : place + 8] = value.to_bytes(8, "little")
        else:
            length, source = rng.randrange(1, 64), rng.randrange(len(data))
            data[place : place + length] = data[source : source + length]
    return bytes(data[: len(raw)])


def outcome(path: Path) -> str:
    """What became of one file; an exception of another kind ends the run."""
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.raw(name)
        describe(checkpoint)
    except FlashliteError as error:
        said = str(error)
        if "\n" in said:
            raise ValueError(said) from None
        if "library" not in said:
            return "refused by us"
        return "crashed" if "crash" in said else "refused by the library"
    return "read"


def main() -> int:
    seed, mutations, files = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    hdf5._run_child = forked
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "damaged.h5")
        originals = [Path(name).read_bytes() for name in files]
        for number in range(mutations):
            path.write_bytes(damage(originals[number % len(originals)], rng))
            began = time.monotonic()
            try:
                found[outcome(path)] += 1
            except BaseException:
                print(f"seed {seed}, mutation {number} of {mutations}", file=sys.stderr)
                raise
            slowest = max(slowest, time.monotonic() - began)
    # ru_maxrss of this process would count the one that started it: exec hands it on.
    usage = [
        resident_bytes("VmHWM"),
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10,
    ]
    print(json.dumps({"outcomes": found, "slowest": slowest, "bytes": usage}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
