"""Progress that a person sees in a terminal and that a log can hold: a bar there, a line at every tenth here."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Steps:
    """A job of `total` equal steps; `advance` may be called from several threads."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._done, self._began, self._told = 0, time.monotonic(), 0
        self._lock = threading.Lock()
        self._bar: Progress | None = None

    def __enter__(self) -> Steps:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        self.reach(self._done + steps)

    def reach(self, done: int) -> None:
        """Say how many steps are done by now."""
        with self._lock:
            self._done = done
            if self._bar:
                self._bar.update(self._task, completed=done)
                return
            tenth = 10 * done // self._total if self._total else 10
            if tenth > self._told:
                self._told = tenth
                seconds = time.monotonic() - self._began
                self._console.print(
                    f"  {escape(self._title)}: {done:,} of {self._total:,}  ({seconds:.0f} s)", highlight=False, soft_wrap=True
                )
