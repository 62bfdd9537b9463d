"""Slurm's commands, replaced by stubs: their arguments, and the handling of every answer and of none."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest

from launcher.slurm import queue as queue_module
from launcher.slurm.format import LostAnswerError, QueueEntry, SlurmError, Submitted
from launcher.slurm.queue import (
    cancel_jobs,
    find_clusters,
    next_interval,
    read_queue,
    requeue_job,
    slurm_environment,
    submit_script,
)

# Prologue of a stub that prints rows: `row JOB NUMBER STATE UID REASON COMMENT`.
SQUEUE = """
for word; do case $word in --format=*) format=${word#--format=} ;; esac; done
mark=${format%%%F*}
row() { printf '%s%s|%s|%s|%s|%s%s%s%s\\n' "$mark" "$1" "$2" "$3" "$4" "$5" "$mark" "$6" "$mark"; }
"""
OURS = QueueEntry("12", 2, "PENDING", "doccls:r:abc", "Resources")
ROW = f"row 12 2 PENDING {os.geteuid()} Resources doccls:r:abc\n"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Callable[[], list[str]]]:
    """`calls = stub(name, body)` puts a fake Slurm command on PATH; `calls()` lists the arguments of each call."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("_ANSWER_S", "_REQUEUE_S"):
        monkeypatch.setattr(queue_module, name, 20.0)

    def write(name: str, body: str) -> Callable[[], list[str]]:
        calls = tmp_path / f"{name}.calls"
        (tmp_path / name).write_text(f'#!/bin/bash\nPATH=/usr/bin:/bin\nprintf "%s\\n" "$*" >>{calls}\n{body}\n')
        (tmp_path / name).chmod(0o755)
        return lambda: calls.read_text().splitlines()

    return write


Stub = Callable[[str, str], Callable[[], list[str]]]


def hang(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the body of a stub that does not answer in time."""
    for name in ("_ANSWER_S", "_REQUEUE_S"):
        monkeypatch.setattr(queue_module, name, 0.2)
    return "exec sleep 60"


# --- interval and environment -----------------------------------------------------------------------------------------


def test_poll_interval_grows_to_60_s_while_nothing_changes() -> None:
    changes = [True, False, False, False, True, False]
    assert list(accumulate(changes, next_interval, initial=15.0)) == [15, 15, 30, 60, 60, 15, 30]


def test_only_sbatch_defaults_of_user_reach_slurm() -> None:
    kept = {"PATH": "/bin", "SLURM_CONF": "/c", "SLURM_CONF_SERVER": "s", "SLURM_JWT": "t", "SBATCH_PARTITION": "p"}
    dropped = ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SLURM_CLUSTERS", "SQUEUE_STATES", "SQUEUE_FORMAT", "SCANCEL_QOS")
    assert slurm_environment(kept | dict.fromkeys(dropped, "x")) == kept


def test_filter_of_user_hides_no_job(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("squeue", f'{SQUEUE} [ -z "$SQUEUE_PARTITION$SLURM_JOB_ID" ] && [ "$LC_ALL" = C ] && {ROW}')
    for name in ("SQUEUE_PARTITION", "SLURM_JOB_ID", "LC_ALL"):
        monkeypatch.setenv(name, "de_DE")
    assert read_queue() == [OURS]


def test_job_keeps_locale_of_user(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("sbatch", '[ "$LC_ALL" = de_DE.UTF-8 ] && echo 12')
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert submit_script(["sbatch"], "") == Submitted("12", None)


# --- the queue --------------------------------------------------------------------------------------------------------


def test_only_jobs_of_this_user_are_read_without_user_name(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub("squeue", SQUEUE + ROW)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert read_queue() == [OURS]
    (call,) = calls()
    assert "--me" in call.split() and "--user" not in call


@pytest.mark.parametrize(
    "refuses",
    [
        """case "$*" in *--me*) echo "squeue: unrecognized option '--me'" >&2; exit 1 ;; esac\n""",
        """case "$*" in *--me*|*--user*) echo "squeue: error: Invalid user: 7" >&2; exit 0 ;; esac\n""",
    ],
    ids=["an old squeue", "a uid without an entry"],
)
def test_all_rows_are_read_where_squeue_does_not_know_the_user(stub: Stub, refuses: str) -> None:
    stub("squeue", SQUEUE + refuses + ROW + "row 13 1 RUNNING 4242 None 'of another user'\n")
    assert read_queue() == [OURS]


def test_hostile_comment_changes_nothing(stub: Stub) -> None:
    me = os.geteuid()
    foreign = f"row 9 N/A RUNNING {me} None $'a\\n12|2|COMPLETED|{me}|None\\n|\\xe9\\n'\n"
    stub("squeue", SQUEUE + foreign + ROW + f"row 8 N/A RUNNING {me} '' ''\n")
    entries = read_queue()
    assert entries is not None and [entry.job for entry in entries] == ["9", "12_2", "8"] and entries[1] == OURS


@pytest.mark.parametrize("body", ["echo no controller >&2; exit 1", "hangs", None])
def test_no_answer_is_not_an_empty_queue(stub: Stub, monkeypatch: pytest.MonkeyPatch, body: str | None) -> None:
    if body is not None:
        stub("squeue", hang(monkeypatch) if body == "hangs" else body)
    assert read_queue() is None


def test_other_clusters_are_read_and_each_must_answer(stub: Stub) -> None:
    answers = 'case "$*" in *--clusters=a,b*) echo "CLUSTER: b" ;; *--clusters*) exit 1 ;; esac\n'
    stub("squeue", SQUEUE + answers + ROW)
    entries = read_queue(["a,b"])
    assert entries is not None and [entry.cluster for entry in entries] == [None, "b"]
    assert read_queue(["gone"]) is None


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "clusters"),
    [
        ([], None),
        (["--clusters=a,b"], "a,b"),
        (["-M", "a"], "a"),
        (["-Ma", "--comment=--clusters=no"], "a"),
        (["--array=0-2", "--constraint=x", "--clusters", "a"], "a"),
    ],
)
def test_clusters_are_found_in_options_and_environment(args: list[str], clusters: str | None) -> None:
    command = ["sbatch", "--parsable", "--mem=4G", *args, "--qos=high"]
    assert find_clusters(command, {}) == clusters
    assert find_clusters(command, {"SBATCH_CLUSTERS": "c"}) == (clusters or "c")


def test_script_is_submitted_on_standard_input(stub: Stub) -> None:
    stub("sbatch", """[ "$(cat)" = $'/a/\\xc3\\xa9\\xe9' ] && echo '12;b'""")
    assert submit_script(["sbatch"], "/a/é\udce9") == Submitted("12", "b")


@pytest.mark.parametrize(
    ("body", "message", "is_lost"),
    [
        ("echo 'Batch job submission failed: Invalid qos' >&2; exit 1", r"exit code 1\): Batch .* Invalid qos", False),
        ("echo 'Socket timed out on send/recv operation' >&2; exit 1", "Socket timed out", True),
        ("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", "contact", True),
        ("echo 'Zero Bytes were transmitted or received' >&2; exit 1", "Zero Bytes", True),
        ("echo hello", "hello", True),
        ("hangs", "has not answered", True),
    ],
)
def test_refusal_is_distinguished_from_lost_answer(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, body: str, message: str, is_lost: bool
) -> None:
    stub("sbatch", hang(monkeypatch) if body == "hangs" else body)
    with pytest.raises(SlurmError, match=message) as raised:
        submit_script(["sbatch"], "")
    assert isinstance(raised.value, LostAnswerError) == is_lost


def test_each_cluster_cancels_its_own_jobs(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub("scancel", "")
    others = [QueueEntry("12", number, "RUNNING", "", "", "b") for number in (0, 1)]
    cancel_jobs([others[0], OURS, others[1]])
    assert calls() == ["--clusters=b 12_0 12_1", "12_2"]
    stub("scancel", "echo no controller >&2; exit 1")
    with pytest.raises(SlurmError, match="scancel 12_2: no controller"):
        cancel_jobs([OURS])
    stub("scancel", hang(monkeypatch))
    with pytest.raises(SlurmError, match="scancel 12_2: no answer"):
        cancel_jobs([OURS])


def test_failed_requeue_returns_the_reason(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = requeue_job("12_2")
    assert failure is not None and "scontrol requeue 12_2: " in failure and "No such file" in failure
    calls = stub("scontrol", "")
    assert requeue_job("12_2") is None and calls() == ["requeue 12_2"]
    stub("scontrol", "echo 'Requested operation is disabled' >&2; exit 1")
    assert requeue_job("12_2") == "scontrol requeue 12_2: Requested operation is disabled"
    stub("scontrol", hang(monkeypatch))
    assert requeue_job("12_2") == "scontrol requeue 12_2: no answer for 0.2 s"
