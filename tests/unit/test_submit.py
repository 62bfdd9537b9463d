"""Exactly-once submission, with a fake queue and sbatch that give wrong answers, fail or do not answer."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from doccls.config import Config
from doccls.errors import UserError
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, write_predictions
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths
from doccls.system.lock import hold_lock
from doccls.system.signals import Interrupted
from launcher.cancel import cancel_run, cancel_study
from launcher.slurm import submit as submit_module
from launcher.slurm import watch as watch_module
from launcher.slurm.array_jobs import read_array_jobs
from launcher.slurm.format import LostAnswerError, QueueEntry, SlurmError, Submitted
from launcher.slurm.run import submit
from launcher.slurm.script import JobRequest
from launcher.slurm.submit import SubmitOptions, SubmittedRun, open_submitted_run, read_queue_of, submit_missing
from launcher.slurm.watch import Watch
from launcher.standings import measure_runs
from launcher.status_files import read_status
from launcher.study_file import Member, Study, locate_update_lock, write_study
from tests.unit.conftest import KeptLog

NOW = datetime(2026, 1, 2, 3, 4)
OPTIONS = SubmitOptions(JobRequest(1, 1, 4), "#!/bin/bash\n", 1, "resume")


class Slurm:
    """Fake of the controller."""

    def __init__(self) -> None:
        self.queue: list[QueueEntry] = []
        self.queue_answers = True
        self.accepts = True
        self.replies = True
        self.recorded_before: list[int] = []
        self.paths: RunPaths
        self.cancelled: list[str] = []
        self.now_s = 0.0
        self.polled_s: list[float] = []
        self.polled_clusters: tuple[str, ...] = ()
        self.cluster: str | None = None
        self.events: dict[float, Callable[[], object]] = {}

    def read_queue(self, clusters: Sequence[str]) -> list[QueueEntry] | None:
        self.polled_s.append(self.now_s)
        self.polled_clusters = tuple(clusters)
        return list(self.queue) if self.queue_answers else None

    def submit_script(self, command: Sequence[str], script: str) -> Submitted:
        self.recorded_before.append(len(read_array_jobs(self.paths.array_jobs)))
        options = dict(word[2:].split("=", 1) for word in command if "=" in word)
        if self.accepts:
            job = str(100 + len(self.recorded_before))
            for fold in options["array"].split(","):
                self.queue.append(QueueEntry(job, int(fold), "PENDING", options["comment"], "Resources", self.cluster))
            if self.replies:
                return Submitted(job, self.cluster)
            raise LostAnswerError("sbatch failed (exit code 1): timed out")
        raise SlurmError("sbatch failed (exit code 1): Invalid partition")

    def cancel_jobs(self, entries: Sequence[QueueEntry]) -> None:
        self.cancelled += [entry.job for entry in entries]
        self.queue = [entry for entry in self.queue if entry not in entries]

    def set_state(self, state: str, *jobs: str) -> None:
        self.queue = [replace(entry, state=state) if entry.job in jobs else entry for entry in self.queue]

    def sleep(self, seconds: float) -> None:
        """Advance the clock, and trigger the events that are due."""
        self.now_s += seconds
        for due_s in [due_s for due_s in self.events if due_s <= self.now_s]:
            self.events.pop(due_s)()


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm()
    for module in ("slurm.submit", "slurm.watch", "status_files", "cancel"):
        monkeypatch.setattr(f"launcher.{module}.read_queue", slurm.read_queue)
    monkeypatch.setattr(submit_module, "submit_script", slurm.submit_script)
    monkeypatch.setattr("doccls.model.build.fetch_pretrained", lambda config, img_size: Path("/the cache"))
    monkeypatch.setattr("launcher.cancel.cancel_jobs", slurm.cancel_jobs)
    clock = SimpleNamespace(sleep=slurm.sleep, monotonic=lambda: slurm.now_s)  # not the clock of other threads
    monkeypatch.setattr(submit_module, "time", clock)
    monkeypatch.setattr(watch_module, "time", clock)
    monkeypatch.setattr("launcher.cancel.time", clock)
    return slurm


@pytest.fixture
def config(tmp_path: Path, make_config: Callable[..., Config], make_data: Callable[..., Path]) -> Config:
    """Config of three folds."""
    ids = [f"p{row}.png" for row in range(9)]
    make_data(ids, [str(row % 3) for row in range(9)], files=ids)
    return make_config(data={"folds": 3}, train={"batch_size": 2}, output={"exp_dir": str(tmp_path / "exp")})


Submit = Callable[..., RunPaths]


@pytest.fixture
def submit_run(slurm: Slurm, config: Config) -> Submit:
    """`submit_run()` submits a run of three folds, waits for it with `wait`, and returns its paths."""

    def submit_once(wait: bool = False, log: RunLog | None = None) -> RunPaths:
        slurm.paths = RunPaths(config.output.exp_dir / "20260102" / "r")
        submit(config, "r", NOW, OPTIONS, wait, log or KeptLog())
        return slurm.paths

    return submit_once


def list_tasks(slurm: Slurm) -> list[str]:
    return [entry.job for entry in slurm.queue]


def test_array_is_recorded_before_sbatch_and_active_folds_are_not_resubmitted(slurm: Slurm, submit_run: Submit) -> None:
    paths = submit_run()
    assert slurm.recorded_before == [1] and list_tasks(slurm) == ["101_0", "101_1", "101_2"]
    (array_job,) = read_array_jobs(paths.array_jobs)
    assert (array_job.job, array_job.folds, array_job.refused) == ("101", (0, 1, 2), None)
    submit_run()
    assert len(slurm.queue) == 3
    slurm.queue = [entry for entry in slurm.queue if entry.number != 1]  # as if it was cancelled
    submit_run()
    assert list_tasks(slurm) == ["101_0", "101_2", "102_1"]


def test_status_of_refused_submission_shows_resume_command(slurm: Slurm, submit_run: Submit) -> None:
    slurm.accepts = False
    with pytest.raises(SlurmError, match="the folds were not submitted"):
        submit_run()
    assert read_status(slurm.paths).resume_command == "resume"
    slurm.accepts = True
    assert read_status(submit_run()).resume_command is None, "the folds are pending"


def test_lost_answer_is_found_in_queue(slurm: Slurm, submit_run: Submit) -> None:
    slurm.replies = False
    paths = submit_run()
    (array_job,) = read_array_jobs(paths.array_jobs)
    assert array_job.job == "101" and len(slurm.queue) == 3
    assert slurm.polled_s == [0.0, 15.0], "before the submission, and once after it"
    submit_run()
    assert len(slurm.queue) == 3


def test_job_that_seemed_refused_is_not_submitted_twice(slurm: Slurm, submit_run: Submit) -> None:
    slurm.accepts = False
    with pytest.raises(SlurmError, match="Invalid partition"):
        submit_run()
    assert slurm.polled_s == [0.0], "Slurm has answered: no need to search the queue"
    (refused,) = read_array_jobs(slurm.paths.array_jobs)
    for fold in range(3):
        slurm.queue.append(QueueEntry("100", fold, "PENDING", f"doccls:r:{refused.token}", "Resources"))
    paths = submit_run()
    (found,) = read_array_jobs(paths.array_jobs)
    assert (found.job, found.refused) == ("100", None) and len(slurm.recorded_before) == 1


def test_lost_answer_and_silent_queue_stay_open_until_queue_answers(
    slurm: Slurm, submit_run: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.replies = False
    answers = iter([[]])
    monkeypatch.setattr(submit_module, "read_queue", lambda clusters: next(answers, None))
    with pytest.raises(SlurmError, match=r"Run the same command with --run-id r to find out"):
        submit_run()
    (array_job,) = read_array_jobs(slurm.paths.array_jobs)
    assert (array_job.job, array_job.refused) == (None, None) and len(slurm.queue) == 3
    with pytest.raises(SlurmError, match="squeue does not answer: nothing was submitted"):
        submit_run()
    monkeypatch.setattr(submit_module, "read_queue", slurm.read_queue)
    submit_run()
    assert len(slurm.queue) == 3 and [array_job.job for array_job in read_array_jobs(slurm.paths.array_jobs)] == ["101"]


def test_refused_submission_is_reported_and_retried_next_time(slurm: Slurm, submit_run: Submit) -> None:
    slurm.accepts = False
    with pytest.raises(SlurmError, match="the folds were not submitted: sbatch failed"):
        submit_run()
    slurm.accepts = True
    paths = submit_run()
    assert [array_job.job for array_job in read_array_jobs(paths.array_jobs)] == [None, "102"]


def test_queue_of_the_cluster_that_accepted_the_job_is_read(
    slurm: Slurm, submit_run: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a federation; before sbatch has answered, the queues of all candidates are read."""
    monkeypatch.setenv("SBATCH_CLUSTERS", "a,b")
    slurm.cluster, slurm.replies = "b", False
    paths = submit_run()
    assert slurm.polled_clusters == ("a,b",), "its answer was lost"
    assert [(array_job.job, array_job.cluster) for array_job in read_array_jobs(paths.array_jobs)] == [("101", "b")]
    assert [str(fold.state) for fold in read_status(paths).folds] == ["waiting"] * 3
    assert slurm.polled_clusters == ("b",)
    submit_run()
    assert len(slurm.queue) == 3


