"""Progress that a person sees in a terminal and that a log can hold: a bar there, a line at every tenth here."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Steps:
    """A job of `total` equal steps, of which `before` were done earlier; `advance` may be called from several threads."""

    def __init__(self, console: Console, title: str, total: int, before: int = 0) -> None:
        self._console, self._title, self._total, self._before = console, title, total, before
        self._done, self._began, self._told = before, time.monotonic(), 10 * before // total if total else 0
        self._lock = threading.Lock()
        self._bar: Progress | None = None

    def __enter__(self) -> Steps:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        with self._lock:
            self._reach(self._done + steps)

    def reach(self, done: int) -> None:
        """Say how many steps are done by now."""
        with self._lock:
            self._reach(done)

    def _reach(self, done: int) -> None:
        self._done = done
        if self._bar:
            self._bar.update(self._task, completed=done)
            return
        tenth = 10 * done // self._total if self._total else 10
        if tenth > self._told:
            self._told = tenth
            self._console.print(f"  {escape(self._title)}: {self._line()}", highlight=False, soft_wrap=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._began
        rate = (self._done - self._before) / seconds if seconds else 0.0
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate and self._done < self._total else ""
        return f"{self._done:,} of {self._total:,}  ({seconds:.0f} s, {_a_second(rate)}{left})"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_a_second(speed) if speed else "", style="progress.data.speed")


def _a_second(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
