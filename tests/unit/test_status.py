"""The status of a run: by fold predictions first, then by active processes, then by the last attempt."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from doccls.oof.predictions import FoldPredictions, PredictionsInfo, write_predictions
from doccls.run.heartbeat import Beat, Heartbeat
from doccls.run.paths import RunPaths
from doccls.system import holder
from doccls.system.atomic_files import write_text
from doccls.system.lock import hold_lock
from launcher.cli import main
from launcher.ledger import Attempt, Ledger, write_ledger
from launcher.slurm.format import QueueEntry
from launcher.status import FoldEvidence, State, describe_fold, list_unfinished, render_status
from launcher.status_files import read_status

BEFORE, BEGUN, LATER = (f"2026-01-02T03:0{minute}:00.000+00:00" for minute in (1, 4, 6))
LEDGER = Ledger(
    run_id="r", fingerprint="id", num_folds=4, folds=(0, 1, 2), ranks_per_fold=2, host="h", pid=7,
    resume_command="doccls-launch run --config c.yaml --run-id r", started=BEGUN, log="/logs/run.log",
)  # fmt: skip
OPEN = Attempt(1, 2, "gpu 0", ("GPU-a",), 8, LATER, pids=(12,))
FAILED = replace(OPEN, ended=LATER, outcome="crashed", then="failed", message="rank 1 was killed\n  | last words")
TRAINS = Beat("elsewhere", 5, "train", fold=1, epoch=2, step=14)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "20260102" / "r")
    paths.live.mkdir(parents=True)
    return paths


def finish(
    paths: RunPaths, fold: int, fingerprint: str = "id", name: int | None = None, macro_f1_damaged: float | None = None
) -> None:
    info = PredictionsInfo(
        fingerprint=fingerprint, fold=fold, num_folds=4, num_samples=8, classes=("x", "y"), ids=("a", "b"), skipped=(),
        best_epoch=1, macro_f1=0.75, macro_f1_damaged=macro_f1_damaged,
        damage="none" if macro_f1_damaged is None else "scan",
    )  # fmt: skip
    rows = np.array([2 * fold, 2 * fold + 1])
    logits = np.zeros((2, 2), np.float32)
    damaged = None if macro_f1_damaged is None else logits
    predictions = FoldPredictions(info, rows, logits, np.zeros(2, np.int64), damaged)
    write_predictions(paths.predictions(fold if name is None else name), predictions)


# --- one fold --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evidence", "launching", "state"),
    [
        (FoldEvidence(), True, State.WAITING),
        (FoldEvidence(), False, State.MISSING),
        (FoldEvidence(attempts=(OPEN,)), True, State.RUNNING),
        (FoldEvidence(attempts=(OPEN,)), False, State.LOST),
        (FoldEvidence(attempts=(OPEN,), beats=(TRAINS,)), False, State.LOST),
        (FoldEvidence(beats=(TRAINS,), owned=True, alive=True), False, State.RUNNING),  # trained by hand
        (FoldEvidence(owned=True), False, State.WAITING),  # the process trains another fold first
        (FoldEvidence(attempts=(FAILED,)), True, State.FAILED),
        (FoldEvidence(attempts=(FAILED,)), False, State.FAILED),
        (FoldEvidence(attempts=(replace(FAILED, started=BEFORE),)), True, State.WAITING),  # failed in an earlier launch
        (FoldEvidence(attempts=(replace(FAILED, then="waiting"),)), True, State.WAITING),
        (FoldEvidence(attempts=(replace(FAILED, then="waiting"),)), False, State.MISSING),
        (FoldEvidence(attempts=(replace(FAILED, outcome="stopped", then="stopped"),)), False, State.STOPPED),
        (FoldEvidence(attempts=(replace(FAILED, outcome="lost", then="waiting"),)), False, State.LOST),
        (FoldEvidence(attempts=(replace(FAILED, outcome="done", then="done"),), damage="torn"), False, State.MISSING),
    ],
)
def test_fold_state(evidence: FoldEvidence, launching: bool, state: State) -> None:
    assert describe_fold(1, evidence, LEDGER, launching).state is state
    assert describe_fold(1, replace(evidence, macro_f1=0.5), LEDGER, launching).state is State.DONE


def test_fold_outside_launch_is_missing() -> None:
    assert describe_fold(3, FoldEvidence(), LEDGER, launching=True).state is State.MISSING


def test_remark_is_progress_of_slowest_rank_or_last_error() -> None:
    beats = (TRAINS, replace(TRAINS, phase="validate", step=13))
    assert (
        describe_fold(1, FoldEvidence(attempts=(OPEN,), beats=beats), LEDGER, True).remark
        == "validate step 13, epoch 2"
    )
    assert describe_fold(1, FoldEvidence(attempts=(OPEN,)), LEDGER, True).remark == "startup (imports, weights)"
    assert describe_fold(1, FoldEvidence(attempts=(FAILED,)), LEDGER, True).remark == FAILED.message
    assert describe_fold(1, FoldEvidence(damage="torn"), None, False).remark == "torn"
    assert describe_fold(1, FoldEvidence(macro_f1=0.5, attempts=(FAILED,)), None, False).remark is None


# --- a run -----------------------------------------------------------------------------------------------------------


def test_status_of_launched_run(paths: RunPaths) -> None:
    write_ledger(paths.ledger(), replace(LEDGER, attempts=(replace(OPEN, fold=0, number=1), OPEN)))
    finish(paths, 0)
    heartbeat = Heartbeat()
    heartbeat.write_to(paths.heartbeat(1, 0))
    heartbeat.beat(phase="train", fold=1, epoch=2, step=14)
    now = datetime(2026, 1, 2, 3, 6, 45, tzinfo=UTC)
    with hold_lock(paths.launch_lock(), "run r is being launched"):
        status = read_status(paths)
        assert render_status(status, now).splitlines() == [
            f"[STATUS] run {paths.root}",
            f"[STATUS] {status.launchers[0]}",
            "fold  state    on     attempt  macro_f1",
            "0     done     gpu 0  1        0.75000",
            "1     running  gpu 0  1                  train step 14, epoch 2, started 45 s ago",
            "2     waiting",
            "3     missing",
            "[STATUS] 1 of 4 folds done, not merged",
        ]
    assert f"by process {os.getpid()} on {socket.gethostname()}" in str(status.launchers[0])
    heartbeat.end()
    lines = render_status(read_status(paths), now).splitlines()
    assert lines[1] == "[STATUS] no launcher is active"
    assert [line.split()[1] for line in lines[3:7]] == ["done", "lost", "missing", "missing"]
    assert lines[-1] == f"[STATUS] to train the missing folds: {LEDGER.resume_command}"


def test_fold_is_running_only_while_beating_process_holds_its_lock(paths: RunPaths) -> None:
    """The process ID of a killed process may be reused."""
    write_ledger(paths.ledger(), replace(LEDGER, attempts=(OPEN,)))
    heartbeat = Heartbeat()
    heartbeat.write_to(paths.heartbeat(1, 0))
    heartbeat.beat(phase="train", fold=1, epoch=2, step=14)
    assert [str(fold.state) for fold in read_status(paths).folds][:2] == ["missing", "lost"]
    with hold_lock(paths.fold_lock(1), "fold 1 is being trained"), hold_lock(paths.fold_lock(2), "fold 2, later"):
        assert [str(fold.state) for fold in read_status(paths).folds][:3] == ["missing", "running", "waiting"]
    assert str(read_status(paths).folds[1].state) == "lost"


def test_fold_with_unkillable_process_has_failed(paths: RunPaths) -> None:
    """The process still holds the fold's lock; once another process holds it, the fold is running."""
    with hold_lock(paths.fold_lock(1), "fold 1 is being trained"):
        for pid, state in ((os.getpid(), "failed"), (os.getpid() + 1, "running")):
            attempt = replace(FAILED, outcome="unkillable", message="rank 0 could not be killed", pids=(pid,))
            write_ledger(paths.ledger(), replace(LEDGER, host=socket.gethostname(), attempts=(attempt,)))
            heartbeat = Heartbeat()
            heartbeat.write_to(paths.heartbeat(1, 0))
            heartbeat.beat(phase="train", fold=1, epoch=2, step=14)
            assert str(read_status(paths).folds[1].state) == state


