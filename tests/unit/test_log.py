"""The log has its first and last lines, always an exit marker, and everything that is printed."""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doccls.errors import UserError
from doccls.reporting.console import exit_code
from doccls.reporting.log import RunLog
from doccls.system.signals import Interrupted, attributing_errors_to_stop, handling_signals, stopping_gracefully


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "run.log"


def test_log_has_first_line_success_marker_and_closing_line(path: Path) -> None:
    with RunLog(path) as log:
        log.line("[CFG] a=1")
    lines = path.read_text().splitlines()
    assert lines[0].startswith(">> Logger started: ") and str(path) in lines[0]
    assert lines[1:] == ["[CFG] a=1", "[EXIT] TRAINING SUCCESS code=0", ">> Stopping logger and restoring stdio"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("fix this"), 1),
        (RuntimeError("broken"), 1),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
    ],
)
def test_error_is_logged_with_traceback_and_marker_and_propagates(path: Path, error: BaseException, code: int) -> None:
    stdio = sys.stdout, sys.stderr
    with pytest.raises(type(error)) as caught, RunLog(path):
        raise error
    assert caught.value is error
    assert (sys.stdout, sys.stderr) == stdio
    assert exit_code(error) == code
    lines = path.read_text().splitlines()
    assert lines[-2:] == [f"[EXIT] TRAINING ERROR code={code}", ">> Stopping logger and restoring stdio"]
    assert lines[1] == "Traceback (most recent call last):"
    assert any(type(error).__name__ in line for line in lines[2:-2])
    assert "SUCCESS" not in path.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_requested_stop_is_logged_without_traceback(
    path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    with pytest.raises(Interrupted), RunLog(path):
        raise Interrupted(number)
    marker = f"[EXIT] TRAINING ERROR code={128 + number}"
    assert path.read_text().splitlines()[1:] == [
        f"{number.name} received", marker, ">> Stopping logger and restoring stdio"
    ]  # fmt: skip
    console = capsys.readouterr()
    assert marker in console.out and console.err == ""


def test_error_after_stop_request_has_its_traceback_only_in_the_file(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(Interrupted),
        RunLog(path),
        handling_signals(),
        stopping_gracefully(),
        attributing_errors_to_stop(),
    ):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed")
    text = path.read_text()
    assert "DataLoader worker is killed" in text and "Traceback" in text
    assert text.splitlines()[-2] == "[EXIT] TRAINING ERROR code=143"
    console = capsys.readouterr()
    assert "Traceback" not in console.out + console.err


def test_user_error_shows_no_traceback_on_the_console(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError), RunLog(path):
        raise UserError("fix this")
    console = capsys.readouterr()
    assert "Traceback" not in console.out + console.err
    assert "Traceback" in path.read_text() and "fix this" in path.read_text()


def test_defect_shows_its_traceback_on_the_console(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), RunLog(path):
        raise RuntimeError("broken")
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_printed_output_goes_to_console_and_file_in_order(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(path) as log:
        print("one")
        print("two", file=sys.stderr)
        sys.stdout.write("three\n")
        log.line("four\nfive")
        log.detail("six")
        sys.stdout.flush()
    print("outside")
    console = capsys.readouterr()
    assert path.read_text().splitlines()[1:7] == ["one", "two", "three", "four", "five", "six"]
    assert console.out.splitlines()[1:6] == ["one", "three", "four", "five", "six"]
    assert console.err == "two\n"
    assert "outside" not in path.read_text()


def test_line_is_in_the_file_immediately(path: Path) -> None:
    with RunLog(path) as log:
        log.line("now")
        assert "now\n" in path.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, which is a full disk")
def test_full_disk_is_reported_once_and_stops_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    with RunLog(path) as log:
        for number in range(3):
            log.line(f"[STEP {number}]")
    console = capsys.readouterr()
    steps = [line for line in console.out.splitlines() if line.startswith("[STEP")]
    assert steps == ["[STEP 0]", "[STEP 1]", "[STEP 2]"]
    assert console.err == f"[WARNING] {path}: No space left on device; continuing without this log file\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, which is a full disk")
def test_console_on_a_full_disk_stops_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as console, monkeypatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stdout", console)
        with RunLog(path) as log:
            log.line("[STEP 1]")
            print("output of a library", flush=True)
            sys.stdout.flush()
    assert "[STEP 1]\noutput of a library\n[EXIT] TRAINING SUCCESS code=0\n" in path.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, which is a full disk")
@pytest.mark.parametrize("program", ["doccls.train", "launcher"])
def test_console_on_a_full_disk_does_not_change_the_exit_code(tmp_path: Path, program: str) -> None:
    """Python itself would exit with code 120 if it can't flush stdout."""
    subcommand = ["run"] if program == "launcher" else []
    command = [sys.executable, "-m", program, *subcommand, "--config", "no such file.yaml"]
    with open("/dev/full", "w") as full:  # noqa: PTH123 (a device)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
        assert done.returncode == 1 and done.stderr.startswith("[EXIT][ERROR] training failed: "), done.stderr
        assert subprocess.run(command, stdout=full, stderr=full, check=False, timeout=60).returncode == 1
    closed = ["bash", "-c", 'exec "$@" >&-', "bash", *command]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("[EXIT][ERROR] training failed: "), done.stderr


def test_second_run_in_the_same_minute_appends(path: Path) -> None:
    for word in ("alpha", "omega"):
        with RunLog(path) as log:
            log.line(word)
    text = path.read_text()
    assert text.count(">> Logger started: ") == 2 and text.index("alpha") < text.index("omega")


def test_other_processes_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stdio = sys.stdout, sys.stderr
    with RunLog(None) as log:
        log.line("silent")
        log.detail("silent")
        with log.progress("fold", 3) as bar:
            bar.advance()
        assert (sys.stdout, sys.stderr) == stdio
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_error_in_a_silent_log_propagates_silently(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), RunLog(None):
        raise RuntimeError("broken")
    assert capsys.readouterr() == ("", "")


def test_progress_bar_leaves_no_control_codes_in_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with RunLog(path) as log:
        with log.progress("fold 0", 3) as bar:
            for step in range(3):
                log.line(f"line [red]{step}[/red]")
                log.detail(f"detail {step}")
                print("half", end="")
                print(" and other half")
                bar.advance()
            print("unfinished", end="")
        log.line(" end")
    text = path.read_text()
    assert "\x1b" not in text and "\r" not in text and "━" not in text
    body = [line for step in range(3) for line in (f"line [red]{step}[/red]", f"detail {step}", "half and other half")]
    assert text.splitlines()[1:11] == [*body, "unfinished end"]
    console = out.getvalue() + err.getvalue()
    assert "\x1b" in console and "line [red]2[/red]" in console and "detail" not in console
    assert "unfinished end" in console


def test_without_a_terminal_detail_lines_replace_the_bar(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(path) as log, log.progress("fold 0", 2) as bar:
        log.detail("[STEP 1/2]")
        bar.advance()
    console = capsys.readouterr()
    assert "[STEP 1/2]" in console.out and "\x1b" not in console.out + console.err


def test_error_under_a_progress_bar_still_closes_the_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(RuntimeError), RunLog(path) as log, log.progress("fold", 2):
        raise RuntimeError("broken")
    assert path.read_text().splitlines()[-2:] == [
        "[EXIT] TRAINING ERROR code=1", ">> Stopping logger and restoring stdio"
    ]  # fmt: skip


def test_logging_handler_may_use_the_stream_after_the_log_is_closed(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries create log handlers during a run and use them until the process exits."""
    with RunLog(path):
        handler = logging.StreamHandler(sys.stderr)
        stream = sys.stdout
    stream.write("late line\n")
    stream.flush()
    handler.emit(logging.LogRecord("x", logging.WARNING, "", 0, "late record", None, None))
    console = capsys.readouterr()
    assert "late line" in console.out and "late record" in console.err
    assert "AssertionError" not in console.err and "late" not in path.read_text()


def test_replaced_streams_behave_like_text_streams(path: Path) -> None:
    with RunLog(path):
        assert isinstance(sys.stdout.isatty(), bool)
        assert sys.stdout.encoding
        assert sys.stdout.write("abc\n") == 4
        sys.stdout.writelines(["a\n", "b\n"])
        assert sys.stdout.writable()
    assert "abc\na\nb\n" in path.read_text()


def test_file_name_that_is_not_unicode_does_not_stop_the_run(path: Path) -> None:
    """File names may contain bytes that are not UTF-8, which Python decodes to lone surrogates."""
    with RunLog(path) as log:
        log.line("bad \udcff name")
    assert "bad" in path.read_text()
