"""Heartbeats: at most one a second on disk, but every turn of the fold at once, and readable at any moment."""

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
from doccls.run.heartbeat import Beat, Cause, Heartbeat, await_failures, beating, find_cause, read_beat
from doccls.system.signals import Interrupted


class Clock(SimpleNamespace):
    """Stands for the module `time`."""

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
    """A heart that beats into the file, for the first time now, and then with the changes."""
    pulse = Heartbeat()
    pulse.write_to(path)
    if changes:
        pulse.beat(**changes)
    return pulse


def read(path: Path) -> Beat:
    beat = read_beat(path)
    assert beat is not None
    return beat


def test_the_first_beat_says_who_and_where(path: Path, clock: Clock) -> None:
    start(path)
    assert read(path) == Beat(socket.gethostname(), os.getpid(), count=1, time_s=clock.now + 1e9)
    assert (read(path).phase, read(path).epoch) == ("start", 0)


def test_nothing_is_written_before_it_is_told_where_and_the_run_has_a_folder(tmp_path: Path) -> None:
    pulse = Heartbeat()
    pulse.beat(phase="train")
    pulse.write_to(tmp_path / "run" / "live" / "all_rank0.json")
    pulse.beat(phase="validate")
    assert list(tmp_path.iterdir()) == []


def test_a_beat_comes_back_as_it_was(path: Path, clock: Clock) -> None:
    changes: dict[str, Any] = {
        "phase": "failed", "fold": 3, "epoch": 2, "step": 14, "cause": "user error", "error": "KeyError",
        "message": 'line\nof "words" ü',
    }  # fmt: skip
    start(path, **changes)
    beat = read(path)
    assert {name: value for name, value in asdict(beat).items() if name in changes} == changes
    assert beat == Beat(**json.loads(path.read_text()))


def test_steps_are_written_once_a_second_and_none_is_forgotten(path: Path, clock: Clock) -> None:
    pulse = start(path, phase="train", epoch=1)
    for step in range(1, 5):
        clock.now += 0.2
        pulse.beat(step=step)
        assert read(path).step == 0
    clock.now += 0.21
    pulse.beat()
    assert (read(path).step, read(path).count) == (4, 7)
    clock.now += 0.99
    pulse.beat(step=6)
    assert read(path).step == 4, "the second begins anew with each writing"


def test_the_count_grows_with_every_beat_so_that_a_watcher_needs_no_common_clock(path: Path, clock: Clock) -> None:
    pulse, counts = start(path), []
    for _ in range(4):
        clock.now += 1.0
        pulse.beat()
        counts.append(read(path).count)
    assert counts == [2, 3, 4, 5]


@pytest.mark.parametrize("turn", [{"phase": "validate"}, {"epoch": 2}, {"fold": 4}])
def test_a_turn_of_the_work_is_written_at_once(path: Path, clock: Clock, turn: dict[str, Any]) -> None:
    pulse = start(path, phase="train", fold=3, epoch=1)
    pulse.beat(step=1)
    pulse.beat(step=2, **turn)
    written = asdict(read(path))
    assert {name: written[name] for name in turn} == turn
    assert (written["step"], written["count"]) == (2, 4)


@pytest.mark.parametrize("change", [{"phase": "train"}, {"epoch": 1}, {"step": 9}, {"message": "x"}, {}])
def test_what_is_no_turn_waits_for_its_second(path: Path, clock: Clock, change: dict[str, Any]) -> None:
    pulse = start(path, phase="train", epoch=1)
    pulse.beat(**change)
    assert read(path).count == 2


def test_what_is_watched_comes_as_it_is_with_a_beat_each(path: Path, clock: Clock) -> None:
    assert list(start(path).watch(iter("abc"), "validate")) == ["a", "b", "c"]
    assert read(path).phase == "validate"
    clock.now += 2.0
    pulse = start(path)
    for _ in pulse.watch(range(5), "train"):
        clock.now += 1.0
    assert read(path).count == 6


