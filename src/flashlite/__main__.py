"""`python -m flashlite` is the command `flashlite`."""

from __future__ import annotations

import sys

from flashlite.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
