"""Array jobs of a run: identified in the queue by their comment, and each fold's newest task by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from doccls.errors import UserError
from launcher.ledger import Ledger
from launcher.slurm.array_jobs import (
    ArrayJob,
    RunJob,
    find_newest,
    list_active,
    list_clusters,
    list_jobs,
    list_preempted,
    read_array_jobs,
    resolve_lost_answers,
    write_array_jobs,
)
from launcher.slurm.format import QueueEntry

KNOWN = ArrayJob("aa", (0, 1, 2), "2026-01-02T03:04:00.000+00:00", "resume", job="9")
LOST = ArrayJob("bb", (1,), "2026-01-02T03:05:00.000+00:00", "resume")
ELSEWHERE = ArrayJob(
    "dd", (1, 2), "2026-01-02T03:07:00.000+00:00", "resume", "9", cluster="b", preempted=(2,), cancelled=True
)
REFUSED = ArrayJob("cc", (2,), "2026-01-02T03:06:00.000+00:00", "resume", refused="sbatch failed")


def make_entry(
    job: str, number: int | None, state: str = "RUNNING", comment: str = "(null)", cluster: str | None = None
) -> QueueEntry:
    return QueueEntry(job, number, state, comment, "None", cluster)


def make_ledger(job: str | None, sharing: int = 0) -> Ledger:
    return Ledger(
        run_id="r", fingerprint="id", num_folds=5, folds=(0,), ranks_per_fold=1, host="h", pid=1,
        resume_command="resume", started="2026", log="log", job=job, sharing=sharing,
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "slurm_jobs.json"
    assert read_array_jobs(path) == ()
    write_array_jobs(path, (KNOWN, LOST, REFUSED, ELSEWHERE))
    assert read_array_jobs(path) == (KNOWN, LOST, REFUSED, ELSEWHERE)


def test_file_of_another_version_is_kept_for_that_version(tmp_path: Path) -> None:
    path = tmp_path / "slurm_jobs.json"
    write_array_jobs(path, (KNOWN,))
    path.write_text(path.read_text().replace("doccls-slurm-jobs-1", "doccls-slurm-jobs-2"))
    with pytest.raises(UserError, match=r"doccls-slurm-jobs-2; .*Continue the run with that version"):
        read_array_jobs(path)


def test_submissions_file_of_earlier_version_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "slurm_jobs.json"
    (tmp_path / "submissions.json").write_text("{}")
    with pytest.raises(UserError, match=r"an earlier version of doccls submitted jobs for this run.*--run-id"):
        read_array_jobs(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other", "jobs": []}', '{"format": 3}', "null"])
def test_damaged_file_is_rejected_with_advice(tmp_path: Path, text: str) -> None:
    path = tmp_path / "slurm_jobs.json"
    write_array_jobs(path, (KNOWN,))
    path.write_text(text)
    with pytest.raises(UserError, match=r"slurm_jobs\.json: damaged.*delete the file"):
        read_array_jobs(path)


def test_unknown_field_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "slurm_jobs.json"
    write_array_jobs(path, (KNOWN,))
    fields = json.loads(path.read_text())
    fields["jobs"][0]["colour"] = "red"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError):
        read_array_jobs(path)


def test_lost_answer_is_resolved_by_comment_alone() -> None:
    queue = [make_entry("17", 1, comment="doccls:r:bb"), make_entry("18", 1, comment="doccls:r:cc")]
    known, lost, refused = resolve_lost_answers((KNOWN, LOST, REFUSED), "r", queue[:1])
    assert (known, refused) == (KNOWN, REFUSED)
    assert (lost.job, lost.refused) == ("17", None)
    (accepted,) = resolve_lost_answers((REFUSED,), "r", queue)
    assert (accepted.job, accepted.refused) == ("18", None), "it had not been refused"
    (other,) = resolve_lost_answers((LOST,), "another-run", queue)
    assert (other.job, other.refused) == (None, "it is not in the queue")


def test_jobs_are_those_submitted_and_those_in_ledgers() -> None:
    jobs = list_jobs(
        (KNOWN, LOST), [make_ledger("9_1"), make_ledger("4_0", sharing=2), make_ledger("31"), make_ledger(None)]
    )
    assert jobs == [RunJob("4", True, 2), RunJob("9", True), RunJob("31", False)]
    assert [jobs[0].name(fold) for fold in range(4)] == ["4_0", "4_1", "4_0", "4_1"]
    assert [job.name(3) for job in jobs[1:]] == ["9_3", "31"]


def test_newest_job_counts_and_foreign_jobs_are_ignored() -> None:
    jobs = list_jobs((KNOWN,), [make_ledger("12_1")])
    queue = [
        make_entry("9", 1, "FAILED"),
        make_entry("12", 1, "PENDING"),
        make_entry("77", 1),
        make_entry("9", 2, "ODD"),
    ]
    newest = find_newest(1, jobs, queue)
    assert newest is not None and newest.job == "12_1"
    assert find_newest(0, jobs, queue) is None
    active = list_active(range(3), jobs, queue)
    assert {fold: entry.job for fold, entry in active.items()} == {1: "12_1", 2: "9_2"}, "unknown is not ended"
    assert list_active([1], jobs, [make_entry("12", 1, "NODE_FAIL")]) == {}


def test_job_with_same_number_on_another_cluster_is_ignored() -> None:
    assert list_clusters((KNOWN, ELSEWHERE, replace(ELSEWHERE, job="3"))) == ["b"] and list_clusters((KNOWN,)) == []
    jobs = list_jobs((ELSEWHERE,), [make_ledger("9_1")])
    assert jobs == [RunJob("9", True, cluster="b")]
    here, there = make_entry("9", 1), make_entry("9", 1, cluster="b")
    assert find_newest(1, jobs, [here]) is None and find_newest(1, jobs, [there, here]) == there


def test_lost_answer_of_another_cluster_is_resolved_with_its_name() -> None:
    queue = [make_entry("17", 1, comment="doccls:r:bb"), make_entry("17", 1, comment="doccls:r:bb", cluster="b")]
    (found,) = resolve_lost_answers((replace(LOST, cluster="a,b"),), "r", queue)
    assert (found.job, found.cluster) == ("17", "b")


def test_fold_is_preempted_if_its_newest_array_job_was() -> None:
    queue = [make_entry("9", fold, "PREEMPTED") for fold in range(4)] + [make_entry("3", 1, "PREEMPTED")]
    assert {fold: entry.job for fold, entry in list_preempted((KNOWN, REFUSED), queue).items()} == {
        0: "9_0", 1: "9_1", 2: "9_2"
    }  # fmt: skip
    assert set(list_preempted((KNOWN, LOST), queue)) == {0, 2}, "fold 1 may have been resubmitted"
    later = ArrayJob("ee", (2,), LOST.started, "resume", job="12", preempted=(2,))
    assert set(list_preempted((KNOWN, later), queue)) == {0, 1}, "its newest job may have failed and left the queue"
    assert list_preempted((replace(KNOWN, cancelled=True),), queue) == {}
    assert list_preempted((replace(KNOWN, cluster="b"),), queue) == {}
    assert list_preempted((), queue) == {}, "submitted by hand"
    active = [make_entry("9", 0, state) for state in ("PENDING", "RUNNING", "COMPLETING", "CANCELLED", "ODD")]
    assert list_preempted((KNOWN,), active) == {}
