"""`doccls-launch status RUN --watch`: the live view of a run or a study from another shell, until nothing runs."""

import os
import sys
import time
from typing import Any

from doccls.errors import UserError
from doccls.reporting.console import wrap_stream
from doccls.reporting.footer import Footer, can_redraw
from launcher.live_files import LiveReader, Watched
from launcher.live_table import render_live
from launcher.live_view import REFRESH_S, find_style
from launcher.progress import Progress, describe_totals, list_events
from launcher.status import describe_status

_UNREADABLE_S = 60.0  # a launch that replaces its files needs far less


def watch(watched: Watched) -> None:
    """Show the folds until none runs or waits: as a table on a terminal, elsewhere as a line for each event.

    Raises:
        UserError: there is no run in a folder, or its files are damaged.
        KeyboardInterrupt: the user has seen enough.
    """
    reader = LiveReader(watched)
    show = _show_table if can_redraw(wrap_stream(sys.stdout, "stdout"), os.environ) else _show_events
    show(reader, reader.read())


def render_watched(watched: Watched) -> str:
    """Render the folds as they are now, and the commands that train the missing ones.

    Raises:
        UserError: see `watch`.
    """
    reader = LiveReader(watched)
    commands = dict.fromkeys(filter(None, (status.resume_command for status in reader.read_statuses())))
    totals, *lines = render_live(reader.read())
    lines += [f"[STATUS] to train the missing folds: {command}" for command in commands]
    return "\n".join([f"[STATUS] {totals}", *lines])


def describe_watched(watched: Watched) -> dict[str, Any]:
    """Return the status of each run as JSON values.

    Raises:
        UserError: see `watch`.
    """
    return {"title": watched.title, "runs": [describe_status(run) for run in LiveReader(watched).read_statuses()]}


class _Follower:
    """Reads the progress again and again, as far as it can be read."""

    def __init__(self, reader: LiveReader) -> None:
        self._reader, self._failed_s = reader, float("inf")

    def read(self, kept: Progress) -> Progress:
        """Return the progress, or that of before while it can't be read.

        Raises:
            UserError: that has lasted for a minute, as in a folder that was deleted.
        """
        try:
            progress = self._reader.read()
        except OSError:  # a file server that does not answer
            return kept
        except UserError:
            self._failed_s = min(self._failed_s, time.monotonic())
            if time.monotonic() - self._failed_s > _UNREADABLE_S:
                raise
            return kept
        self._failed_s = float("inf")
        return progress


def _show_table(reader: LiveReader, progress: Progress) -> None:
    console = wrap_stream(sys.stdout, "stdout")
    footer, style, follower = Footer(console), find_style(console.encoding), _Follower(reader)
    try:
        while True:
            width, height = footer.measure()
            footer.draw(render_live(progress, width - 1, max(3, height - 1), style))
            if not progress.is_active or console.error is not None:
                return
            time.sleep(REFRESH_S)
            progress = follower.read(progress)
    finally:
        footer.close(erase=False)


def _show_events(reader: LiveReader, progress: Progress) -> None:
    console, before, follower = wrap_stream(sys.stdout, "stdout"), None, _Follower(reader)
    while True:
        for line in list_events(before, progress):
            print(f"[STATUS] {line}", flush=True)
        if not progress.is_active or console.error is not None:
            break
        time.sleep(REFRESH_S)
        before, progress = progress, follower.read(progress)
    print(f"[STATUS] {describe_totals(progress)}", flush=True)
