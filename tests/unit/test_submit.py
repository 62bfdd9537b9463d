"""Submitting exactly once: a queue and an sbatch that lie, fail or fall silent stand for Slurm's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from doccls.config import Config
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths
from launcher.cancel import cancel_run
from launcher.slurm import submit as room
from launcher.slurm.format import JobRequest, QueueEntry, SlurmError
from launcher.slurm.submissions import read_submissions
from launcher.slurm.submit import SubmitOptions, submit
from launcher.status import read_status

NOW = datetime(2026, 1, 2, 3, 4)
OPTIONS = SubmitOptions(JobRequest(1, 1, 4), "#!/bin/bash\n", 1, False, "again")


class Slurm:
    """Stands for the controller."""

    def __init__(self) -> None:
        self.queue: list[QueueEntry] = []
        self.answers = True
        self.takes = True
        self.says = True
        self.written_before: list[int] = []
        self.paths: RunPaths | None = None
        self.cancelled: list[str] = []

    def ask_queue(self) -> list[QueueEntry] | None:
        return list(self.queue) if self.answers else None

    def submit_script(self, command: Sequence[str], script: str) -> str:
        assert self.paths is not None
        self.written_before.append(len(read_submissions(self.paths.submissions)))
        told = dict(word[2:].split("=", 1) for word in command if "=" in word)
        if self.takes:
            job = str(100 + len(self.written_before))
            for fold in told["array"].split(","):
                self.queue.append(QueueEntry(job, int(fold), "PENDING", told["comment"], "Resources"))
            if self.says:
                return job
        raise SlurmError("sbatch failed (exit code 1): no word")

    def cancel_jobs(self, jobs: Sequence[str]) -> None:
        self.cancelled += jobs
        self.queue = [entry for entry in self.queue if entry.job not in jobs]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm()
    for module in ("slurm.submit", "status", "cancel"):
        monkeypatch.setattr(f"launcher.{module}.ask_queue", slurm.ask_queue)
    monkeypatch.setattr(room, "submit_script", slurm.submit_script)
    monkeypatch.setattr("launcher.cancel.cancel_jobs", slurm.cancel_jobs)
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    return slurm


@pytest.fixture
def submit_run(
    slurm: Slurm, tmp_path: Path, make_config: Callable[..., Config], make_data: Callable[..., Path]
) -> Callable[[], RunPaths]:
    """`submit_run()`: a run of three folds is submitted; its paths."""
    ids = [f"p{row}.png" for row in range(9)]
    make_data(ids, [str(row % 3) for row in range(9)], files=ids)
    config = make_config(data={"folds": 3}, train={"batch_size": 2}, output={"exp_dir": str(tmp_path / "exp")})

    def act() -> RunPaths:
        slurm.paths = RunPaths(config.output.exp_dir / "20260102" / "r")
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(RunLog(None))
            submit(config, "r", NOW, OPTIONS, log)
        return slurm.paths

    return act


def list_tasks(slurm: Slurm) -> list[str]:
    return [entry.job for entry in slurm.queue]


def test_an_array_is_written_down_before_slurm_is_asked_and_folds_on_their_way_are_not_sent_again(
    slurm: Slurm, submit_run: Callable[[], RunPaths]
) -> None:
    paths = submit_run()
    assert slurm.written_before == [1] and list_tasks(slurm) == ["101_0", "101_1", "101_2"]
    (one,) = read_submissions(paths.submissions)
    assert (one.job, one.folds, one.refused) == ("101", (0, 1, 2), None)
    submit_run()
    assert len(slurm.queue) == 3
    slurm.queue = [entry for entry in slurm.queue if entry.number != 1]  # it was cancelled
    submit_run()
    assert list_tasks(slurm) == ["101_0", "101_2", "102_1"]


def test_the_status_of_a_refused_submission_says_how_to_go_on(slurm: Slurm, submit_run: Callable[[], RunPaths]) -> None:
    slurm.takes = False
    with pytest.raises(SlurmError, match="the folds are not submitted"):
        submit_run()
    assert slurm.paths is not None and read_status(slurm.paths).again == "again"
    slurm.takes = True
    assert read_status(submit_run()).again is None, "the folds are on their way"


def test_a_lost_answer_is_found_in_the_queue(slurm: Slurm, submit_run: Callable[[], RunPaths]) -> None:
    slurm.says = False
    paths = submit_run()
    (one,) = read_submissions(paths.submissions)
    assert one.job == "101" and len(slurm.queue) == 3
    submit_run()
    assert len(slurm.queue) == 3


def test_a_lost_answer_and_a_silent_queue_leave_it_open_until_the_queue_is_there(
    slurm: Slurm, submit_run: Callable[[], RunPaths], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.says = False
    answers = iter([[]])
    monkeypatch.setattr(room, "ask_queue", lambda: next(answers, None))
    with pytest.raises(SlurmError, match=r"is not known\. The same command with --run-id r finds out"):
        submit_run()
    assert slurm.paths is not None
    (one,) = read_submissions(slurm.paths.submissions)
    assert (one.job, one.refused) == (None, None) and len(slurm.queue) == 3
    with pytest.raises(SlurmError, match="squeue does not answer: nothing was submitted"):
        submit_run()
    monkeypatch.setattr(room, "ask_queue", slurm.ask_queue)
    submit_run()
    assert len(slurm.queue) == 3 and [one.job for one in read_submissions(slurm.paths.submissions)] == ["101"]


def test_what_slurm_refuses_is_told_and_sent_again_the_next_time(
    slurm: Slurm, submit_run: Callable[[], RunPaths]
) -> None:
    slurm.takes = False
    with pytest.raises(SlurmError, match="the folds are not submitted: sbatch failed"):
        submit_run()
    slurm.takes = True
    paths = submit_run()
    assert [one.job for one in read_submissions(paths.submissions)] == [None, "102"]


def test_cancel_ends_exactly_the_runs_jobs(slurm: Slurm, submit_run: Callable[[], RunPaths]) -> None:
    paths = submit_run()
    other = QueueEntry("55", 0, "RUNNING", "doccls:another:abc", "None")
    slurm.queue += [other, QueueEntry("101", 9, "COMPLETED", "", "None")]
    said: list[str] = []
    cancel_run(paths, said.append)
    assert slurm.cancelled == ["101_0", "101_1", "101_2"] and other in slurm.queue
    assert said[-1] == "[CANCEL] stopped; what is finished stays"
