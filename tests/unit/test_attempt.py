"""One attempt at a fold: hang detection, the killing of siblings, and the outcome with its message."""

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
    """A fake Popen of a rank."""

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
    """A fake `time` module for the launcher."""

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
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process groups that were sent SIGKILL."""
    groups: list[int] = []

    def kill(group: int, number: int) -> None:
        assert number == signal.SIGKILL
        groups.append(group)

    monkeypatch.setattr("launcher.local.os.killpg", kill)
    return groups


Start = Callable[..., tuple[RunningFold, list[Process], list[Heartbeat]]]


@pytest.fixture
def start(tmp_path: Path, clock: Clock, killed: list[int]) -> Start:
    """`start(ranks)` returns a fold whose ranks have not begun, its processes and their heartbeats."""
    paths = RunPaths(tmp_path / "20260101" / "r")
    paths.live.mkdir(parents=True)

    def make(ranks: int, hang_s: float = 10.0) -> tuple[RunningFold, list[Process], list[Heartbeat]]:
        processes = [Process(10**8 + rank) for rank in range(ranks)]  # no process has such an id
        heartbeats = [Heartbeat() for _ in processes]
        fold = start_silent(tmp_path, *processes, hang_s=hang_s)
        for rank, heartbeat in enumerate(heartbeats):
            heartbeat.write_to(paths.heartbeat(2, rank))
        return fold, processes, heartbeats

    return make


def start_silent(tmp_path: Path, *processes: Process, hang_s: float = 10.0) -> RunningFold:
    """Start a fold whose ranks have no heartbeats."""
    started = LocalProcesses(tuple(processes))  # type: ignore[arg-type]
    (slot,) = make_slots(list_cpus(len(processes)), len(processes))
    assignment = Workload("python", ("--config", "c.yaml"), 1).assign(2, slot)
    backend = SimpleNamespace(start=lambda *others: started)
    paths = RunPaths(tmp_path / "20260101" / "r")
    return RunningFold(assignment, paths, backend, Limits(hang_s, stop_s=110.0))  # type: ignore[arg-type]


def print_line(tmp_path: Path, rank: int, text: str) -> None:
    console = RunPaths(tmp_path / "20260101" / "r").console(2, rank)
    console.parent.mkdir(exist_ok=True)
    with console.open("a") as file:
        file.write(text)


def poll(fold: RunningFold, clock: Clock, duration_s: float, another_has_begun: bool = False) -> None:
    """Poll the fold once a second, as the launcher does."""
    end_s = clock.now + duration_s
    while clock.now < end_s:
        assert not fold.has_ended(another_has_begun)
        clock.now += 1.0


def test_fold_that_another_process_trains_is_not_restarted(start: Start, tmp_path: Path) -> None:
    """The owner's heartbeats overwrite those of the rejected process."""
    fold, processes, heartbeats = start(1)
    with hold_lock(RunPaths(tmp_path / "20260101" / "r").fold_lock(2), "fold 2 of run r is being trained"):
        heartbeats[0].beat(phase="train", fold=2, epoch=1, step=1)
        processes[0].code = 1
        assert fold.has_ended()
        ending, message = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.USER_ERROR)
    assert message.startswith("fold 2 of run r is being trained by process ")


