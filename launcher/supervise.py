"""Supervision of a launch as pure functions: which fold starts where and when, and what follows when one ends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from doccls.run.heartbeat import Cause
from doccls.system.signals import STOP_SIGNALS
from launcher.plan import Slot, assign_slots

# Exit codes of a process that was asked to stop: 128 + N once it handles signals, -N before that.
STOP_CODES = frozenset(code for number in STOP_SIGNALS for code in (128 + number, -number))


class Outcome(StrEnum):
    """The way in which an attempt at a fold ended."""

    DONE = "done"  # its predictions exist and are valid, whatever its processes reported
    STOPPED = "stopped"  # it stopped at the launcher's request
    PREEMPTED = "preempted"  # it stopped at somebody else's request and saved a resume checkpoint
    USER_ERROR = "user error"  # it would fail again until a user fixes something
    OUT_OF_MEMORY = "out of memory"  # GPU memory
    MEMORY_TAKEN = "out of memory that others hold"  # GPU memory; alone on the device, the fold might have had enough
    PORT_TAKEN = "port taken"  # another process took the rendezvous port; each attempt has another port
    CRASHED = "crashed"
    HUNG = "hung"  # it was killed after making no progress for too long
    UNKILLABLE = "unkillable"  # its processes survived SIGKILL, with the fold's lock and their devices


# After these a fold restarts with a smaller micro-batch.
MEMORY_OUTCOMES = (Outcome.OUT_OF_MEMORY, Outcome.MEMORY_TAKEN)
# Port conflicts that a fold may have; more are no coincidence.
MAX_PORT_CONFLICTS = 10


@dataclass(frozen=True)
class Ending:
    """The known facts about an attempt that ended."""

    outcome: Outcome
    # Which error ended it, and where: a fold that repeats its last known error has failed. None if its processes
    # could not report the error, or if another attempt may well not meet it.
    error: str | None = None
    # A process of it can't be killed: its devices are not used again.
    is_stuck: bool = False


@dataclass(frozen=True)
class Policy:
    """The reactions to failures."""

    max_restarts: int = 2  # per fold, after a crash or a hang
    fail_fast: bool = False  # stop all folds when one has failed
    backoff_s: float = 1.0  # before a fold's first restart; each further one waits twice as long
    max_backoff_s: float = 60.0
    shrink: bool = True  # after out-of-memory, restart with smaller micro-batches


@dataclass(frozen=True)
class FoldState:
    """The progress of one fold of one run in this launch."""

    job: int  # its number in the queue of the launch
    status: Literal["waiting", "running", "done", "failed", "stopped"] = "waiting"
    slot: Slot | None = None  # None unless it runs
    micro_batch_size: int = 1  # most images that a rank takes at a time
    restarts: int = 0
    ready_s: float = 0.0  # earliest time of its next start
    error: str | None = None  # of its last attempt
    port_conflicts: int = 0  # attempts that ended with `Outcome.PORT_TAKEN`; they do not count as restarts
    min_micro_batch_size: int = 1  # 2 with Mixup, which needs pairs
    stopping: bool = False  # it was asked to stop, and does not start again


@dataclass(frozen=True)
class LaunchState:
    """All folds to train, and the slots they share. While `stopping`, no fold starts."""

    folds: tuple[FoldState, ...]
    slots: tuple[Slot, ...]
    stopping: bool = False

    def find(self, job: int) -> FoldState:
        """Return the state of one fold."""
        return next(fold_state for fold_state in self.folds if fold_state.job == job)

    def list_by_status(self, status: str) -> list[FoldState]:
        """Return the folds with that status."""
        return [fold_state for fold_state in self.folds if fold_state.status == status]


@dataclass(frozen=True)
class Start:
    """Start a fold in a slot."""

    job: int
    slot: Slot


@dataclass(frozen=True)
class Stop:
    """Ask all running folds to stop."""


@dataclass(frozen=True)
class Wait:
    """Wait until a fold ends, or until `until_s` if that comes first."""

    until_s: float | None


@dataclass(frozen=True)
class Finish:
    """End the launch: no fold runs, and none will start."""


Action = Start | Stop | Wait | Finish


def next_action(state: LaunchState, policy: Policy, now_s: float) -> Action:
    """Return what to do now; `start_fold`, `end_fold` and `stop_launch` then return the state that follows."""
    running, waiting = state.list_by_status("running"), state.list_by_status("waiting")
    if policy.fail_fast and state.list_by_status("failed") and not state.stopping:
        return Stop()
    if not running and (state.stopping or not waiting or not state.slots):
        return Finish()
    if state.stopping:
        return Wait(None)
    ready = [fold_state.job for fold_state in waiting if fold_state.ready_s <= now_s]
    starts = assign_slots(ready, [fold_state.slot for fold_state in running if fold_state.slot], state.slots)
    if starts:
        return Start(*starts[0])
    return Wait(min((fold_state.ready_s for fold_state in waiting if fold_state.ready_s > now_s), default=None))


def start_fold(state: LaunchState, job: int, slot: Slot) -> LaunchState:
    """Return the state once the fold runs in the slot."""
    before = state.find(job)
    assert before.status == "waiting" and not state.stopping
    assert all(other.slot is None or other.slot.number != slot.number for other in state.folds)
    return _update(state, replace(before, status="running", slot=slot))


def end_fold(state: LaunchState, job: int, ending: Ending, policy: Policy, now_s: float) -> LaunchState:
    """Return the state once the fold's attempt has ended: the fold is done, failed, stopped or waiting to restart.

    The slots on the devices of a stuck attempt are dropped.
    """
    before = state.find(job)
    assert before.status == "running"
    after = _decide_next(replace(before, slot=None), ending, policy, now_s)
    if after.status == "waiting" and (state.stopping or before.stopping):
        after = replace(after, status="stopped")
    if ending.is_stuck and before.slot is not None:
        lost = set(before.slot.devices)
        state = replace(state, slots=tuple(slot for slot in state.slots if lost.isdisjoint(slot.devices)))
    return _update(state, after)


def stop_launch(state: LaunchState) -> LaunchState:
    """Return the state once all running folds were asked to stop: waiting folds never start."""
    return replace(state, stopping=True)


def stop_folds(state: LaunchState, jobs: Sequence[int]) -> LaunchState:
    """Return the state once these folds were asked to stop: those that run end, and those that wait never start."""
    for fold_state in state.folds:
        if fold_state.job in jobs and fold_state.status == "running":
            state = _update(state, replace(fold_state, stopping=True))
        elif fold_state.job in jobs and fold_state.status == "waiting":
            state = _update(state, replace(fold_state, stopping=True, status="stopped"))
    return state


def choose_micro_batch_size(configured: int, too_large: Sequence[int]) -> int:
    """Return the configured micro-batch size, or half (rounded up) the smallest that ran out of memory, if less."""
    return min([configured, *(-(-size // 2) for size in too_large)])


def _decide_next(fold: FoldState, ending: Ending, policy: Policy, now_s: float) -> FoldState:
    outcome = ending.outcome
    if outcome is Outcome.DONE:
        return replace(fold, status="done")
    if outcome is Outcome.STOPPED:
        return replace(fold, status="stopped")
    if outcome in MEMORY_OUTCOMES and fold.micro_batch_size > fold.min_micro_batch_size and policy.shrink:
        smaller = choose_micro_batch_size(fold.micro_batch_size, [fold.micro_batch_size])
        return replace(fold, status="waiting", micro_batch_size=smaller)
    if outcome is Outcome.PREEMPTED:
        return replace(fold, status="waiting", ready_s=now_s + policy.backoff_s)
    if outcome is Outcome.PORT_TAKEN and fold.port_conflicts < MAX_PORT_CONFLICTS:
        conflicts = fold.port_conflicts + 1
        return replace(fold, status="waiting", port_conflicts=conflicts, ready_s=now_s + policy.backoff_s)
    is_repeated = ending.error is not None and ending.error == fold.error
    final = outcome in (Outcome.USER_ERROR, Outcome.UNKILLABLE, Outcome.PORT_TAKEN, *MEMORY_OUTCOMES)
    if final or is_repeated or fold.restarts == policy.max_restarts:
        return replace(fold, status="failed")
    wait_s = min(policy.backoff_s * 2.0 ** min(fold.restarts, 20), policy.max_backoff_s)
    return replace(
        fold, status="waiting", restarts=fold.restarts + 1, ready_s=now_s + wait_s, error=ending.error or fold.error
    )


def _update(state: LaunchState, changed: FoldState) -> LaunchState:
    return replace(state, folds=tuple(changed if old.job == changed.job else old for old in state.folds))


def classify_exit(
    codes: Sequence[int | None], causes: Sequence[Cause | None], done: bool, hung: bool, stopping: bool, advanced: bool
) -> Outcome:
    """Return the outcome of an attempt whose ranks have all ended; valid fold predictions (`done`) override all else.

    When one rank fails, its peers fail because it is gone: the most specific cause counts. `stopping`: the launcher
    asked them to stop; `advanced`: this attempt saved a resume checkpoint, so the next one starts further on.
    """
    if done:
        return Outcome.DONE
    if hung:
        return Outcome.HUNG
    if Cause.USER_ERROR in causes:
        return Outcome.USER_ERROR
    if Cause.PORT_TAKEN in causes:
        return Outcome.PORT_TAKEN
    if Cause.OUT_OF_MEMORY in causes:
        return Outcome.OUT_OF_MEMORY
    if Cause.MEMORY_TAKEN in causes:
        return Outcome.MEMORY_TAKEN
    if not STOP_CODES.intersection(codes):
        return Outcome.CRASHED
    if stopping:
        return Outcome.STOPPED
    return Outcome.PREEMPTED if advanced else Outcome.CRASHED