def test_finished_run_has_no_resume_command(paths: RunPaths) -> None:
    write_ledger(paths.ledger(), LEDGER)
    for fold in range(4):
        finish(paths, fold)
    assert not read_status(paths).merged
    paths.summary.touch()
    status = read_status(paths)
    assert status.merged and status.resume_command is None
    assert render_status(status, datetime.now(UTC)).endswith("4 of 4 folds done, merged")


def test_run_trained_without_launcher(paths: RunPaths) -> None:
    finish(paths, 2)
    heartbeat = Heartbeat()
    heartbeat.write_to(paths.heartbeat(None, 0))
    heartbeat.beat(phase="validate", fold=3, epoch=1, step=9)
    states = [State.MISSING, State.MISSING, State.DONE, State.RUNNING]
    with hold_lock(paths.fold_lock(3), "fold 3 is being trained"):
        assert [fold.state for fold in read_status(paths).folds] == states, "predictions give the number of folds"
    paths.predictions(2).unlink()
    write_text(paths.snapshot, "data: {folds: 5}\n")
    with hold_lock(paths.fold_lock(3), "fold 3 is being trained"):
        states = [State.MISSING] * 3 + [State.RUNNING, State.MISSING]
        assert [fold.state for fold in read_status(paths).folds] == states


@pytest.mark.parametrize(
    ("damage", "message"),
    [("torn", "can't be read"), ("fold", "of another fold"), ("fingerprint", "another experiment")],
)
def test_invalid_predictions_are_reported(paths: RunPaths, damage: str, message: str) -> None:
    write_ledger(paths.ledger(), LEDGER)
    if damage == "torn":
        write_text(paths.predictions(1), "torn")
    else:
        finish(paths, 2 if damage == "fold" else 1, "other" if damage == "fingerprint" else "id", name=1)
    fold = read_status(paths).folds[1]
    assert fold.state is State.MISSING and message in str(fold.remark)


