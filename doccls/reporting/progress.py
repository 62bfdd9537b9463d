"""Progress bars for long work, and the reporter interface that the run's log and the plain console implement."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_T = TypeVar("_T")


class ProgressBar:
    """A progress bar, or a placeholder that shows nothing."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar

    def advance(self) -> None:
        """Advance the bar by one unit."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def watch(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield the items, and advance the bar after each."""
        for item in items:
            yield item
            self.advance()


class Reporter(Protocol):
    """A destination for messages and progress."""

    def line(self, text: str) -> None:
        """Report one line."""

    def progress(self, what: str, total: int) -> AbstractContextManager[ProgressBar]:
        """Show a progress bar while the block runs, if there is a terminal."""


class ConsoleReporter:
    """A reporter for commands without a log: lines go to stdout, progress bars to stderr."""

    def line(self, text: str) -> None:
        """Print one line to stdout."""
        print(text, flush=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[ProgressBar]:
        """Show a progress bar while the block runs, if stderr is a terminal."""
        if not sys.stderr.isatty():
            yield ProgressBar(None)
            return
        with make_bar(Console(stderr=True), what, total) as bar:
            yield ProgressBar(bar)


def make_bar(console: Console, what: str, total: int) -> Progress:
    """Return a bar with one task that disappears when done, and does not redirect stdout or stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    bar.add_task(what, total=total)
    return bar