def test_a_beat_is_whole_and_is_not_waited_for(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doccls.system.atomic_files.os.fsync", lambda descriptor: pytest.fail("waited for the disk"))
    pulse = start(path)
    for _ in range(3):
        clock.now += 2.0
        pulse.beat()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_word_that_no_beat_knows_is_a_defect(path: Path) -> None:
    with pytest.raises(TypeError, match="sped"):
        start(path, sped=3)


# --- the end ---------------------------------------------------------------------------------------------------------


def test_work_that_ended_well_leaves_no_beat(path: Path) -> None:
    with beating() as pulse:
        pulse.write_to(path)
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UserError("mend it"), "user error"), (KeyError("x"), "error"), (RuntimeError("odd"), "error"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "out of memory"),
        (OSError("out of memory"), "error"), (PortTakenError("taken"), "port taken"),
        (DownloadError("no network"), "download failed"),
    ],
)  # fmt: skip
def test_the_last_beat_says_what_ended_the_work(path: Path, error: Exception, cause: str) -> None:
    with pytest.raises(type(error)), beating() as pulse:
        pulse.write_to(path)
        pulse.beat(step=7)
        raise error
    beat = read(path)
    assert (beat.phase, beat.cause, beat.error, beat.message) == ("failed", cause, type(error).__name__, str(error))
    assert beat.step == 7 and find_cause(error) == cause


def test_a_stop_is_no_failure(path: Path) -> None:
    with pytest.raises(Interrupted), beating() as pulse:
        pulse.write_to(path)
        raise Interrupted(signal.SIGTERM)
    assert (read(path).phase, read(path).cause, read(path).message) == ("stopped", None, "SIGTERM received")


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"3", b"[]", b"{}", b'{"fold": 1}', b'{"unknown": 1}', b"\xff\xfe", b'"text"'),
        b'{"host": "h", "pid": 7, "cause": "a later one"}',
    ],
)
def test_what_cannot_be_read_is_no_beat(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.json").write_bytes(content)
    assert read_beat(tmp_path / "b.json") is None


@pytest.mark.parametrize("cause", Cause)
def test_a_cause_is_read_as_one(path: Path, clock: Clock, cause: Cause) -> None:
    start(path, phase="failed", cause=cause)
    assert read(path).cause is cause


def test_a_beat_that_is_not_there_is_no_beat(tmp_path: Path) -> None:
    assert read_beat(tmp_path / "gone.json") is None
    assert read_beat(tmp_path) is None


def test_a_beat_of_a_later_doccls_with_one_word_more_is_no_beat_and_no_error(tmp_path: Path) -> None:
    beat = asdict(Beat("host", 7)) | {"gpu": 1}
    (tmp_path / "b.json").write_text(json.dumps(beat))
    assert read_beat(tmp_path / "b.json") is None


@pytest.mark.parametrize("number", [28, 116])
def test_a_beat_that_cannot_be_written_stops_nobody(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*others: Any) -> None:
        raise OSError(number, "no")

    pulse = start(path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        pulse.beat(phase="train")
    assert read(path).count == 1 and [file.name for file in path.parent.iterdir()] == [path.name]
    pulse.beat(phase="validate")
    assert read(path).count == 3


def test_of_several_processes_those_that_failed_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"rank{rank}.json" for rank in range(4)]
    hearts = [Heartbeat() for _ in range(3)]
    for own, file in zip(hearts, files, strict=False):
        own.write_to(file)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            hearts[1].beat(phase="failed", error="KeyError", message="'x'")

    monkeypatch.setattr("doccls.run.heartbeat.time.sleep", wait)
    assert {place: beat.message for place, beat in await_failures(files, within_s=3600).items()} == {1: "'x'"}
    assert await_failures([], within_s=3600) == {}
    assert await_failures(files[:1], within_s=0.0) == {}
