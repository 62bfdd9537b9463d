"""`doccls-launch logs`: the log that is asked for, until the run has ended, or which logs there are."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from test_status import LEDGER, OPEN

from doccls.run.paths import RunPaths
from doccls.system.atomic_files import write_text
from doccls.system.lock import hold_lock
from launcher import logs
from launcher.cli import main
from launcher.ledger import write_ledger
from launcher.slurm.array_jobs import ArrayJob, write_array_jobs
from launcher.slurm.format import QueueEntry


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run that was launched, with a log of the launch and of fold 1, which has two ranks."""
    paths = RunPaths(tmp_path / "20260102" / "r")
    for folder in (paths.live, paths.consoles, tmp_path / "logs"):
        folder.mkdir(parents=True)
    write_ledger(paths.ledger(), replace(LEDGER, attempts=(OPEN,), log=str(tmp_path / "logs" / "run.log")))
    (tmp_path / "logs" / "run.log").write_text("the launch: 영수증\n", encoding="utf-8")
    (tmp_path / "logs" / "old.log").write_text("an earlier attempt\n")
    (tmp_path / "logs" / "fold1.log").write_text("the fold\n")
    starts = "".join(f">> Logger started: {tmp_path / 'logs' / name}\nwords\n" for name in ("old.log", "fold1.log"))
    paths.console(1, 0).write_text(starts)
    paths.console(1, 1).write_text("the second rank\n")
    return paths


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "the launch: 영수증\n"),
        (("--fold", "1"), "the fold\n"),
        (("--fold", "1", "--rank", "1"), "the second rank\n"),
        (("-f",), "the launch: 영수증\n"),  # it has ended
        (("--fold", "1", "-f"), "the fold\n"),
    ],
)
def test_log(paths: RunPaths, words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(paths.root), *words]) == 0
    assert capsys.readouterr().out == text


def test_fold_that_started_no_log_has_its_console_output(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    paths.console(2, 0).write_text("no such module\n")
    assert main(["logs", str(paths.root), "--fold", "2"]) == 0
    assert capsys.readouterr().out == "no such module\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--fold", "3"), "has no log of fold 3 (there are of the launch: {logs}/run.log; fold 1: ranks 0, 1)"),
        (("--fold", "1", "--rank", "2"), "has no log of fold 1, rank 2: {root}/console/fold1_rank2.txt does not exist"),
        (("--rank", "1"), "--rank: say of which fold, with --fold K"),
    ],
)
def test_missing_log_says_what_exists(
    paths: RunPaths, words: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(paths.root), *words]) == 1
    assert problem.format(logs=paths.exp_dir / "logs", root=paths.root) in capsys.readouterr().err


def test_run_without_a_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(tmp_path)]) == 1
    assert "has no log of a launch (it was not launched with doccls-launch)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            "PENDING",
            "its tasks wait in Slurm's queue: fold 0, job 7_0 PENDING, Resources; fold 1, job 7_1 PENDING, Resources",
        ),
        ("RUNNING", "it was submitted to Slurm, and no task has begun a log; see doccls-launch status {root}"),
    ],
)
@pytest.mark.parametrize("words", [(), ("--fold", "1"), ("-f",)])
def test_run_whose_tasks_have_not_begun(
    tmp_path: Path, state: str, reason: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    paths = RunPaths(tmp_path / "r")
    write_text(paths.snapshot, "data: {folds: 3}\n")
    write_array_jobs(paths.array_jobs, [ArrayJob("token", (0, 1), "2026-01-02T03:04:00+00:00", "resume", "7")])
    queue = [QueueEntry("7", fold, state, "", "Resources") for fold in (0, 1)]
    monkeypatch.setattr("launcher.status_files.read_queue", lambda clusters: queue)
    assert main(["logs", str(paths.root), *words]) == 1
    what = "fold 1" if "--fold" in words else "a launch"
    assert f"has no log of {what} ({reason.format(root=paths.root)})" in capsys.readouterr().err


def follow(monkeypatch: pytest.MonkeyPatch, *events: Callable[[], object]) -> None:
    """Let one of the events happen in each pause of `logs -f`."""
    pending = iter(events)
    monkeypatch.setattr(logs.time, "sleep", lambda seconds: next(pending)())


def test_followed_log_ends_with_the_launch(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, encoded = paths.exp_dir / "logs" / "run.log", "증\n".encode()

    def append(text: bytes) -> None:
        with log.open("ab") as file:
            file.write(text)

    with ExitStack() as held:
        held.enter_context(hold_lock(paths.launch_lock(), "run r is being launched"))

        def end() -> None:
            append(b"last\n")
            held.close()

        follow(monkeypatch, lambda: append(encoded[:2]), lambda: append(encoded[2:]), end)
        assert main(["logs", str(paths.root), "-f"]) == 0
    assert capsys.readouterr().out == "the launch: 영수증\n증\nlast\n"


def test_followed_fold_goes_on_with_the_log_of_its_restart(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs_dir = paths.exp_dir / "logs"

    def restart() -> None:
        with (logs_dir / "fold1.log").open("a") as file:
            file.write("killed\n")
        (logs_dir / "again.log").write_text("resumed\n")
        with paths.console(1, 0).open("a") as file:
            file.write(f">> Logger started: {logs_dir / 'again.log'}\n")

    with ExitStack() as held:
        held.enter_context(hold_lock(paths.launch_lock(), "run r is being launched"))
        follow(monkeypatch, restart, held.close)
        assert main(["logs", str(paths.root), "--fold", "1", "--follow"]) == 0
    assert capsys.readouterr().out == f"the fold\nkilled\n==> {logs_dir / 'again.log'} <==\nresumed\n"


def test_following_ends_when_nobody_reads(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe, hold_lock(paths.launch_lock(), "run r is being launched"):
        monkeypatch.setattr(sys, "stdout", pipe)
        follow(monkeypatch)  # it must not wait even once
        assert main(["logs", str(paths.root), "-f"]) == 128 + signal.SIGPIPE
