"""The ledger: it reads back as it was written, and a damaged one is rejected."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from doccls.errors import UserError
from doccls.reporting.log import RunLog
from doccls.system import atomic_files as artifacts
from doccls.system.lock import LockError, hold_lock
from launcher.ledger import Attempt, Ledger, LedgerFile, begin_launch, format_time, read_ledger, write_ledger

FIRST = Attempt(
    fold=3, number=1, slot="gpu 0,1", devices=("GPU-a", "GPU-b"), micro_batch_size=8,
    started="2026-01-02T03:04:05.678", pids=(12, 13), ended="2026-01-02T03:05:00.000", outcome="crashed",
    then="waiting", exit_codes=(-9, None), message='crashed: "ü"\n\tin two lines',
)  # fmt: skip
SECOND = Attempt(3, 2, "cpu 0", ("cpu 0",), 4, "2026-01-02T03:06:00.000")
LEDGER = Ledger(
    run_id="v001-abc", fingerprint="f" * 64, num_folds=5, folds=(3, 0), ranks_per_fold=2, host="höst", pid=7,
    resume_command="doccls-launch run --set 'a b'", started="2026-01-02T03:04:00.000", log="/logs/run.log",
    attempts=(FIRST, SECOND),
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "launch.json"


@pytest.mark.parametrize("attempts", [(), (FIRST,), (FIRST, SECOND)])
def test_ledger_round_trip(path: Path, attempts: tuple[Attempt, ...]) -> None:
    ledger = replace(LEDGER, attempts=attempts)
    write_ledger(path, ledger)
    assert read_ledger(path) == ledger


def test_ledger_is_json(path: Path) -> None:
    write_ledger(path, LEDGER)
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert fields["format"] == "doccls-launch-2"
    assert fields["folds"] == [3, 0] and fields["attempts"][0]["exit_codes"] == [-9, None]
    assert path.read_text().endswith("}\n")
    assert fields == {"format": "doccls-launch-2"} | json.loads(json.dumps(asdict(LEDGER)))


def test_sizes_are_listed_by_fold_outcome_and_rank_count() -> None:
    endings = [("out of memory", 16, ("a",)), ("out of memory that others hold", 8, ("a",)), ("crashed", 4, ("a",))]
    endings += [("out of memory", 2, ("a", "b"))]
    attempts = tuple(
        replace(FIRST, outcome=outcome, micro_batch_size=size, devices=devices) for outcome, size, devices in endings
    )
    ledger = replace(LEDGER, attempts=(*attempts, replace(attempts[0], fold=0, micro_batch_size=1)))
    assert ledger.list_sizes(3, "out of memory", 1) == [16]
    assert ledger.list_sizes(3, "out of memory", 2) == [2]


def test_failed_write_warns_once_and_is_retried_later(path: Path, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.txt")
    path.parent.mkdir()
    path.mkdir()  # blocks the write, as a full disk does
    with log, hold_lock(tmp_path / "launch.lock", "run r is being launched") as lock:
        ledger_file = LedgerFile(path, LEDGER, lock, log)
        ledger_file.write(replace(LEDGER, folds=(1,)))
        ledger_file.write(replace(LEDGER, folds=(2,)))
        path.rmdir()
        ledger_file.retry_write(3600.0)
        assert not path.exists(), "too soon"
        ledger_file.retry_write(0.0)
        assert read_ledger(path) == ledger_file.content == replace(LEDGER, folds=(2,))
        path.unlink()
        ledger_file.retry_write(0.0)
        assert not path.exists(), "there was nothing left to write"
    warnings = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("[WARNING]")]
    assert len(warnings) == 1 and "launch.json" in warnings[0]


def test_launcher_that_lost_its_lock_writes_no_ledger(path: Path, tmp_path: Path) -> None:
    """The launcher was suspended, and another one has taken over the run."""
    with hold_lock(tmp_path / "launch.lock", "run r is being launched") as lock:
        ledger_file = LedgerFile(path, LEDGER, lock, RunLog(None))
        (tmp_path / "launch.lock").unlink()
        with pytest.raises(LockError, match="must not write any more"):
            ledger_file.write(LEDGER)
    assert not path.exists()


def test_run_that_was_never_launched_has_no_ledger(path: Path) -> None:
    assert read_ledger(path) is None


def test_attempts_are_appended_and_listed_by_fold() -> None:
    other = replace(FIRST, fold=0)
    ledger = replace(LEDGER, attempts=(FIRST,)).add(other).add(SECOND)
    assert ledger.attempts == (FIRST, other, SECOND)
    assert ledger.list_attempts(3) == [FIRST, SECOND]
    assert ledger.list_attempts(0) == [other] and ledger.list_attempts(1) == []
    assert LEDGER.attempts == (FIRST, SECOND), "the original is unchanged"


def test_only_last_attempt_of_fold_is_amended() -> None:
    other = replace(SECOND, fold=0)
    duplicate = replace(SECOND)  # equal, but another attempt
    ledger = replace(LEDGER, attempts=(FIRST, duplicate, SECOND, other))
    amended = ledger.amend(3, pids=(9,), outcome="done")
    assert amended.attempts == (FIRST, duplicate, replace(SECOND, pids=(9,), outcome="done"), other)
    assert amended.amend(0, then="failed").attempts[-1] == replace(other, then="failed")
    assert ledger.attempts == (FIRST, duplicate, SECOND, other)


def test_fold_without_attempts_cannot_be_amended() -> None:
    with pytest.raises(IndexError):
        LEDGER.amend(1, outcome="done")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "3", "[]", '"doccls-launch-2"', "{}", '{"format": "doccls-launch-2"}',
        '{"format": "doccls-launch-2", "attempts": []}', '{"format": "doccls-launch-2", "attempts": [3]}',
    ],
)  # fmt: skip
def test_invalid_ledger_is_rejected_with_advice(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_ledger(path)
    assert str(path) in str(caught.value) and "Delete it to continue" in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.98])
def test_truncated_ledger_is_rejected(path: Path, fraction: float) -> None:
    write_ledger(path, LEDGER)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(UserError):
        read_ledger(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": None}, {"run_id": ...}, {"more": 1}, {"attempts": None},
        {"attempts": [{}]}, {"attempts": [asdict(FIRST) | {"more": 1}]}, {"attempts": "text"},
    ],
)  # fmt: skip
def test_ledger_with_missing_or_foreign_fields_is_rejected(path: Path, changes: dict[str, Any]) -> None:
    write_ledger(path, LEDGER)
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    with pytest.raises(UserError, match=r"damaged .*Delete it to continue"):
        read_ledger(path)


def test_ledger_of_another_version_is_kept_for_that_version(path: Path) -> None:
    write_ledger(path, LEDGER)
    path.write_text(path.read_text().replace("doccls-launch-2", "doccls-launch-1"))
    with pytest.raises(UserError, match=r"doccls-launch-1; .*Continue the run with that version"):
        read_ledger(path)


def test_ledger_that_is_not_text_or_not_a_file_is_rejected(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    for unreadable in (path, tmp_path):
        with pytest.raises(UserError):
            read_ledger(unreadable)


def test_failed_write_keeps_previous_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ledger(path, LEDGER)

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifacts.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_ledger(path, LEDGER.add(SECOND))
    assert read_ledger(path) == LEDGER
    assert [file.name for file in path.parent.iterdir()] == ["launch.json"]


def test_reader_sees_complete_ledger_during_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the new file replaces it, the previous one can be read."""
    write_ledger(path, LEDGER)
    seen: list[Ledger | None] = []
    sync = os.fsync

    def read_and_sync(descriptor: int) -> None:
        seen.append(read_ledger(path))
        sync(descriptor)

    monkeypatch.setattr(artifacts.os, "fsync", read_and_sync)
    longer = replace(LEDGER, attempts=(FIRST,) * 200)
    write_ledger(path, longer)
    assert seen[0] == LEDGER and seen[-1] == longer == read_ledger(path)


