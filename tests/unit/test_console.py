"""A console that takes no output, or not all of it, fails nothing; the log file says so once and has everything."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from doccls.reporting import console as console_module
from doccls.reporting.command import run_command
from doccls.reporting.console import ConsoleStream, guarding_console, wrap_stream
from doccls.reporting.log import RunLog

WARNING = "[WARNING] stdout: {}; continuing: this file has everything"


@contextmanager
def broken_pipe() -> Iterator[TextIO]:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stream:
        yield stream


@contextmanager
def hung_up_terminal() -> Iterator[TextIO]:
    master, slave = os.openpty()
    os.close(master)
    with os.fdopen(slave, "w") as stream:
        yield stream


@contextmanager
def full_disk() -> Iterator[TextIO]:
    with open("/dev/full", "w") as stream:  # noqa: PTH123 (a device)
        yield stream


@contextmanager
def closed_descriptor() -> Iterator[TextIO]:
    number = 500  # no other file will get it
    os.dup2(2, number)
    stream = os.fdopen(number, "w")
    os.close(number)
    yield stream
    stream.close()  # no error: it was replaced by the null device


@contextmanager
def closed_stream() -> Iterator[TextIO]:
    stream = open(os.devnull, "w")  # noqa: SIM115, PTH123
    stream.close()
    yield stream


@contextmanager
def stuck(blocking: bool = True) -> Iterator[TextIO]:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    try:
        while os.write(write_end, b"x" * 4096):
            pass
    except BlockingIOError:
        os.set_blocking(write_end, blocking)
    with os.fdopen(write_end, "w") as stream, os.fdopen(read_end):
        yield stream


@contextmanager
def non_blocking() -> Iterator[TextIO]:
    with stuck(blocking=False) as stream:
        yield stream


LOST: dict[str, tuple[Callable[[], AbstractContextManager[TextIO]], str]] = {
    "broken pipe": (broken_pipe, "Broken pipe"),
    "hung-up terminal": (hung_up_terminal, "Input/output error"),
    "full disk": (full_disk, "No space left on device"),
    "closed descriptor": (closed_descriptor, "Bad file descriptor"),
    "closed stream": (closed_stream, "it was closed"),
    "stuck reader": (stuck, "nobody reads it"),
    "EAGAIN": (non_blocking, "nobody reads it"),
}


@pytest.mark.parametrize("kind", LOST)
def test_lost_console_fails_nothing_and_the_log_says_so_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, problem = LOST[kind]
    monkeypatch.setattr(console_module, "PATIENCE_S", 0.01)
    with make() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with guarding_console():
            with RunLog(tmp_path / "log") as log:
                for step in range(3):
                    log.line(f"[STEP {step}]")
                print("a library")
                logging.StreamHandler(sys.stdout).emit(logging.LogRecord("x", 30, "", 0, "a logger", None, None))
                sys.stdout.flush()
                assert sys.stdout.isatty() in (False, True)
            print("after the log")
        assert sys.stdout is stream
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("[WARNING]")] == [WARNING.format(problem)]
    lines.remove(WARNING.format(problem))
    steps = [f"[STEP {step}]" for step in range(3)]
    assert lines[1:] == [*steps, "a library", "a logger", "[EXIT] TRAINING SUCCESS code=0",
                         ">> Stopping logger and restoring stdio"]  # fmt: skip


@pytest.mark.parametrize("kind", LOST)
def test_traceback_on_a_lost_stderr_raises_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "PATIENCE_S", 0.01)
    with LOST[kind][0]() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with guarding_console():
            try:
                raise RuntimeError("broken")
            except RuntimeError:
                traceback.print_exc()
            print("more", file=sys.stderr, flush=True)


def test_terminal_that_hangs_up_under_a_progress_bar_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        with guarding_console(), RunLog(tmp_path / "log") as log, log.progress("fold", 3) as bar:
            log.line("one")
            os.close(master)
            bar.advance()
            log.line("two")
            log.detail("three")
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("[WARNING] std")]
    assert lines[1:5] == ["one", "two", "three", "[EXIT] TRAINING SUCCESS code=0"]


def test_missing_streams_become_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has None for a stream that was closed when it started, and prints what goes to None on stdout."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        with guarding_console():
            print("lost")
            sys.stderr.write("lost\n")
            assert not sys.stdout.isatty() and sys.stdout.encoding
        assert sys.stdout is None


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"\uc601\uc218\uc99d"), ("latin-1", r"\uc601\uc218\uc99d"), ("euc-kr", "영수증"), ("utf-8", "영수증")],
)
@pytest.mark.parametrize("has_descriptor", [True, False])
def test_characters_that_the_encoding_lacks_are_escaped(
    encoding: str, shown: str, has_descriptor: bool, tmp_path: Path
) -> None:
    path = tmp_path / "console"
    raw = path.open("w", encoding=encoding) if has_descriptor else io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with raw as stream:
        console = ConsoleStream(stream, "stdout")
        console.write("class 영수증 \udcff\n")
        assert console.error is None
        written = path.read_bytes() if has_descriptor else stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert written.decode(encoding) == f"class {shown} \\udcff\n"


def test_output_returns_when_the_reader_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "PATIENCE_S", 0.01)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as reader, os.fdopen(write_end, "w") as stream:
        console = ConsoleStream(stream, "stdout")
        while console.error is None:
            console.write("x" * 4095 + "\n")
        console.write("one\ntwo\n")
        os.set_blocking(read_end, False)
        while reader.read(65536):
            pass
        console.write("three\n")
        assert reader.read(65536) == b"\n[WARNING] 3 lines are missing here\nthree\n"
        console.write("four\n")
        assert reader.read(65536) == b"four\n"
        assert console.take_problem() == "nobody reads it" and console.take_problem() is None


def test_lines_are_written_at_once_and_unfinished_ones_when_flushed(tmp_path: Path) -> None:
    path = tmp_path / "console"
    with path.open("w") as stream:
        stream.write("before, ")
        console = ConsoleStream(stream, "stdout")
        print("one", 2, file=console)
        assert path.read_text() == "before, one 2\n"
        console.write("half")
        assert path.read_text() == "before, one 2\n"
        console.flush()
        console.writelines([" and half\n", "x" * 10_000])
        assert path.read_text() == "before, one 2\nhalf and half\n" + "x" * 10_000
        console.close()
        assert not stream.closed


def test_closed_stream_whose_number_is_reused_writes_into_no_other_file(tmp_path: Path) -> None:
    stream = (tmp_path / "console").open("w")
    console = wrap_stream(stream, "stdout")
    number = stream.fileno()
    stream.close()
    with (tmp_path / "weights").open("w") as file:
        assert file.fileno() == number
        console.write("text\n")
        console.close()
    assert (tmp_path / "weights").read_text() == "" and str(console.error) == "it was closed"
    assert not console.isatty()


def test_discarded_console_fails_no_child() -> None:
    with broken_pipe() as stream:
        console = ConsoleStream(stream, "stdout")
        console.write("lost\n")
        assert os.write(stream.fileno(), b"a child's output") == 16


# --- commands whose output is their result ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("broken pipe", 141, ""),
        ("full disk", 1, "doccls x: stdout: No space left on device\n"),
        ("hung-up terminal", 1, "doccls x: stdout: Input/output error\n"),
    ],
)
def test_command_that_prints_fails_if_its_output_is_lost(
    kind: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def print_result() -> int:
        print("a result", end="")
        return 0

    with LOST[kind][0]() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with guarding_console():
            assert run_command("doccls x", print_result, prints=True) == code
            assert run_command("doccls x", lambda: 3, prints=True) == 3, "its own failure"
        patch.setattr(sys, "stdout", stream)
        with guarding_console():
            assert run_command("doccls x", print_result) == 0, "a command that also writes files"
    assert capsys.readouterr().err == message


def test_command_that_prints_waits_for_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "PATIENCE_S", 0.0)
    limits: list[float | None] = []

    def write(descriptor: int, text: bytes, limit_s: float | None) -> float:
        limits.append(limit_s)
        return 0.0

    monkeypatch.setattr(console_module, "write_within", write)
    with open(os.devnull, "w") as stream, monkeypatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stdout", stream)
        with guarding_console():
            assert run_command("doccls x", lambda: print("x") or 0, prints=True) == 0
        with guarding_console():
            assert run_command("doccls x", lambda: print("x") or 0) == 0
    assert limits == [None, 0.0]


def test_errno_of_a_full_disk_keeps_the_console() -> None:
    """Once the disk has room again, so has the console."""
    with full_disk() as stream:
        console = ConsoleStream(stream, "stdout")
        console.write("lost\n")
        with pytest.raises(OSError) as caught:
            os.write(stream.fileno(), b"x")
        assert caught.value.errno == errno.ENOSPC


class Minimal:
    """A logger's stream, which has nothing but what `print` needs."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


