"""`--on-end`: the user's command is told the run's folder and how the launch ended, and changes nothing itself."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from doccls.errors import UserError
from doccls.system.signals import Interrupted
from launcher.arguments import build_parser
from launcher.end_command import EndCommand
from tests.unit.conftest import KeptLog


@pytest.fixture
def note(tmp_path: Path) -> Path:
    """A program that notes its arguments in `noted`."""
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
def test_it_is_told_how_the_launch_ended(note: Path, marker: str, error: BaseException | None, outcome: str) -> None:
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


def test_one_that_fails_or_is_not_there_is_a_warning(
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


def test_without_a_command_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    log = KeptLog()
    log.opened = True
    with EndCommand(None, log):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["", "  ", "'open"])
def test_what_is_no_command_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["run", "--config", "c.yaml", "--on-end", command])
    assert "--on-end" in capsys.readouterr().err


def test_a_launch_that_fails_before_its_run_is_known_is_told_of_too(note: Path) -> None:
    with pytest.raises(UserError), EndCommand(f"'{note}'", KeptLog()):
        raise UserError("no such config")
    assert (note.parent / "noted").read_text() == "\nfailed\n"


def test_a_task_that_had_nothing_to_do_is_not_told_of(note: Path) -> None:
    with EndCommand(f"'{note}'", KeptLog()):
        pass
    assert not (note.parent / "noted").exists()
