"""One attempt at a fold: who is taken for silent, whose siblings are ended, and what the end is said to be."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from doccls.run.heartbeat import Heartbeat
from doccls.run.paths import RunPaths
from doccls.system.lifeline import LAUNCHED
from doccls.system.lock import hold_lock
from launcher.attempt import Limits, RunningFold
from launcher.devices import list_cpus
from launcher.local import LAUNCH, LocalProcesses
from launcher.plan import Workload, make_slots
from launcher.supervise import Ending, Outcome


class Process:
    """Stands for a rank's Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None
        self.signals: list[int] = []

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def terminate(self) -> None:
        self.signals.append(signal.SIGTERM)


class Clock(SimpleNamespace):
    """Stands for the module `time` in the launcher's rooms."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("doccls.system.clock", "launcher.local"):
        monkeypatch.setattr(f"{module}.time", clock)
    return clock


@pytest.fixture
def struck(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process groups that were sent SIGKILL."""
    groups: list[int] = []

    def kill(group: int, number: int) -> None:
        assert number == signal.SIGKILL
        groups.append(group)

    monkeypatch.setattr("launcher.local.os.killpg", kill)
    return groups


Start = Callable[..., tuple[RunningFold, list[Process], list[Heartbeat]]]


@pytest.fixture
def start(tmp_path: Path, clock: Clock, struck: list[int]) -> Start:
    """A fold of so many ranks that have begun nothing yet: `fold, processes, hearts`."""
    paths = RunPaths(tmp_path / "20260101" / "r")
    paths.live.mkdir(parents=True)

    def make(ranks: int, hang_s: float = 10.0) -> tuple[RunningFold, list[Process], list[Heartbeat]]:
        processes = [Process(10**8 + rank) for rank in range(ranks)]  # no process has such an id
        hearts = [Heartbeat() for _ in processes]
        fold = start_silent(tmp_path, *processes, hang_s=hang_s)
        for rank, heartbeat in enumerate(hearts):
            heartbeat.write_to(paths.heartbeat(2, rank))
        return fold, processes, hearts

    return make


def start_silent(tmp_path: Path, *processes: Process, hang_s: float = 10.0) -> RunningFold:
    """A fold whose ranks say nothing."""
    made = LocalProcesses(tuple(processes))  # type: ignore[arg-type]
    (slot,) = make_slots(list_cpus(len(processes)), len(processes))
    assignment = Workload("python", ("--config", "c.yaml"), 1).assign(2, slot)
    backend = SimpleNamespace(start=lambda *others: made)
    paths = RunPaths(tmp_path / "20260101" / "r")
    return RunningFold(assignment, paths, backend, Limits(hang_s, stop_s=110.0))  # type: ignore[arg-type]


def say(tmp_path: Path, rank: int, text: str) -> None:
    console = RunPaths(tmp_path / "20260101" / "r").console(2, rank)
    console.parent.mkdir(exist_ok=True)
    with console.open("a") as file:
        file.write(text)


def look(fold: RunningFold, clock: Clock, for_s: float, another_has_begun: bool = False) -> None:
    """As the launcher does, for so long."""
    end_s = clock.now + for_s
    while clock.now < end_s:
        assert not fold.has_ended(another_has_begun)
        clock.now += 1.0


def test_a_fold_that_another_process_trains_is_not_started_again(start: Start, tmp_path: Path) -> None:
    """Its heartbeats come over those of the process that was refused."""
    fold, processes, hearts = start(1)
    with hold_lock(RunPaths(tmp_path / "20260101" / "r").fold_lock(2), "fold 2 of run r is being trained"):
        hearts[0].beat(phase="train", fold=2, epoch=1, step=1)
        processes[0].code = 1
        assert fold.has_ended()
        ending, told = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.USER_ERROR)
    assert told.startswith("fold 2 of run r is being trained by process ")


