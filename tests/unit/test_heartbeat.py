"""Heartbeats: written once per second and at each new stage of the work, and readable at any time."""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from doccls.errors import DownloadError, PortTakenError, UserError
from doccls.run import heartbeat
from doccls.run.heartbeat import Beat, Cause, Heartbeat, await_failures, find_cause, open_heartbeat, read_beat
from doccls.system.signals import Interrupted


class Clock(SimpleNamespace):
    """A fake of the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "live").mkdir()
    return tmp_path / "live" / "fold3_rank1.json"


def start(path: Path, **changes: Any) -> Heartbeat:
    """Return a heartbeat that writes to the file, after a first beat and one with the changes."""
    writer = Heartbeat()
    writer.write_to(path)
    if changes:
        writer.beat(**changes)
    return writer


def read(path: Path) -> Beat:
    beat = read_beat(path)
    assert beat is not None
    return beat


def test_first_beat_has_host_and_pid(path: Path, clock: Clock) -> None:
    start(path)
    assert read(path) == Beat(socket.gethostname(), os.getpid(), count=1, time_s=clock.now + 1e9)
    assert (read(path).phase, read(path).epoch) == ("start", 0)


def test_nothing_is_written_without_path_and_existing_folder(tmp_path: Path) -> None:
    writer = Heartbeat()
    writer.beat(phase="train")
    writer.write_to(tmp_path / "run" / "live" / "all_rank0.json")
    writer.beat(phase="validate")
    assert list(tmp_path.iterdir()) == []


def test_beat_round_trips(path: Path, clock: Clock) -> None:
    changes: dict[str, Any] = {
        "phase": "failed", "fold": 3, "epoch": 2, "step": 14, "cause": "user error", "error": "KeyError",
        "message": 'line\nof "words" ü',
    }  # fmt: skip
    start(path, **changes)
    beat = read(path)
    assert {name: value for name, value in asdict(beat).items() if name in changes} == changes
    assert beat == Beat(**json.loads(path.read_text()))


def test_steps_are_written_once_per_second_without_loss(path: Path, clock: Clock) -> None:
    writer = start(path, phase="train", epoch=1)
    for step in range(1, 5):
        clock.now += 0.2
        writer.beat(step=step)
        assert read(path).step == 0
    clock.now += 0.21
    writer.beat()
    assert (read(path).step, read(path).count) == (4, 7)
    clock.now += 0.99
    writer.beat(step=6)
    assert read(path).step == 4, "each write restarts the second"


def test_stage_begins_with_the_first_beat_of_a_phase_or_epoch(path: Path, clock: Clock) -> None:
    writer = start(path, phase="train", epoch=1, step=1)
    began_s = clock.now + 1e9
    clock.now += 5
    writer.beat(step=6)
    assert (read(path).stage_s, read(path).stage_step) == (began_s, 1)
    clock.now += 2
    writer.beat(epoch=2, step=7)
    assert (read(path).stage_s, read(path).stage_step) == (clock.now + 1e9, 7)


def test_count_grows_with_every_beat(path: Path, clock: Clock) -> None:
    writer, counts = start(path), []
    for _ in range(4):
        clock.now += 1.0
        writer.beat()
        counts.append(read(path).count)
    assert counts == [2, 3, 4, 5]


@pytest.mark.parametrize("change", [{"phase": "validate"}, {"epoch": 2}, {"fold": 4}])
def test_new_stage_is_written_immediately(path: Path, clock: Clock, change: dict[str, Any]) -> None:
    writer = start(path, phase="train", fold=3, epoch=1)
    writer.beat(step=1)
    writer.beat(step=2, **change)
    written = asdict(read(path))
    assert {name: written[name] for name in change} == change
    assert (written["step"], written["count"]) == (2, 4)


@pytest.mark.parametrize("change", [{"phase": "train"}, {"epoch": 1}, {"step": 9}, {"message": "x"}, {}])
def test_other_changes_wait_for_the_next_second(path: Path, clock: Clock, change: dict[str, Any]) -> None:
    writer = start(path, phase="train", epoch=1)
    writer.beat(**change)
    assert read(path).count == 2


def test_watched_items_pass_unchanged_with_a_beat_each(path: Path, clock: Clock) -> None:
    assert list(start(path).watch(iter("abc"), "validate")) == ["a", "b", "c"]
    assert read(path).phase == "validate"
    clock.now += 2.0
    writer = start(path)
    for _ in writer.watch(range(5), "train"):
        clock.now += 1.0
    assert read(path).count == 6


def test_beat_is_written_atomically_without_sync(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doccls.system.atomic_files.os.fsync", lambda descriptor: pytest.fail("waited for the disk"))
    writer = start(path)
    for _ in range(3):
        clock.now += 2.0
        writer.beat()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_unknown_field_raises_type_error(path: Path) -> None:
    with pytest.raises(TypeError, match="unknown"):
        start(path, unknown=3)


# --- the end ---------------------------------------------------------------------------------------------------------


def test_successful_work_leaves_no_beat(path: Path) -> None:
    with open_heartbeat() as writer:
        writer.write_to(path)
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UserError("fix it"), "user error"), (KeyError("x"), "error"), (RuntimeError("odd"), "error"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "out of memory"),
        (OSError("out of memory"), "error"), (PortTakenError("taken"), "port taken"),
        (DownloadError("no network"), "download failed"),
    ],
)  # fmt: skip
def test_last_beat_records_the_error(path: Path, error: Exception, cause: str) -> None:
    with pytest.raises(type(error)), open_heartbeat() as writer:
        writer.write_to(path)
        writer.beat(step=7)
        raise error
    beat = read(path)
    assert (beat.phase, beat.cause, beat.error, beat.message) == ("failed", cause, type(error).__name__, str(error))
    assert beat.step == 7 and find_cause(error) == cause


def test_stop_is_not_a_failure(path: Path) -> None:
    with pytest.raises(Interrupted), open_heartbeat() as writer:
        writer.write_to(path)
        raise Interrupted(signal.SIGTERM)
    assert (read(path).phase, read(path).cause, read(path).message) == ("stopped", None, "SIGTERM received")


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"3", b"[]", b"{}", b'{"fold": 1}', b'{"unknown": 1}', b"\xff\xfe", b'"text"'),
        b'{"host": "h", "pid": 7, "cause": "unknown"}',
    ],
)
def test_unreadable_file_gives_no_beat(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.json").write_bytes(content)
    assert read_beat(tmp_path / "b.json") is None


@pytest.mark.parametrize("cause", Cause)
def test_cause_round_trips_as_enum(path: Path, clock: Clock, cause: Cause) -> None:
    start(path, phase="failed", cause=cause)
    assert read(path).cause is cause


def test_missing_file_gives_no_beat(tmp_path: Path) -> None:
    assert read_beat(tmp_path / "gone.json") is None
    assert read_beat(tmp_path) is None


def test_beat_with_unknown_field_of_a_later_version_is_ignored(tmp_path: Path) -> None:
    beat = asdict(Beat("host", 7)) | {"gpu": 1}
    (tmp_path / "b.json").write_text(json.dumps(beat))
    assert read_beat(tmp_path / "b.json") is None


@pytest.mark.parametrize("number", [28, 116])
def test_failed_write_does_not_stop_the_process(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, "no")

    writer = start(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        writer.beat(phase="train")
    assert read(path).count == 1 and [file.name for file in path.parent.iterdir()] == [path.name]
    writer.beat(phase="validate")
    assert read(path).count == 3


def test_failed_processes_among_several_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"rank{rank}.json" for rank in range(4)]
    heartbeats = [Heartbeat() for _ in range(3)]
    for writer, file in zip(heartbeats, files, strict=False):
        writer.write_to(file)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            heartbeats[1].beat(phase="failed", error="KeyError", message="'x'")

    monkeypatch.setattr("doccls.run.heartbeat.time.sleep", wait)
    assert {index: beat.message for index, beat in await_failures(files, within_s=3600).items()} == {1: "'x'"}
    assert await_failures([], within_s=3600) == {}
    assert await_failures(files[:1], within_s=0.0) == {}
