"""The child process of `build_tokenizer_checked`: build one tokenizer under limits, try it, reply.

Reads a job as JSON from standard input, writes the files or an error as JSON to standard output.
The limits grow with the job: a small file gets seconds and little memory, whatever it says.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashlite.checkpoint.base import Checkpoint
from flashlite.checkpoint.convert_tokenizer import build_tokenizer, check_round_trip, check_template
from flashlite.checkpoint.hdf5_texts import tokenizer_from_texts
from flashlite.errors import FlashliteError, TemplateError

__all__ = ["main"]

_SECONDS = 2  # of processor time, and 4 more per MiB
_BYTES = 400 << 20  # of address space, and 100 bytes more per byte


def main() -> int:
    """Serve one job; the exit status is not 0 only when the limits struck."""
    data = sys.stdin.buffer.read()
    job = json.loads(data)
    _limit(len(data) + _tokenizer_bytes(Path(job["path"])))
    json.dump(_reply(job), sys.stdout)
    return 0


def _reply(job: dict[str, Any]) -> dict[str, Any]:
    checkpoint = Checkpoint(
        path=Path(job["path"]),
        format=job["format"],
        architecture=job["architecture"],
        metadata=job["metadata"],
        tensors={},
    )
    try:
        if (texts := job.get("texts")) is not None:
            files = check_template(tokenizer_from_texts(texts))
        else:
            files = build_tokenizer(checkpoint)
        check_round_trip(files, exact=checkpoint.format == "gguf")
    except FlashliteError as error:
        kind = "TemplateError" if isinstance(error, TemplateError) else "TokenizerError"
        return {"kind": kind, "error": str(error)}
    return {**asdict(files), "tokenizer_json": files.tokenizer_json.decode()}


def _tokenizer_bytes(path: Path) -> int:
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    return file.stat().st_size if file.is_file() else 0


def _limit(size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the deadline alone
        return
    seconds = int(time.process_time()) + _SECONDS + 4 * (size >> 20)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    memory = _BYTES + 100 * size
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(main())
