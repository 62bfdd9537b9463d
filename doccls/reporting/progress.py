"""Bars for work that takes long, and those who show them: the run's log, or a console without one."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_T = TypeVar("_T")


class ProgressBar:
    """A bar that is shown, or none."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar

    def advance(self) -> None:
        """One unit further."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def watch(self, items: Iterable[_T]) -> Iterator[_T]:
        """The items, with one unit further after each."""
        for item in items:
            yield item
            self.advance()


class Reporter(Protocol):
    """Who tells the user how far things are."""

    def line(self, text: str) -> None:
        """One line."""

    def progress(self, what: str, total: int) -> AbstractContextManager[ProgressBar]:
        """A bar while the block runs, if a terminal is there to show it."""


class ConsoleReporter:
    """Lines to stdout, bars to a terminal's stderr: for commands that write no log."""

    def line(self, text: str) -> None:
        """One line."""
        print(text, flush=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[ProgressBar]:
        """A bar while the block runs, if stderr is a terminal."""
        if not sys.stderr.isatty():
            yield ProgressBar(None)
            return
        with make_bar(Console(stderr=True), what, total) as bar:
            yield ProgressBar(bar)


def make_bar(console: Console, what: str, total: int) -> Progress:
    """A bar with one task, gone when it ends; it leaves stdout and stderr as they are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    bar.add_task(what, total=total)
    return bar
