"""The end of a command: exit code, markers and closing messages of the main process and of other ranks."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from doccls.errors import RankLocalError, UserError
from doccls.reporting.command import run_command, run_training
from doccls.reporting.log import RunLog
from doccls.system.signals import Interrupted

Console = pytest.CaptureFixture[str]
Training = Callable[[RunLog], None]
MARKER = "[EXIT] TRAINING ERROR code={}\n"
FAILED = "[EXIT][ERROR] training failed: {}\n"
OF_RANK = f"[EXIT][ERROR] rank 1 on {socket.gethostname()} failed: {{}}\n"


def fail_with(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


def train_with(error: BaseException, path: Path | None = None) -> Training:
    """Return a training that raises the error, either with the log open at `path` or before it is opened."""

    def train(log: RunLog) -> None:
        if path is None:
            raise error
        with log.writing_to(path):
            raise error

    return train


# --- a command without a log -----------------------------------------------------------------------------------------


def test_command_returns_exit_code_and_prints_nothing(capsys: Console) -> None:
    assert run_command("doccls x", lambda: 3) == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "rank", "message"),
    [
        (UserError("fix this"), 0, "doccls x: fix this\n"),
        (UserError("fix this"), 1, ""),
        (RankLocalError("mine"), 1, "doccls x: mine\n"),
    ],
)
def test_user_error_is_reported_once(error: UserError, rank: int, message: str, capsys: Console) -> None:
    assert run_command("doccls x", fail_with(error), rank) == 1
    assert capsys.readouterr() == ("", message)


def test_control_c_prints_no_traceback(capsys: Console) -> None:
    assert run_command("doccls x", fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "doccls x: interrupted\n")


def test_defect_of_a_command_propagates() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("doccls x", lambda: 1 // 0)


# --- a command that trains -------------------------------------------------------------------------------------------


def test_successful_training_ends_with_markers_and_message(tmp_path: Path, capsys: Console) -> None:
    def train(log: RunLog) -> None:
        with log.writing_to(tmp_path / "log"):
            log.line("[DONE]")

    assert run_training(train) == 0
    console = capsys.readouterr()
    assert console.err == ""
    assert console.out.splitlines()[-4:] == [
        "[DONE]",
        "[EXIT] TRAINING SUCCESS code=0",
        ">> Stopping logger and restoring stdio",
        "[EXIT] training finished successfully (see logs/* for details)",
    ]


def test_training_without_a_log_prints_nothing(capsys: Console) -> None:
    assert run_training(lambda log: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [UserError("fix this"), Interrupted(signal.SIGTERM)])
@pytest.mark.parametrize("opened", [False, True])
def test_expected_error_has_one_marker_and_no_traceback(
    error: BaseException, opened: bool, tmp_path: Path, capsys: Console
) -> None:
    code = 143 if isinstance(error, Interrupted) else 1
    assert run_training(train_with(error, tmp_path / "log" if opened else None)) == code
    console = capsys.readouterr()
    assert console.out.count(MARKER.format(code)) == 1
    assert console.err == FAILED.format(error)


@pytest.mark.parametrize("opened", [False, True])
def test_defect_shows_one_traceback_on_the_console(opened: bool, tmp_path: Path, capsys: Console) -> None:
    assert run_training(train_with(KeyError("a defect"), tmp_path / "log" if opened else None)) == 1
    console = capsys.readouterr()
    assert console.out.count(MARKER.format(1)) == 1
    assert console.err.count("Traceback") == 1 and console.err.endswith(FAILED.format("'a defect'"))


def test_defect_after_the_log_was_closed_shows_a_traceback(tmp_path: Path, capsys: Console) -> None:
    def train(log: RunLog) -> None:
        with log.writing_to(tmp_path / "log"):
            pass
        raise KeyError("a defect")

    assert run_training(train) == 1
    console = capsys.readouterr()
    assert "[EXIT] training finished" not in console.out
    assert console.err.count("Traceback") == 1 and console.err.endswith(FAILED.format("'a defect'"))


def test_other_rank_reports_only_its_own_errors(capsys: Console) -> None:
    for error, tracebacks, message in (
        (UserError("fix this"), 0, ""),
        (Interrupted(signal.SIGTERM), 0, ""),
        (RankLocalError("mine"), 0, OF_RANK.format("mine")),
        (KeyError("a defect"), 1, OF_RANK.format("'a defect'")),
    ):
        assert run_training(train_with(error), rank=1) == (143 if isinstance(error, Interrupted) else 1)
        console = capsys.readouterr()
        assert console.out == "" and console.err.count("Traceback") == tracebacks
        assert console.err.endswith(message) and (console.err == message or tracebacks)
