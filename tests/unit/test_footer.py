"""The footer on a terminal: it is redrawn in place, other output scrolls above it, and a bad terminal stops nothing."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminals import show

from doccls.reporting import console as console_module
from doccls.reporting import footer as footer_module
from doccls.reporting.console import ConsoleStream, guarding_console
from doccls.reporting.footer import Footer, can_redraw
from doccls.reporting.log import RunLog


class Terminal(io.StringIO):
    """A terminal without a descriptor."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def footer(terminal: Terminal) -> Footer:
    return Footer(ConsoleStream(terminal, "stdout"))


def test_lines_are_replaced_in_place(terminal: Terminal, footer: Footer) -> None:
    footer.draw(["total", "fold 0", "fold 1"])
    footer.draw(["sum", "fold 0 done"])
    assert show(terminal.getvalue()) == ["sum", "fold 0 done", ""]
    footer.draw(["sum", "fold 0", "fold 1", "fold 2"])
    assert show(terminal.getvalue()) == ["sum", "fold 0", "fold 1", "fold 2", ""]


def test_other_output_scrolls_above(terminal: Terminal, footer: Footer) -> None:
    footer.write("before\n")
    footer.draw(["total", "fold 0"])
    footer.write("one\ntwo\n")
    footer.write("ha")
    assert show(terminal.getvalue()) == ["before", "one", "two", "total", "fold 0", ""]
    footer.write("lf\n")
    assert show(terminal.getvalue()) == ["before", "one", "two", "half", "total", "fold 0", ""]
    footer.write("unfinished")
    footer.close()
    footer.write(" line\n")
    assert show(terminal.getvalue()) == ["before", "one", "two", "half", "unfinished line", ""]


def test_closed_footer_draws_no_more(terminal: Terminal, footer: Footer) -> None:
    footer.draw(["total"])
    footer.close(erase=False)
    footer.draw(["late"])
    footer.write("line\n")
    assert show(terminal.getvalue())[-2:] == ["line", ""] and "late" not in terminal.getvalue()


def test_hidden_footer_makes_room(terminal: Terminal, footer: Footer) -> None:
    footer.draw(["total"])
    with footer.hidden():
        footer.draw(["hidden"])
        assert show(terminal.getvalue()) == [""]
    footer.draw(["shown"])
    assert show(terminal.getvalue()) == ["shown", ""]


@pytest.mark.parametrize("writes_first", [False, True])
def test_message_that_confirms_a_signal_is_kept(
    terminal: Terminal, footer: Footer, monkeypatch: pytest.MonkeyPatch, writes_first: bool
) -> None:
    """It is written past the footer by another thread, before or after the first line of the stop."""
    now_s = [100.0]
    monkeypatch.setattr(footer_module.time, "monotonic", lambda: now_s[0])
    footer.draw(["total", "fold 0"])
    monkeypatch.setattr(footer_module, "stop_requested", lambda: 2)
    lines = ["SIGINT received\n", "stopping fold 0\n"]
    if writes_first:
        footer.write(lines[1])
        footer.draw(["too early"])
    terminal.write(lines[0])
    if not writes_first:
        footer.write(lines[1])
        footer.draw(["too early"])
    now_s[0] += 1.0
    footer.draw(["total", "fold 1"])
    footer.write("stopped\n")
    between = ["stopping fold 0", "SIGINT received"] if writes_first else ["SIGINT received", "stopping fold 0"]
    assert show(terminal.getvalue()) == ["total", "fold 0", *between, "stopped", "total", "fold 1", ""]


def test_terminals_that_can_not_move_the_cursor_get_lines(terminal: Terminal, tmp_path: Path) -> None:
    console = ConsoleStream(terminal, "stdout")
    assert can_redraw(console, {"TERM": "xterm-256color"})
    assert not any(can_redraw(console, variables) for variables in ({}, {"TERM": "dumb"}, {"TERM": "unknown"}))
    with (tmp_path / "file").open("w") as file:
        assert not can_redraw(ConsoleStream(file, "stdout"), {"TERM": "xterm"})


# --- a real terminal -------------------------------------------------------------------------------------------------


@pytest.fixture
def pty() -> Iterator[tuple[int, int]]:
    """The descriptors of a terminal's two ends: the emulator's and the program's."""
    ends = os.openpty()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_size_is_that_of_the_terminal(pty: tuple[int, int]) -> None:
    fcntl.ioctl(pty[1], termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    with os.fdopen(os.dup(pty[1]), "w") as stream:
        assert Footer(ConsoleStream(stream, "stdout")).measure() == (100, 30)
        fcntl.ioctl(pty[1], termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
        assert Footer(ConsoleStream(stream, "stdout")).measure() == (80, 24)
    assert Footer(ConsoleStream(io.StringIO(), "stdout")).measure() == (80, 24)


def test_terminal_that_takes_nothing_at_the_moment_is_left_alone(pty: tuple[int, int]) -> None:
    """As after Ctrl-S. Nothing of the patience for the log is used up."""
    with os.fdopen(os.dup(pty[1]), "w") as stream:
        console = ConsoleStream(stream, "stdout")
        footer = Footer(console)
        termios.tcflow(pty[1], termios.TCOOFF)
        footer.draw(["total", "fold 0"])
        assert console.error is None and console.patience_s == console_module.PATIENCE_S
        termios.tcflow(pty[1], termios.TCOON)
        footer.draw(["total", "fold 1"])
        assert show(os.read(pty[0], 4096).decode().replace("\r\n", "\n")) == ["total", "fold 1", ""]


def test_terminal_that_hangs_up_stops_nothing(
    pty: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(os.dup(pty[1]), "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        with guarding_console(), RunLog(tmp_path / "log") as log, log.footer() as footer:
            assert footer is not None
            footer.draw(["total"])
            os.close(pty[0])
            log.line("one")
            footer.draw(["total"])
            log.line("two")
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("[WARNING] std")]
    assert lines[1:4] == ["one", "two", "[EXIT] TRAINING SUCCESS code=0"]


# --- below a log -----------------------------------------------------------------------------------------------------


def test_log_scrolls_above_the_footer_and_its_file_has_only_lines(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with RunLog(tmp_path / "log") as log:
        with log.footer() as footer:
            assert footer is not None
            footer.draw(["total", "fold 0"])
            log.line("one")
            print("two", file=sys.stderr)
            assert show(terminal.getvalue())[1:] == ["one", "two", "total", "fold 0", ""]
            with log.progress("merge", 2) as bar:
                footer.draw(["hidden"])
                bar.advance()
                log.line("three")
            footer.draw(["total", "fold 1"])
        log.line("four")
    text = (tmp_path / "log").read_text()
    assert "\x1b" not in text and "total" not in text
    assert text.splitlines()[1:5] == ["one", "two", "three", "four"]
    assert "hidden" not in terminal.getvalue()
    assert show(terminal.getvalue())[-4:-1] == [
        "four", "[EXIT] TRAINING SUCCESS code=0", ">> Stopping logger and restoring stdio",
    ]  # fmt: skip


def test_console_that_is_no_terminal_has_no_footer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with RunLog(tmp_path / "log") as log, log.footer() as footer:
        assert footer is None
    monkeypatch.setattr(sys, "stdout", terminal)
    with RunLog(None) as log, log.footer() as footer:
        assert footer is None
    monkeypatch.setenv("TERM", "dumb")
    with RunLog(tmp_path / "log") as log, log.footer() as footer:
        assert footer is None
