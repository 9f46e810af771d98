"""What docs/benchmarks.md quotes, runnable by anyone."""

from __future__ import annotations

import sys


def note(message: str) -> None:
    """Say what a benchmark is at; its results alone go to stdout."""
    print(message, file=sys.stderr, flush=True)