class Notebook(Minimal):
    """A notebook's stream: its descriptor is that of the terminal in which the server runs."""

    encoding = "utf-8"

    def __init__(self, terminal: int) -> None:
        super().__init__()
        self._terminal = terminal

    def fileno(self) -> int:
        return self._terminal

    def flush(self) -> None:
        pass


def test_streams_of_notebooks_and_loggers_get_the_output(tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("wb") as terminal:
        for stream in (Minimal(), Notebook(terminal.fileno())):
            console = ConsoleStream(stream, "stdout")  # type: ignore[arg-type]
            console.write("one\ntwo")
            console.flush()
            assert stream.text == "one\ntwo" and console.error is None and not console.isatty()
    assert (tmp_path / "terminal").read_bytes() == b""


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), BrokenPipeError()])
def test_stream_that_fails_in_any_way_ends_nothing(error: Exception, tmp_path: Path) -> None:
    class Broken(Notebook):
        def write(self, text: str) -> int:
            raise error

    with (tmp_path / "terminal").open("wb") as terminal:
        ConsoleStream(Broken(terminal.fileno()), "stdout").write("lost\n")  # type: ignore[arg-type]
        assert os.fstat(terminal.fileno()).st_ino == (tmp_path / "terminal").stat().st_ino, "not the null device"


@pytest.mark.parametrize(
    ("console", "code", "message"),
    [(full_disk, 1, "doccls: stdout: No space left on device\n"), (broken_pipe, 141, "")],
)
def test_help_that_cannot_be_printed_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    console: Callable[[], AbstractContextManager[TextIO]],
    code: int,
    message: str,
) -> None:
    for words, expected in ((["--help"], code), (["--unknown"], 2)):
        with console() as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as end, guarding_console():
                argparse.ArgumentParser(prog="doccls").parse_args(words)
        assert end.value.code == expected
        assert capsys.readouterr().err.endswith(message if words == ["--help"] else "arguments: --unknown\n")
