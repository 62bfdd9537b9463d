"""The live view of a launch at its terminal, below the lines of the log."""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from doccls.reporting.footer import Footer
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths
from launcher.live_files import LiveReader, Watched, WatchedRun, read_or_keep, watch_run
from launcher.live_table import Style, render_live
from launcher.progress import Progress

REFRESH_S = 1.0
_END_S = 1.0  # how long the launch waits for a reading that hangs, as on a lost file server


@contextmanager
def showing_progress(runs: Sequence[RunPaths], study: str | None, log: RunLog) -> Iterator[None]:
    """Show the folds of a run, or of the runs of a study, below the log while the block runs, on a terminal.

    A thread of its own reads the files and draws: neither a file server nor a terminal that does not answer delays the
    launch, and no error of the view ends it.
    """
    with log.footer() as footer:
        if footer is None:
            yield
            return
        if study is None:
            (paths,) = runs
            watched = watch_run(paths)
        else:
            watched = Watched(f"study {study}", tuple(WatchedRun(paths) for paths in runs))
        view = _View(watched.title, LiveReader(watched), footer)
        try:
            yield
        finally:
            view.end()
    if view.error is not None:
        log.line(f"[WARNING] the live view of the folds ended: {view.error}")


class _View:
    """Draws the progress every second, in a thread, until `end`."""

    def __init__(self, title: str, reader: LiveReader, footer: Footer) -> None:
        self.error: Exception | None = None
        self._reader, self._footer = reader, footer
        self._style = find_style(sys.stdout.encoding)
        self._progress = Progress(title, ())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="doccls-live-view", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads are allowed here
            self.error = error

    def end(self) -> None:
        """Draw no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def _run(self) -> None:
        try:
            self._draw()
            while not self._ended.wait(REFRESH_S):
                self._draw()
        except Exception as error:  # noqa: BLE001 (the launch goes on without the view)
            self.error = error

    def _draw(self) -> None:
        progress = self._progress = read_or_keep(self._reader.read, self._progress)
        width, height = self._footer.measure()
        self._footer.draw(render_live(progress, width - 1, choose_height(height), self._style))


def choose_height(terminal_lines: int) -> int:
    """Return how many lines the view may take: the log needs some, too."""
    return max(3, terminal_lines * 2 // 3)


def find_style(encoding: str | None) -> Style:
    """Return what the terminal can show, by its encoding and the variable NO_COLOR (https://no-color.org)."""
    try:
        "▁█".encode(encoding or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return Style(not os.environ.get("NO_COLOR"), has_bars=False)
    return Style(not os.environ.get("NO_COLOR"))
