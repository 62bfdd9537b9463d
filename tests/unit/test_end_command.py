"""`--on-end`: the user's command gets the run's folder and the outcome, and its failure changes nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from doccls.errors import UserError
from doccls.system.signals import Interrupted
from launcher.end_command import EndCommand
from launcher.parser import build_parser
from tests.unit.conftest import KeptLog


@pytest.fixture
def note(tmp_path: Path) -> Path:
    """A program that writes its arguments to the file `noted`."""
    program = tmp_path / "note it"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{tmp_path}/noted"\nexit ${{CODE:-0}}\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("marker", "error", "outcome"),
    [
        ("TRAINING SUCCESS", None, "success"),
        ("SUBMITTED", None, "submitted"),
        ("INCOMPLETE missing=2,4", None, "incomplete"),
        ("TRAINING SUCCESS", UserError("no"), "failed"),
        ("TRAINING SUCCESS", Interrupted(signal.SIGTERM), "stopped"),
    ],
)
def test_command_gets_run_folder_and_outcome(
    note: Path, marker: str, error: BaseException | None, outcome: str
) -> None:
    log = KeptLog()
    log.opened = True
    try:
        with EndCommand(f"'{note}' --to '$HOME; me'", log) as end_command:
            end_command.run_folder = Path("/a run")
            log.end_as(marker, "")
            if error is not None:
                raise error
    except (UserError, Interrupted) as caught:
        assert caught is error
    assert (note.parent / "noted").read_text().splitlines() == ["--to", "$HOME; me", "/a run", outcome]


def test_failing_or_missing_command_gives_warning(
    note: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CODE", "3")
    for command, problem in ((f"'{note}'", "exit code 3"), ("/no/such/program", "No such file")):
        log = KeptLog()
        log.opened = True
        with EndCommand(command, log):
            pass
        printed = capsys.readouterr().err
        assert printed.startswith("[WARNING] --on-end ") and problem in printed


def test_without_command_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    log = KeptLog()
    log.opened = True
    with EndCommand(None, log):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["", "  ", "'open"])
def test_invalid_command_is_rejected(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["run", "--config", "c.yaml", "--on-end", command])
    assert "--on-end" in capsys.readouterr().err


def test_command_runs_when_launch_fails_before_its_run_is_known(note: Path) -> None:
    with pytest.raises(UserError), EndCommand(f"'{note}'", KeptLog()):
        raise UserError("no such config")
    assert (note.parent / "noted").read_text() == "\nfailed\n"


def test_command_does_not_run_for_task_with_nothing_to_do(note: Path) -> None:
    with EndCommand(f"'{note}'", KeptLog()):
        pass
    assert not (note.parent / "noted").exists()
