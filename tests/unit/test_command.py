"""How a command ends: exit code, markers and last words, of the main process and of others."""

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
Act = Callable[[RunLog], None]
MARKER = "[EXIT] TRAINING ERROR code={}\n"
FAILED = "[EXIT][ERROR] training failed: {}\n"
OF_RANK = f"[EXIT][ERROR] rank 1 on {socket.gethostname()} failed: {{}}\n"


def fail_with(error: BaseException) -> Callable[[], int]:
    def act() -> int:
        raise error

    return act


def train_with(error: BaseException, path: Path | None = None) -> Act:
    """Meet the error: with the log open at `path`, or before there is one."""

    def act(log: RunLog) -> None:
        if path is None:
            raise error
        with log.writing_to(path):
            raise error

    return act


# --- a command without a log -----------------------------------------------------------------------------------------


def test_a_command_gives_its_exit_code_and_says_nothing(capsys: Console) -> None:
    assert run_command("doccls x", lambda: 3) == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "rank", "told"),
    [
        (UserError("mend this"), 0, "doccls x: mend this\n"),
        (UserError("mend this"), 1, ""),
        (RankLocalError("mine"), 1, "doccls x: mine\n"),
    ],
)
def test_what_a_user_did_is_reported_once(error: UserError, rank: int, told: str, capsys: Console) -> None:
    assert run_command("doccls x", fail_with(error), rank) == 1
    assert capsys.readouterr() == ("", told)


def test_control_c_is_no_traceback(capsys: Console) -> None:
    assert run_command("doccls x", fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "doccls x: interrupted\n")


def test_a_defect_of_a_command_is_left_to_python() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("doccls x", lambda: 1 // 0)


# --- a command that trains -------------------------------------------------------------------------------------------


def test_a_training_that_ends_well_says_so_last(tmp_path: Path, capsys: Console) -> None:
    def act(log: RunLog) -> None:
        with log.writing_to(tmp_path / "log"):
            log.line("[DONE]")

    assert run_training(act) == 0
    console = capsys.readouterr()
    assert console.err == ""
    assert console.out.splitlines()[-4:] == [
        "[DONE]",
        "[EXIT] TRAINING SUCCESS code=0",
        ">> Stopping logger and restoring stdio",
        "[EXIT] training finished successfully (see logs/* for details)",
    ]


def test_where_there_is_nothing_to_train_no_end_is_marked(capsys: Console) -> None:
    assert run_training(lambda log: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [UserError("mend this"), Interrupted(signal.SIGTERM)])
@pytest.mark.parametrize("opened", [False, True])
def test_an_expected_end_has_one_marker_and_no_traceback(
    error: BaseException, opened: bool, tmp_path: Path, capsys: Console
) -> None:
    code = 143 if isinstance(error, Interrupted) else 1
    assert run_training(train_with(error, tmp_path / "log" if opened else None)) == code
    console = capsys.readouterr()
    assert console.out.count(MARKER.format(code)) == 1
    assert console.err == FAILED.format(error)


@pytest.mark.parametrize("opened", [False, True])
def test_a_defect_is_traced_once_on_the_console(opened: bool, tmp_path: Path, capsys: Console) -> None:
    assert run_training(train_with(KeyError("a defect"), tmp_path / "log" if opened else None)) == 1
    console = capsys.readouterr()
    assert console.out.count(MARKER.format(1)) == 1
    assert console.err.count("Traceback") == 1 and console.err.endswith(FAILED.format("'a defect'"))


def test_a_defect_after_the_log_was_closed_is_traced_too(tmp_path: Path, capsys: Console) -> None:
    def act(log: RunLog) -> None:
        with log.writing_to(tmp_path / "log"):
            pass
        raise KeyError("a defect")

    assert run_training(act) == 1
    console = capsys.readouterr()
    assert "[EXIT] training finished" not in console.out
    assert console.err.count("Traceback") == 1 and console.err.endswith(FAILED.format("'a defect'"))


def test_another_rank_reports_only_what_it_meets_alone(capsys: Console) -> None:
    for error, traced, told in (
        (UserError("mend this"), 0, ""),
        (Interrupted(signal.SIGTERM), 0, ""),
        (RankLocalError("mine"), 0, OF_RANK.format("mine")),
        (KeyError("a defect"), 1, OF_RANK.format("'a defect'")),
    ):
        assert run_training(train_with(error), rank=1) == (143 if isinstance(error, Interrupted) else 1)
        console = capsys.readouterr()
        assert console.out == "" and console.err.count("Traceback") == traced
        assert console.err.endswith(told) and (console.err == told or traced)