def test_score_on_damaged_pages_has_a_column_where_there_is_one(paths: RunPaths) -> None:
    write_ledger(paths.ledger(), LEDGER)
    finish(paths, 0, macro_f1_damaged=0.5)
    lines = render_status(read_status(paths), datetime(2026, 1, 2, tzinfo=UTC)).splitlines()
    assert lines[2:5] == [
        "fold  state    on  attempt  macro_f1  damaged",
        "0     done                  0.75000   0.50000",
        "1     missing",
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def test_json_status(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_ledger(paths.ledger(), replace(LEDGER, attempts=(FAILED,)))
    assert main(["status", "--json", str(paths.root)]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["launchers"], status["merged"], status["resume_command"]) == ([], False, LEDGER.resume_command)
    assert status["folds"][1] == {
        "fold": 1, "state": "failed", "macro_f1": None, "macro_f1_damaged": None, "slot": "gpu 0", "attempts": 1,
        "since": LATER, "remark": FAILED.message, "log": None,
    }  # fmt: skip


@pytest.mark.parametrize(("folder", "message"), [("20260102/r", "no run in "), ("gone", "RUN: no such run folder: ")])
@pytest.mark.parametrize("command", ["status", "cancel"])
def test_missing_run_is_rejected(
    paths: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, folder: str, message: str
) -> None:
    if command == "cancel" and folder != "gone":
        message = "no launcher or job of run "
    assert main([command, str(tmp_path / folder)]) == 1
    assert f"doccls-launch {command}: {message}" in capsys.readouterr().err


def test_launcher_of_another_user_machine_or_container_cannot_be_cancelled(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_lock(paths.launch_lock(), "run r is being launched"):
        signalled: list[int] = []

        def kill(pid: int, number: int) -> None:
            if number:  # 0 only asks whether the process exists
                signalled.append(pid)
            raise PermissionError

        monkeypatch.setattr(os, "kill", kill)
        assert main(["cancel", str(paths.root)]) == 1 and signalled == [os.getpid()]
        assert "it belongs to another user; only that user can cancel it" in capsys.readouterr().err
        for function, module in (("gethostname", socket), ("_read_boot", holder), ("_read_namespace", holder)):
            with monkeypatch.context() as patch:
                patch.setattr(module, function, lambda: "another")
                assert main(["cancel", str(paths.root)]) == 1 and len(signalled) == 1, "a foreign process was killed"
            assert "cancel it there, on that machine and in the same container" in capsys.readouterr().err


def test_array_tasks_have_their_own_ledgers_and_locks(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold 1 failed in an earlier launch and is trained by an array task now; the task of fold 2 failed."""
    monkeypatch.setattr("launcher.status_files.read_queue", lambda clusters: [])
    write_ledger(paths.ledger(), replace(LEDGER, started=BEFORE, attempts=(replace(FAILED, started=BEFORE),)))
    task = replace(LEDGER, folds=(1,), job="12_1", attempts=(replace(OPEN, slot="node 0 gpu 0"),))
    write_ledger(paths.ledger(1), task)
    failed = replace(FAILED, fold=2, message="a defect\n  | last words", log="/logs/fold2.log")
    write_ledger(paths.ledger(2), replace(LEDGER, folds=(2,), job="12_2", attempts=(failed,)))
    finish(paths, 0)
    with hold_lock(paths.launch_lock(1), "run r, task 12_1 of Slurm, is being launched"):
        status = read_status(paths)
        assert [str(fold.state) for fold in status.folds] == ["done", "running", "failed", "missing"]
        assert status.folds[1].slot == "node 0 gpu 0" and status.folds[1].attempts == 2
        assert len(status.launchers) == 1 and status.resume_command is None
    assert list_unfinished(read_status(paths)) == [
        "- fold 1: lost", "- fold 2: failed, a defect, log: /logs/fold2.log", "- fold 3: missing"
    ]  # fmt: skip


# --- Slurm's queue ---------------------------------------------------------------------------------------------------


WAITS = "job 12_1 PENDING, Resources"


def queued(state: str) -> QueueEntry:
    return QueueEntry("12", 1, state, "", "Resources")


@pytest.mark.parametrize(
    ("evidence", "state", "remark"),
    [
        (FoldEvidence(submitted=True, queued=queued("PENDING")), State.WAITING, WAITS),
        (FoldEvidence(submitted=True, queued=queued("RUNNING")), State.RUNNING, "job 12_1 RUNNING"),
        (FoldEvidence(submitted=True, queued=queued("NODE_FAIL")), State.FAILED, "job 12_1 NODE_FAIL"),
        (FoldEvidence(submitted=True, queued=queued("ODD")), State.UNKNOWN, "job 12_1 ODD"),
        (FoldEvidence(submitted=True, queued=queued("CANCELLED")), State.MISSING, "job 12_1 CANCELLED"),
        (FoldEvidence(submitted=True, queued=queued("PREEMPTED")), State.STOPPED, "job 12_1 was preempted"),
        (
            FoldEvidence(submitted=True, attempts=(OPEN,), queued=queued("PREEMPTED")),
            State.STOPPED,
            "job 12_1 was preempted",
        ),
        (FoldEvidence(submitted=True, queue_answers=False), State.UNKNOWN, "Slurm does not answer (squeue)"),
        (FoldEvidence(submitted=True), State.MISSING, None),
        (
            FoldEvidence(submitted=True, attempts=(OPEN,), queued=queued("PENDING")),
            State.WAITING,
            "job 12_1 PENDING, Resources",
        ),
        (FoldEvidence(submitted=True, attempts=(OPEN,), queued=queued("TIMEOUT")), State.FAILED, "job 12_1 TIMEOUT"),
        (FoldEvidence(submitted=True, attempts=(FAILED,), queued=queued("FAILED")), State.FAILED, FAILED.message),
    ],
)
def test_queue_gives_state_where_no_launcher_is_active(
    evidence: FoldEvidence, state: State, remark: str | None
) -> None:
    status = describe_fold(1, evidence, None, launching=False)
    assert (status.state, status.remark) == (state, remark)
    assert describe_fold(1, replace(evidence, macro_f1=0.5), None, launching=False).state is State.DONE