def test_cancel_ends_only_the_jobs_of_the_run(slurm: Slurm, submit_run: Submit) -> None:
    paths = submit_run()
    other = QueueEntry("55", 0, "RUNNING", "doccls:another:abc", "None")
    slurm.queue += [other, QueueEntry("101", 9, "COMPLETED", "", "None")]
    messages: list[str] = []
    cancel_run(paths, messages.append)
    assert slurm.cancelled == ["101_0", "101_1", "101_2"] and other in slurm.queue
    assert messages[-1] == "[CANCEL] stopped; finished folds are kept"


# --- waiting ----------------------------------------------------------------------------------------------------------


def finish(paths: RunPaths, fold: int) -> None:
    """Finish the fold as its task does, by writing its predictions."""
    rows = np.arange(3 * fold, 3 * fold + 3)
    fingerprint = yaml.safe_load(paths.snapshot.read_text())["provenance"]["fingerprint"]
    info = PredictionsInfo(
        fingerprint=fingerprint, fold=fold, num_folds=3, num_samples=9, classes=("0", "1", "2"),
        ids=tuple(f"p{row}.png" for row in rows), skipped=(), best_epoch=1, macro_f1=0.5,
    )  # fmt: skip
    write_predictions(paths.predictions(fold), FoldPredictions(info, rows, np.zeros((3, 3), np.float32), rows % 3))


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the merge: the content of the predictions is not tested here."""
    monkeypatch.setattr("launcher.slurm.run.close_share", lambda run, log: tuple({0, 1, 2} - set(run.find_finished())))


@pytest.mark.usefixtures("merges")
def test_wait_polls_every_15_s_and_every_60_s_while_nothing_changes(slurm: Slurm, submit_run: Submit) -> None:
    slurm.events = {
        200.0: lambda: slurm.set_state("RUNNING", "101_0"),
        400.0: lambda: slurm.set_state("FAILED", "101_0", "101_1", "101_2"),
    }
    with pytest.raises(UserError, match="the run has ended, but folds are missing"):
        submit_run(wait=True)
    gaps = np.diff(slurm.polled_s[:-1])  # the last is read for the status of the missing folds
    assert gaps.min() >= 15 and max(gaps) < 63 and list(gaps[:4] // 15) == [1, 1, 2, 4], gaps
    assert slurm.now_s < 470


@pytest.mark.usefixtures("merges")
def test_wait_for_finished_folds_reads_only_the_files_of_the_run(slurm: Slurm, submit_run: Submit) -> None:
    def end() -> None:
        for fold in range(3):
            finish(slurm.paths, fold)

    slurm.events = {5.0: end}
    log = KeptLog()
    submit_run(wait=True, log=log)
    assert slurm.polled_s == [0.0] and slurm.now_s < 8 and "[SLURM] fold 2: done" in log.lines


@pytest.mark.usefixtures("merges")
def test_wait_polls_queue_soon_after_a_fold_has_finished(slurm: Slurm, submit_run: Submit) -> None:
    def end() -> None:
        finish(slurm.paths, 0)
        slurm.set_state("FAILED", "101_0", "101_1", "101_2")

    slurm.events = {340.0: end}
    with pytest.raises(UserError, match="folds are missing"):
        submit_run(wait=True)
    assert slurm.now_s < 360


@pytest.mark.usefixtures("merges")
def test_fold_cancelled_by_preemption_is_resubmitted_once(slurm: Slurm, submit_run: Submit) -> None:
    def preempt(job: str) -> None:
        slurm.set_state("PREEMPTED", job)
        slurm.set_state("FAILED", "101_0")

    slurm.events = {
        20.0: lambda: preempt("101_2"),
        100.0: lambda: preempt("102_2"),
        200.0: lambda: slurm.set_state("COMPLETED", "101_1", "103_2"),
    }
    log = KeptLog()
    with pytest.raises(UserError, match="- fold 2: missing, job 103_2 COMPLETED"):
        submit_run(wait=True, log=log)
    assert [line for line in log.lines if "was preempted" in line] == [
        "[SLURM] fold 2: job 101_2 was preempted; resubmitted as job 102 (preemption 1)",
        "[SLURM] fold 2: job 102_2 was preempted; resubmitted as job 103 (preemption 2)",
    ]
    assert not any("job 102: folds" in line for line in log.lines)
    array_jobs = read_array_jobs(slurm.paths.array_jobs)
    assert slurm.recorded_before == [1, 2, 3]
    assert [(job.folds, job.preempted) for job in array_jobs] == [((0, 1, 2), ()), ((2,), (2,)), ((2,), (2,))]
    assert np.diff(slurm.polled_s[:-1]).min() >= 15


@pytest.mark.usefixtures("merges")
def test_lost_answer_of_resubmission_is_found(slurm: Slurm, submit_run: Submit) -> None:
    def preempt() -> None:
        slurm.set_state("PREEMPTED", "101_2")
        slurm.replies = False

    slurm.events = {
        20.0: preempt,
        200.0: lambda: slurm.set_state("FAILED", "101_0", "101_1", "102_2"),
    }
    with pytest.raises(UserError, match="folds are missing"):
        submit_run(wait=True)
    assert list_tasks(slurm) == ["101_0", "101_1", "101_2", "102_2"]


@pytest.mark.usefixtures("merges")
def test_preempted_fold_waits_while_another_process_submits(slurm: Slurm, submit_run: Submit) -> None:
    with contextlib.ExitStack() as other:

        def preempt() -> None:
            slurm.set_state("PREEMPTED", "101_2")
            other.enter_context(hold_lock(slurm.paths.submit_lock, "run r is being submitted"))

        slurm.events = {
            20.0: preempt,
            100.0: other.close,
            300.0: lambda: slurm.set_state("FAILED", "101_0", "101_1", "102_2"),
        }
        with pytest.raises(UserError, match="folds are missing"):
            submit_run(wait=True)
    assert list_tasks(slurm) == ["101_0", "101_1", "101_2", "102_2"]


@pytest.mark.usefixtures("merges")
def test_wait_survives_silent_controller(slurm: Slurm, submit_run: Submit) -> None:
    slurm.events = {
        20.0: lambda: setattr(slurm, "queue_answers", False),
        400.0: lambda: setattr(slurm, "queue_answers", True),
        401.0: lambda: slurm.set_state("FAILED", "101_0", "101_1", "101_2"),
    }
    log = KeptLog()
    with pytest.raises(UserError, match="folds are missing"):
        submit_run(wait=True, log=log)
    assert log.lines.count("[SLURM] squeue does not answer; the jobs continue") == 1
    assert len(slurm.recorded_before) == 1


def test_same_command_without_wait_resubmits_and_counts_preempted_fold(slurm: Slurm, submit_run: Submit) -> None:
    paths = submit_run()
    slurm.set_state("PREEMPTED", "101_2")
    slurm.set_state("FAILED", "101_1")
    assert [str(fold.state) for fold in read_status(paths).folds] == ["waiting", "failed", "stopped"]
    log = KeptLog()
    submit_run(log=log)
    assert "[SLURM] job 102: folds 1 submitted, one task per fold" in log.lines
    assert "[SLURM] fold 2: job 101_2 was preempted; resubmitted as job 102 (preemption 1)" in log.lines
    submit_run()
    assert len(slurm.queue) == 5


def test_signal_ends_wait_at_once(slurm: Slurm, submit_run: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        if slurm.now_s > 100:
            raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(watch_module, "check_stop", check)
    with pytest.raises(Interrupted):
        submit_run(wait=True)
    assert slurm.now_s < 100.5


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_cancel_polls_queue_when_tasks_have_exited_and_rarely_before(
    slurm: Slurm, submit_run: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "launcher.cancel.cancel_jobs", lambda entries: slurm.set_state("COMPLETING", *list_tasks(slurm))
    )
    paths = submit_run()
    with contextlib.ExitStack() as task:
        task.enter_context(hold_lock(paths.launch_lock(1), "run r, task 101_1 of Slurm, is being launched"))
        slurm.polled_s, slurm.events = [], {
            50.0: task.close,
            60.0: lambda: slurm.set_state("CANCELLED", *list_tasks(slurm)),
        }  # fmt: skip
        cancel_run(paths, lambda text: None)
    assert np.diff(slurm.polled_s).min() >= 7 and len(slurm.polled_s) <= 5, slurm.polled_s


def test_waiting_launcher_does_not_resubmit_cancelled_folds(slurm: Slurm, submit_run: Submit, merges: None) -> None:
    def cancel() -> None:
        slurm.set_state("PREEMPTED", "101_2")
        cancel_run(slurm.paths, lambda text: None)

    slurm.events = {20.0: cancel}
    with pytest.raises(UserError, match="folds are missing"):
        submit_run(wait=True)
    assert slurm.cancelled == ["101_0", "101_1"] and list_tasks(slurm) == ["101_2"]


def test_cancel_ends_jobs_submitted_meanwhile_and_waits_for_silent_controller(slurm: Slurm, submit_run: Submit) -> None:
    def add() -> None:
        slurm.queue.append(QueueEntry("101", 7, "PENDING", "", ""))
        slurm.queue_answers = False

    paths, messages = submit_run(), list[str]()
    slurm.events = {1.0: add, 90.0: lambda: setattr(slurm, "queue_answers", True)}
    cancel_run(paths, messages.append)
    assert slurm.cancelled == ["101_0", "101_1", "101_2", "101_7"] and not slurm.queue
    assert sum("squeue does not answer" in text for text in messages) == 1
    slurm.queue_answers = False
    with pytest.raises(SlurmError, match="nothing was cancelled"):
        cancel_run(paths, messages.append)


# --- studies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def submit_both(slurm: Slurm, config: Config, tmp_path: Path) -> Callable[[], list[SubmittedRun]]:
    """Submit a study of two runs with three folds each, whose tasks are 0 to 2 and 3 to 5."""
    options = replace(OPTIONS, study=tmp_path / "exp" / "studies" / "s")
    slurm.paths = RunPaths(config.output.exp_dir / "20260102" / "s-b")

    def submit_once() -> list[SubmittedRun]:
        with contextlib.ExitStack() as held:
            missing = [
                open_submitted_run(config, run_id, NOW, options, offset, KeptLog(), held)
                for run_id, offset in (("s-a", 0), ("s-b", 3))
            ]
            submit_missing(missing, read_queue_of(missing), options, KeptLog())
        return [part.run for part in missing]

    return submit_once


def test_study_is_submitted_as_one_array(slurm: Slurm, submit_both: Callable[[], list[SubmittedRun]]) -> None:
    runs = submit_both()
    assert list_tasks(slurm) == [f"101_{index}" for index in range(6)] and slurm.recorded_before == [1]
    assert {entry.comment.rpartition(":")[0] for entry in slurm.queue} == {"doccls:s"}
    slurm.set_state("RUNNING", "101_4")
    states = [[str(fold.state) for fold in read_status(run.paths).folds] for run in runs]
    assert states == [["waiting"] * 3, ["waiting", "running", "waiting"]]
    slurm.queue = [entry for entry in slurm.queue if entry.number not in (2, 3)]  # as if they were cancelled
    submit_both()
    assert list_tasks(slurm) == ["101_0", "101_1", "101_4", "101_5", "102_2", "102_3"]
    submit_both()
    assert len(slurm.queue) == 6


def test_lost_answer_of_a_study_is_found(slurm: Slurm, submit_both: Callable[[], list[SubmittedRun]]) -> None:
    slurm.replies = False
    runs = submit_both()
    assert {read_array_jobs(run.paths.array_jobs)[0].job for run in runs} == {"101"}
    submit_both()
    assert len(slurm.queue) == 6


def test_cancel_of_a_run_leaves_the_other_tasks_of_its_study(
    slurm: Slurm, submit_both: Callable[[], list[SubmittedRun]], tmp_path: Path
) -> None:
    first, second = submit_both()
    cancel_run(second.paths, lambda line: None)
    assert slurm.cancelled == ["101_3", "101_4", "101_5"]
    members = tuple(Member(name, f"20260102/{name}", "c", 1, 3, {}, 3) for name in ("s-a", "s-b"))
    folder = tmp_path / "exp" / "studies" / "s"
    write_study(folder, Study("s", "resume", members), measure_runs(folder, Study("s", "resume", members), {}))
    cancel_study(folder, lambda line: None)
    assert slurm.cancelled[3:] == ["101_0", "101_1", "101_2"] and slurm.queue == []
    with pytest.raises(UserError, match=r"of study .* is active: there is nothing to cancel"):
        cancel_study(folder, lambda line: None)
    assert first.paths.run_id == "s-a"


def test_preempted_fold_of_a_study_is_resubmitted_as_the_same_task(
    slurm: Slurm, submit_both: Callable[[], list[SubmittedRun]], tmp_path: Path
) -> None:
    runs = submit_both()
    others = [f"101_{index}" for index in (0, 1, 2, 3, 5)]
    slurm.events = {
        20.0: lambda: slurm.set_state("PREEMPTED", "101_4"),
        100.0: lambda: slurm.set_state("FAILED", *others, "102_4"),
    }
    log = KeptLog()
    Watch(runs, replace(OPTIONS, study=tmp_path / "exp" / "studies" / "s"), log).run()
    assert "[SLURM] s-b fold 1: job 101_4 was preempted; resubmitted as job 102 (preemption 1)" in log.lines
    assert [job.offset for job in read_array_jobs(runs[1].paths.array_jobs)] == [3, 3]
    assert len(read_array_jobs(runs[0].paths.array_jobs)) == 1


def test_cancel_of_a_study_cancels_all_runs_at_once(
    slurm: Slurm, submit_both: Callable[[], list[SubmittedRun]], tmp_path: Path
) -> None:
    """Tasks of one run may end by themselves while another run is being cancelled."""
    submit_both()
    study = Study("s", "resume", tuple(Member(name, f"20260102/{name}", "c", 1, 3, {}, 3) for name in ("s-a", "s-b")))
    folder = tmp_path / "exp" / "studies" / "s"
    write_study(folder, study, measure_runs(folder, study, {}))
    messages: list[str] = []
    with hold_lock(locate_update_lock(folder), "study s is being updated"):
        cancel_study(folder, messages.append)
    assert slurm.cancelled == [f"101_{index}" for index in range(6)] and len(slurm.polled_s) <= 4
    assert messages[-1] == "[CANCEL] stopped; finished folds are kept"