def test_stale_lock_of_own_process_is_not_taken_for_another_owner(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine notices only after two minutes of silence that the holder is dead."""
    fold, processes, heartbeats = start(1)
    monkeypatch.setenv(LAUNCHED, LAUNCH)
    with hold_lock(RunPaths(tmp_path / "20260101" / "r").fold_lock(2), "fold 2 of run r is being trained"):
        heartbeats[0].beat(phase="train", fold=2, epoch=1, step=1)
        processes[0].code = -9
        assert fold.has_ended()
        ending, message = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.CRASHED) and "was killed by SIGKILL" in message


def test_unkillable_process_is_given_up_after_two_minutes(start: Start, clock: Clock, killed: list[int]) -> None:
    """Such as one in a system call on a GPU that fell off the bus."""
    fold, processes, heartbeats = start(2)
    for heartbeat in heartbeats:
        heartbeat.beat(phase="train", fold=2, epoch=1, step=1)
    fold.has_ended()
    poll(fold, clock, 11 + 120)
    processes[0].code = -9
    for _ in range(2):
        clock.now += 1.0
    assert fold.has_ended() and set(killed) >= {process.pid for process in processes}
    assert fold.conclude(done=True, stopping=False)[0] == Ending(Outcome.DONE, is_stuck=True), "its predictions exist"
    ending, message = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.UNKILLABLE, is_stuck=True)
    assert message.startswith("rank 1 could not be killed within 120 s (no progress within 10 s (--hang-timeout) on ")
    assert f"ps -o pid,stat,wchan -p {processes[0].pid},{processes[1].pid}; dmesg" in message


# --- hangs -----------------------------------------------------------------------------------------------------------


def test_slow_start_is_not_a_hang(start: Start, clock: Clock, killed: list[int]) -> None:
    fold, _, heartbeats = start(1)
    poll(fold, clock, 3000)
    heartbeats[0].beat(phase="train", fold=2, epoch=1, step=1)
    poll(fold, clock, 9)
    assert killed == []


def test_start_of_over_an_hour_is_a_hang(start: Start, clock: Clock, killed: list[int]) -> None:
    fold, processes, _ = start(1)
    poll(fold, clock, 3610)
    assert set(killed) == {processes[0].pid}
    processes[0].code = -9
    message = fold.conclude(done=False, stopping=False)[1]
    assert message.startswith("training did not begin within 3600 s on ")
    assert "s since startup (imports, weights)" in message


def test_hung_ranks_dump_stacks_and_are_killed(start: Start, clock: Clock, killed: list[int]) -> None:
    fold, processes, heartbeats = start(2)
    for step in range(1, 4):
        for heartbeat in heartbeats:
            heartbeat.beat(phase="train", fold=2, epoch=step)
        poll(fold, clock, 8)
    assert killed == []
    for step in range(4, 8):
        heartbeats[0].beat(phase="train", epoch=step)  # rank 1 hangs
        poll(fold, clock, 4)
    assert set(killed) == {process.pid for process in processes}
    assert [process.signals for process in processes] == [[signal.SIGUSR2, signal.SIGCONT]] * 2, "once"
    for process in processes:
        process.code = -9
    ending, message = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.HUNG)
    assert message.startswith("no progress within 10 s (--hang-timeout) on ")
    assert ": rank 0 " in message and "rank 1 " in message and "epoch 3" in message


def test_start_of_over_ten_minutes_is_a_hang_once_another_fold_has_begun(
    start: Start, clock: Clock, killed: list[int]
) -> None:
    fold, processes, _ = start(1)
    poll(fold, clock, 2000)
    poll(fold, clock, 590, another_has_begun=True)
    assert killed == []
    poll(fold, clock, 20, another_has_begun=True)
    assert set(killed) == {processes[0].pid}


def test_time_while_launcher_was_suspended_does_not_count(start: Start, clock: Clock, killed: list[int]) -> None:
    fold, _, heartbeats = start(2)
    for heartbeat in heartbeats:
        heartbeat.beat(phase="train", fold=2, epoch=1)
    poll(fold, clock, 8)
    clock.now += 10_000  # SIGSTOP, or a machine that slept
    poll(fold, clock, 2)
    assert killed == []
    poll(fold, clock, 6)
    assert len(set(killed)) == 2


def test_zero_hang_timeout_disables_hang_detection(start: Start, clock: Clock, killed: list[int]) -> None:
    fold, _, heartbeats = start(1, hang_s=0.0)
    heartbeats[0].beat(phase="train", fold=2, epoch=1)
    poll(fold, clock, 10_000)
    assert killed == []


# --- stops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["train", "stopping"])
def test_fold_asked_to_stop_is_killed_only_after_stop_limit(
    start: Start, clock: Clock, killed: list[int], phase: str
) -> None:
    fold, processes, heartbeats = start(2)
    for heartbeat in heartbeats:
        heartbeat.beat(phase=phase, fold=2, epoch=1)
    fold.request_stop()
    assert [process.signals for process in processes] == [[signal.SIGTERM]] * 2
    poll(fold, clock, 119)
    assert killed == []
    poll(fold, clock, 3)
    assert set(killed) == {process.pid for process in processes}
    for process in processes:
        process.code = -9
    message = fold.conclude(done=False, stopping=True)[1]
    assert message.startswith("not stopped within 120 s (train.stop_timeout_s + 10 s) on ")


def test_save_after_foreign_stop_request_is_not_a_hang(start: Start, clock: Clock, killed: list[int]) -> None:
    fold, _, heartbeats = start(2)
    for heartbeat in heartbeats:
        heartbeat.beat(phase="stopping", fold=2, epoch=1)
    poll(fold, clock, 119)
    assert killed == []
    poll(fold, clock, 5)
    assert len(set(killed)) == 2


@pytest.mark.parametrize("code", [143, -15])
def test_siblings_of_stopped_rank_have_until_stop_limit(
    start: Start, clock: Clock, killed: list[int], code: int
) -> None:
    fold, processes, _ = start(2)
    processes[1].code = code
    poll(fold, clock, 119)
    assert killed == []
    poll(fold, clock, 3)
    assert set(killed) == {processes[0].pid}


# --- siblings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, -9])
def test_siblings_of_ended_rank_are_killed_after_five_seconds(
    start: Start, clock: Clock, killed: list[int], code: int
) -> None:
    fold, processes, _ = start(3)
    poll(fold, clock, 20)
    processes[1].code = code
    poll(fold, clock, 5)
    assert killed == []
    poll(fold, clock, 2)
    assert set(killed) == {processes[0].pid, processes[2].pid}
    for process in processes:
        process.code = -9
    assert fold.has_ended()


# --- outcome and message ---------------------------------------------------------------------------------------------


def fail(heartbeat: Heartbeat, **last: Any) -> None:
    heartbeat.beat(phase="failed", fold=2, **last)


def test_killed_rank_is_reported_instead_of_its_failing_peer(start: Start, tmp_path: Path) -> None:
    fold, processes, heartbeats = start(2)
    print_line(tmp_path, 0, "[STEP 1/9]\n[EXIT][ERROR] training failed: Connection closed by peer\n")
    fail(heartbeats[0], cause="error", error="RuntimeError", message="Connection closed by peer", step=4)
    processes[0].code, processes[1].code = 1, -9  # seen in the same poll
    assert fold.has_ended()
    ending, message = fold.conclude(done=False, stopping=False)
    assert ending == Ending(Outcome.CRASHED)
    assert message.startswith("rank 1 was killed by SIGKILL, last seen in startup") and "| [STEP 1/9]" in message


@pytest.mark.parametrize("cause", ["user error", "out of memory", "port taken"])
def test_most_specific_cause_is_reported_whichever_rank_ended_first(start: Start, tmp_path: Path, cause: str) -> None:
    fold, processes, heartbeats = start(2)
    processes[0].code = 1
    fail(heartbeats[0], cause="error", error="RuntimeError", message="lost peer", step=3)
    assert not fold.has_ended()
    processes[1].code = 1
    fail(heartbeats[1], cause=cause, error="Full", message="too large", step=4)
    assert fold.has_ended()
    ending, message = fold.conclude(done=False, stopping=False)
    assert (str(ending.outcome), message) == (cause, "rank 1: Full: too large")


def test_failed_download_is_not_a_permanent_error(start: Start, tmp_path: Path) -> None:
    """The fold gets all its restarts, although each attempt ends at the same step."""
    fold, processes, heartbeats = start(1)
    print_line(tmp_path, 0, "[EXIT][ERROR] training failed: could not be fetched\n")
    processes[0].code = 1
    fail(heartbeats[0], cause="download failed", error="DownloadError", message="could not be fetched")
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False) == (Ending(Outcome.CRASHED), "could not be fetched")


def test_error_message_is_the_printed_one_and_error_key_has_step_and_fold(start: Start, tmp_path: Path) -> None:
    fold, processes, heartbeats = start(1)
    print_line(tmp_path, 0, "[EXIT][ERROR] training failed: 'a defect'\n")
    processes[0].code = 1
    fail(heartbeats[0], cause="error", error="KeyError", message="'a defect'", step=7)
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False) == (
        Ending(Outcome.CRASHED, "KeyError after step 7 of fold 2"), "'a defect'"
    )  # fmt: skip


def test_end_before_first_beat_is_reported_by_output_of_this_attempt(start: Start, tmp_path: Path) -> None:
    print_line(tmp_path, 0, "[EXIT][ERROR] training failed: in the previous attempt\n")
    fold, processes, _ = start(1)
    print_line(tmp_path, 0, "[EXIT][ERROR] rank 0 failed: no module\n")
    processes[0].code = 1
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False) == (Ending(Outcome.CRASHED, "no module"), "no module")


@pytest.mark.parametrize("begun", [True, False])
def test_foreign_stop_request_is_not_a_permanent_error(start: Start, tmp_path: Path, begun: bool) -> None:
    fold, processes, heartbeats = start(1)
    print_line(tmp_path, 0, "[EXIT][ERROR] training failed: SIGTERM received\n")
    if begun:
        heartbeats[0].beat(phase="stopped", fold=2, step=3, message="SIGTERM received")
    processes[0].code = 128 + signal.SIGTERM
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False) == (Ending(Outcome.CRASHED), "SIGTERM received")


@pytest.mark.parametrize("first", [0, 1])
def test_rank_0_reports_for_ranks_that_stop_together(start: Start, tmp_path: Path, first: int) -> None:
    fold, processes, _ = start(2)
    print_line(tmp_path, 0, "[EXIT][ERROR] training failed: SIGINT received\n")
    for rank in (first, 1 - first):
        processes[rank].code = 128 + signal.SIGINT
        fold.has_ended()
    assert fold.conclude(done=False, stopping=False)[1] == "rank 0: SIGINT received"


def test_exit_by_signal_is_done_stopped_or_crashed(start: Start) -> None:
    fold, processes, _ = start(1)
    processes[0].code = 143
    assert fold.conclude(done=True, stopping=False)[0] == Ending(Outcome.DONE)
    assert fold.conclude(done=False, stopping=True)[0] == Ending(Outcome.STOPPED)
    assert fold.conclude(done=False, stopping=False)[0] == Ending(Outcome.CRASHED)


def test_fold_that_saved_checkpoint_before_foreign_stop_is_preempted(start: Start, tmp_path: Path) -> None:
    checkpoints = RunPaths(tmp_path / "20260101" / "r").resume_checkpoints(2)
    checkpoints[0].parent.mkdir(parents=True)
    checkpoints[0].write_bytes(b"previous attempt")
    fold, processes, _ = start(1)
    print_line(tmp_path, 0, "[EXIT][ERROR] training failed: SIGTERM received\n")
    processes[0].code = 143
    assert not fold.has_advanced
    checkpoints[1].write_bytes(b"this attempt")
    assert fold.has_advanced
    assert fold.conclude(done=False, stopping=False) == (Ending(Outcome.PREEMPTED), "SIGTERM received")


def test_beats_of_previous_attempt_are_kept_but_not_used(clock: Clock, killed: list[int], tmp_path: Path) -> None:
    path = RunPaths(tmp_path / "20260101" / "r").heartbeat(2, 0)
    path.parent.mkdir(parents=True)
    earlier = Heartbeat()
    earlier.write_to(path)
    fail(earlier, cause="error", error="KeyError", message="'a defect'", step=7)
    before = path.read_bytes()
    fold = start_silent(tmp_path, Process(10**8))
    assert path.read_bytes() == before
    poll(fold, clock, 3000)  # imports
    fold.processes.ranks[0].code = 1  # type: ignore[attr-defined]
    assert fold.has_ended()
    assert fold.conclude(done=False, stopping=False)[1].startswith("rank 0 ended with exit code 1; its last lines:")