def test_times_have_milliseconds_and_sort_chronologically() -> None:
    zone = timezone(timedelta(hours=2))  # such as summer time: texts must sort across its end
    early, late = datetime(2026, 1, 2, 5, 4, 5, 6789, zone), datetime(2026, 1, 2, 3, 4, 5, 999_999, UTC)
    assert format_time(early) == "2026-01-02T03:04:05.006+00:00"
    assert format_time(early) < format_time(late) < format_time(datetime(2026, 1, 2, 3, 4, 6))


def test_open_attempts_of_killed_launcher_are_closed_as_lost() -> None:
    closed = LEDGER.close_open("later")
    assert closed.attempts == (FIRST, replace(SECOND, ended="later", outcome="lost", then="waiting"))
    assert closed.close_open("later still") == closed


# --- a later launch --------------------------------------------------------------------------------------------------


def test_launch_keeps_attempts_of_earlier_launches(tmp_path: Path) -> None:
    write_ledger(tmp_path / "launch.json", LEDGER)
    launch = replace(LEDGER, pid=99, started="later", attempts=())
    assert begin_launch(tmp_path / "launch.json", launch) == replace(launch, attempts=LEDGER.attempts)
    assert begin_launch(tmp_path / "none.json", launch) == launch


def test_launch_of_another_experiment_is_rejected_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "launch.json"
    write_ledger(path, LEDGER)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"started with another config, data, folds or weights .* another --run-id"):
        begin_launch(path, replace(LEDGER, fingerprint="0" * 64))
    assert path.read_bytes() == before