def test_a_lock_that_outlives_the_folds_own_process_is_no_other_owners(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine sees by its silence, two minutes later, that the holder is dead."""
    fold, processes, hearts = start(1)
    monkeypatch.setenv(LAUNCHED, LAUNCH)
    with hold_lock(RunPaths(tmp_path / "20260101" / "r").fold_lock(2), "fold 2 of run r is being trained"):
        hearts[0].beat(phase="train", fold=2, epoch=1, step=1)
        processes[0].code = -9
        assert fold.has_ended()
        ending, told = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.CRASHED) and "was killed by SIGKILL" in told


def test_a_process_that_cannot_be_killed_is_given_up_after_two_minutes(
    start: Start, clock: Clock, struck: list[int]
) -> None:
    """As in a system call on a GPU that fell off the bus."""
    fold, processes, hearts = start(2)
    for heartbeat in hearts:
        heartbeat.beat(phase="train", fold=2, epoch=1, step=1)
    fold.has_ended()
    look(fold, clock, 11 + 120)
    processes[0].code = -9
    for _ in range(2):
        clock.now += 1.0
    assert fold.has_ended() and set(struck) >= {process.pid for process in processes}
    assert fold.conclude(done=True, stopping=False)[0] == Ending(Outcome.DONE, stays=True), "its part is there"
    ending, told = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.UNKILLABLE, stays=True)
    assert told.startswith("rank 1 could not be killed within 120 s (no progress within 10 s (--hang-timeout) on ")
    assert f"ps -o pid,stat,wchan -p {processes[0].pid},{processes[1].pid}; dmesg" in told


# --- silence ---------------------------------------------------------------------------------------------------------


def test_imports_and_weights_are_not_taken_for_a_hang(start: Start, clock: Clock, struck: list[int]) -> None:
    fold, _, hearts = start(1)
    look(fold, clock, 3000)
    hearts[0].beat(phase="train", fold=2, epoch=1, step=1)
    look(fold, clock, 9)
    assert struck == []


def test_a_start_that_takes_over_an_hour_is(start: Start, clock: Clock, struck: list[int]) -> None:
    fold, processes, _ = start(1)
    look(fold, clock, 3610)
    assert set(struck) == {processes[0].pid}
    processes[0].code = -9
    told = fold.conclude(done=False, stopping=False)[1]
    assert told.startswith("training not begun within 3600 s on ")
    assert "s since startup (imports, weights)" in told


def test_a_rank_that_trains_and_falls_silent_is_asked_for_its_stacks_and_struck(
    start: Start, clock: Clock, struck: list[int]
) -> None:
    fold, processes, hearts = start(2)
    for step in range(1, 4):
        for heartbeat in hearts:
            heartbeat.beat(phase="train", fold=2, epoch=step)
        look(fold, clock, 8)
    assert struck == []
    for step in range(4, 8):
        hearts[0].beat(phase="train", epoch=step)  # the other one is silent
        look(fold, clock, 4)
    assert set(struck) == {one.pid for one in processes}
    assert [one.signals for one in processes] == [[signal.SIGUSR2, signal.SIGCONT]] * 2, "once"
    for one in processes:
        one.code = -9
    ending, told = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.HUNG)
    assert told.startswith("no progress within 10 s (--hang-timeout) on ")
    assert ": rank 0 " in told and "rank 1 " in told and "epoch 3" in told


def test_a_start_that_takes_ten_minutes_is_once_another_fold_has_begun(
    start: Start, clock: Clock, struck: list[int]
) -> None:
    fold, processes, _ = start(1)
    look(fold, clock, 2000)
    look(fold, clock, 590, another_has_begun=True)
    assert struck == []
    look(fold, clock, 20, another_has_begun=True)
    assert set(struck) == {processes[0].pid}


def test_time_in_which_the_launcher_was_suspended_does_not_count(start: Start, clock: Clock, struck: list[int]) -> None:
    fold, _, hearts = start(2)
    for heartbeat in hearts:
        heartbeat.beat(phase="train", fold=2, epoch=1)
    look(fold, clock, 8)
    clock.now += 10_000  # SIGSTOP, or a machine that slept
    look(fold, clock, 2)
    assert struck == []
    look(fold, clock, 6)
    assert len(set(struck)) == 2


def test_without_a_limit_silence_is_borne(start: Start, clock: Clock, struck: list[int]) -> None:
    fold, _, hearts = start(1, hang_s=0.0)
    hearts[0].beat(phase="train", fold=2, epoch=1)
    look(fold, clock, 10_000)
    assert struck == []


# --- a stop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["train", "stopping"])
def test_a_fold_that_is_asked_to_stop_has_until_the_limit_of_the_stop(
    start: Start, clock: Clock, struck: list[int], phase: str
) -> None:
    fold, processes, hearts = start(2)
    for heartbeat in hearts:
        heartbeat.beat(phase=phase, fold=2, epoch=1)
    fold.ask_to_leave()
    assert [one.signals for one in processes] == [[signal.SIGTERM]] * 2
    look(fold, clock, 119)
    assert struck == []
    look(fold, clock, 3)
    assert set(struck) == {one.pid for one in processes}
    for one in processes:
        one.code = -9
    told = fold.conclude(done=False, stopping=True)[1]
    assert told.startswith("asked to stop, and not gone after 120 s (train.stop_timeout_s and 10 s more) on ")


def test_a_state_that_is_saved_for_another_ones_stop_is_not_taken_for_a_hang(
    start: Start, clock: Clock, struck: list[int]
) -> None:
    fold, _, hearts = start(2)
    for heartbeat in hearts:
        heartbeat.beat(phase="stopping", fold=2, epoch=1)
    look(fold, clock, 119)
    assert struck == []
    look(fold, clock, 5)
    assert len(set(struck)) == 2


@pytest.mark.parametrize("code", [143, -15])
def test_siblings_of_one_that_was_asked_to_leave_may_still_be_saving(
    start: Start, clock: Clock, struck: list[int], code: int
) -> None:
    fold, processes, _ = start(2)
    processes[1].code = code
    look(fold, clock, 119)
    assert struck == []
    look(fold, clock, 3)
    assert set(struck) == {processes[0].pid}


# --- siblings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, -9])
def test_siblings_of_one_that_is_gone_get_five_seconds(
    start: Start, clock: Clock, struck: list[int], code: int
) -> None:
    fold, processes, _ = start(3)
    look(fold, clock, 20)
    processes[1].code = code
    look(fold, clock, 5)
    assert struck == []
    look(fold, clock, 2)
    assert set(struck) == {processes[0].pid, processes[2].pid}
    for one in processes:
        one.code = -9
    assert fold.has_ended()


# --- what an end is said to be ---------------------------------------------------------------------------------------


def fail(heartbeat: Heartbeat, **last: Any) -> None:
    heartbeat.beat(phase="failed", fold=2, **last)


def test_who_was_killed_is_the_cause_and_not_who_mourns(start: Start, tmp_path: Path) -> None:
    fold, processes, hearts = start(2)
    say(tmp_path, 0, "[STEP 1/9]\n[EXIT][ERROR] training failed: Connection closed by peer\n")
    fail(hearts[0], cause="error", error="RuntimeError", message="Connection closed by peer", step=4)
    processes[0].code, processes[1].code = 1, -9  # seen at one look
    assert fold.has_ended()
    ending, told = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.CRASHED)
    assert told.startswith("rank 1 was killed by SIGKILL, last seen in startup") and "| [STEP 1/9]" in told


@pytest.mark.parametrize("cause", ["user error", "out of memory", "port taken"])
def test_the_word_that_says_most_is_told_whoever_ended_first(start: Start, tmp_path: Path, cause: str) -> None:
    fold, processes, hearts = start(2)
    processes[0].code = 1
    fail(hearts[0], cause="error", error="RuntimeError", message="peer is gone", step=3)
    assert not fold.has_ended()
    processes[1].code = 1
    fail(hearts[1], cause=cause, error="Full", message="too large", step=4)
    assert fold.has_ended()
    ending, told = fold.conclude(done=False, stopping=False)
    assert (str(ending.outcome), told) == (cause, "rank 1: Full: too large")


def test_a_failed_download_is_no_error_that_comes_back(start: Start, tmp_path: Path) -> None:
    """The fold gets all its restarts, though each attempt ends at the same step."""
    fold, processes, hearts = start(1)
    say(tmp_path, 0, "[EXIT][ERROR] training failed: could not be fetched\n")
    processes[0].code = 1
    fail(hearts[0], cause="download failed", error="DownloadError", message="could not be fetched")
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False) == (Ending(Outcome.CRASHED), "could not be fetched")


def test_an_error_is_told_by_its_last_line_and_known_by_its_place(start: Start, tmp_path: Path) -> None:
    fold, processes, hearts = start(1)
    say(tmp_path, 0, "[EXIT][ERROR] training failed: 'a defect'\n")
    processes[0].code = 1
    fail(hearts[0], cause="error", error="KeyError", message="'a defect'", step=7)
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False) == (
        Ending(Outcome.CRASHED, "KeyError after step 7 of fold 2"), "'a defect'"
    )  # fmt: skip


def test_an_end_before_any_beat_is_told_by_what_was_printed_in_this_attempt(start: Start, tmp_path: Path) -> None:
    say(tmp_path, 0, "[EXIT][ERROR] training failed: of an attempt before\n")
    fold, processes, _ = start(1)
    say(tmp_path, 0, "[EXIT][ERROR] rank 0 failed: no module\n")
    processes[0].code = 1
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False) == (Ending(Outcome.CRASHED, "no module"), "no module")


@pytest.mark.parametrize("begun", [True, False])
def test_to_be_asked_to_leave_by_another_is_no_error_that_comes_back(start: Start, tmp_path: Path, begun: bool) -> None:
    fold, processes, hearts = start(1)
    say(tmp_path, 0, "[EXIT][ERROR] training failed: SIGTERM received\n")
    if begun:
        hearts[0].beat(phase="stopped", fold=2, step=3, message="SIGTERM received")
    processes[0].code = 128 + signal.SIGTERM
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False) == (Ending(Outcome.CRASHED), "SIGTERM received")


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_leave_together_are_told_by_the_main_ones_word_whoever_ended_first(
    start: Start, tmp_path: Path, first: int
) -> None:
    fold, processes, _ = start(2)
    say(tmp_path, 0, "[EXIT][ERROR] training failed: SIGINT received\n")
    for rank in (first, 1 - first):
        processes[rank].code = 128 + signal.SIGINT
        fold.has_ended()
    assert fold.conclude(done=False, stopping=False)[1] == "rank 0: SIGINT received"


def test_done_and_stopped_need_no_reason(start: Start) -> None:
    fold, processes, _ = start(1)
    processes[0].code = 143
    assert fold.conclude(done=True, stopping=False)[0] == Ending(Outcome.DONE)
    assert fold.conclude(done=False, stopping=True)[0] == Ending(Outcome.STOPPED)
    assert fold.conclude(done=False, stopping=False)[0] == Ending(Outcome.CRASHED)


def test_who_left_with_a_state_saved_goes_on(start: Start, tmp_path: Path) -> None:
    states = RunPaths(tmp_path / "20260101" / "r").resume_checkpoints(2)
    states[0].parent.mkdir(parents=True)
    states[0].write_bytes(b"of an attempt before")
    fold, processes, _ = start(1)
    say(tmp_path, 0, "[EXIT][ERROR] training failed: SIGTERM received\n")
    processes[0].code = 143
    assert not fold.has_advanced
    states[1].write_bytes(b"of this one")
    assert fold.has_advanced
    assert fold.conclude(done=False, stopping=False) == (Ending(Outcome.LEFT), "SIGTERM received")


def test_beats_of_an_attempt_before_are_kept_for_the_fold_and_not_taken_for_its_own(
    clock: Clock, struck: list[int], tmp_path: Path
) -> None:
    place = RunPaths(tmp_path / "20260101" / "r").heartbeat(2, 0)
    place.parent.mkdir(parents=True)
    earlier = Heartbeat()
    earlier.write_to(place)
    fail(earlier, cause="error", error="KeyError", message="'a defect'", step=7)
    before = place.read_bytes()
    fold = start_silent(tmp_path, Process(10**8))
    assert place.read_bytes() == before
    look(fold, clock, 3000)  # it imports
    fold.processes.ranks[0].code = 1  # type: ignore[attr-defined]
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False)[1].startswith("rank 0 ended with exit code 1; its last lines:")
