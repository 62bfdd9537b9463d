"""The live view below a log: it is shown while the block runs, and no error of it ends the block."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from terminals import show
from test_footer import Terminal
from test_live_files import begin, paths

from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths
from launcher import live_view
from launcher.live_table import Style
from launcher.live_view import choose_height, find_style, showing_progress

__all__ = ["paths"]  # a fixture


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Print to a terminal until the end of the test."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


def test_folds_are_shown_while_the_block_runs(paths: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(paths)
    terminal = use_terminal(monkeypatch)
    drawn, draw = threading.Event(), live_view._View._draw

    def draw_and_say(view: live_view._View) -> None:
        draw(view)
        drawn.set()

    monkeypatch.setattr(live_view._View, "_draw", draw_and_say)
    with RunLog(tmp_path / "log") as log:
        with showing_progress([paths], None, log):
            assert drawn.wait(20)
            assert "run s-r: 1 of 4 folds done, 1 lost, 2 missing" in show(terminal.getvalue())
        assert not any(line.startswith("run s-r") for line in show(terminal.getvalue()))
    assert not any(thread.name == "doccls-live-view" for thread in threading.enumerate())


def fail_to_draw(view: object) -> None:
    raise ValueError("broken")


def fail_to_start(thread: object) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("target", "name", "fail", "problem"),
    [
        (live_view._View, "_draw", fail_to_draw, "broken"),
        (live_view.threading.Thread, "start", fail_to_start, "can't start new thread"),
    ],
)
def test_error_of_the_view_is_a_warning(
    paths: RunPaths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: type,
    name: str,
    fail: Callable[..., None],
    problem: str,
) -> None:
    use_terminal(monkeypatch)
    with RunLog(tmp_path / "log") as log:
        monkeypatch.setattr(target, name, fail)
        with showing_progress([paths], None, log):
            log.line("trains")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[1:3] == ["trains", f"[WARNING] the live view of the folds ended: {problem}"]


def test_without_a_terminal_no_thread_is_started(paths: RunPaths, tmp_path: Path) -> None:
    with RunLog(tmp_path / "log") as log, showing_progress([paths], None, log):
        assert not any(thread.name == "doccls-live-view" for thread in threading.enumerate())


def test_some_lines_are_left_for_the_log() -> None:
    assert [choose_height(lines) for lines in (2, 24, 60)] == [3, 16, 40]


@pytest.mark.parametrize(
    ("encoding", "no_color", "style"),
    [
        ("utf-8", "", Style(has_colour=True)),
        (None, "1", Style()),
        ("ascii", "", Style(has_colour=True, has_bars=False)),
        ("latin-1", "1", Style(has_bars=False)),
        ("no such encoding", "1", Style(has_bars=False)),
    ],
)
def test_style(encoding: str | None, no_color: str, style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    assert find_style(encoding) == style
