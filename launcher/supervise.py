"""Which fold starts where and when, and what becomes of one that ended: pure functions of a state."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from doccls.run.heartbeat import Cause
from doccls.system.signals import STOP_SIGNALS
from launcher.plan import Slot, assign_slots

STOP_CODES = frozenset(code for number in STOP_SIGNALS for code in (128 + number, -number))
"""Exit codes of a process that was asked to leave; the second before it hears signals."""


class Outcome(StrEnum):
    """How an attempt at a fold ended."""

    DONE = "done"
    """Its part is there and valid, whatever else was said."""
    STOPPED = "stopped"
    """The launcher asked it to leave, and it left."""
    LEFT = "left"
    """Somebody else asked it; it has saved where it was, and goes on from there."""
    USER_ERROR = "user error"
    """It would fail again: a user has to mend something."""
    OUT_OF_MEMORY = "out of memory"
    """Of a GPU."""
    MEMORY_TAKEN = "out of memory that others hold"
    """Of a GPU. Alone on it, the fold might have had enough."""
    PORT_TAKEN = "port taken"
    """Another process came to listen where the ranks were to meet; each attempt has another port."""
    CRASHED = "crashed"
    HUNG = "hung"
    """It was killed after it had made no progress for too long."""
    UNKILLABLE = "unkillable"
    """Its processes are still there after SIGKILL, with the fold's lock and their devices."""


MEMORY_OUTCOMES = (Outcome.OUT_OF_MEMORY, Outcome.MEMORY_TAKEN)
"""After these a fold takes fewer images at a time."""
MOST_TAKEN_PORTS = 10
"""That a fold may meet; more are no coincidence."""


@dataclass(frozen=True)
class Ending:
    """What is known of an attempt that ended."""

    outcome: Outcome
    error: str | None = None
    """Which error ended it, and where; None if it had no time to say, or if another attempt may well not meet it. One
    that comes back is not met a third time."""
    stays: bool = False
    """A process of it can't be killed: its devices are used no more."""


@dataclass(frozen=True)
class Policy:
    """What to do about what goes wrong."""

    max_restarts: int = 2
    """Of one fold, after a crash or a hang."""
    fail_fast: bool = False
    """Stop all folds when one has failed."""
    backoff_s: float = 1.0
    """Before a fold's first restart; each further one waits twice as long."""
    longest_backoff_s: float = 60.0
    shrink: bool = True
    """After out-of-memory, go on with smaller micro-batches."""


@dataclass(frozen=True)
class FoldState:
    """Where one fold stands."""

    fold: int
    status: Literal["waiting", "running", "done", "failed", "stopped"] = "waiting"
    slot: Slot | None = None
    """Where it runs; None when it does not."""
    micro_batch_size: int = 1
    """Most images a rank takes at a time."""
    restarts: int = 0
    ready_s: float = 0.0
    """Not to be started before."""
    error: str | None = None
    """Of its last attempt."""
    taken_ports: int = 0
    """Attempts that ended with `Outcome.PORT_TAKEN`; they are no restarts."""


@dataclass(frozen=True)
class LaunchState:
    """All folds to train, and the slots they share."""

    folds: tuple[FoldState, ...]
    slots: tuple[Slot, ...]
    stopping: bool = False
    """No fold is started any more."""

    def find(self, fold: int) -> FoldState:
        """One fold's."""
        return next(one for one in self.folds if one.fold == fold)

    def list_in(self, status: str) -> list[FoldState]:
        """The folds that stand so."""
        return [one for one in self.folds if one.status == status]


@dataclass(frozen=True)
class Start:
    """Start a fold in a slot."""

    fold: int
    slot: Slot


@dataclass(frozen=True)
class Stop:
    """Ask all that runs to leave."""


@dataclass(frozen=True)
class Wait:
    """Nothing to do until something ends, or until then."""

    until_s: float | None


@dataclass(frozen=True)
class Finish:
    """Nothing runs, and nothing will."""


Action = Start | Stop | Wait | Finish


def next_action(state: LaunchState, policy: Policy, now_s: float) -> Action:
    """What to do now; then `start_fold`, `end_fold` or `stop_launch` give the state that follows."""
    running, waiting = state.list_in("running"), state.list_in("waiting")
    if policy.fail_fast and state.list_in("failed") and not state.stopping:
        return Stop()
    if not running and (state.stopping or not waiting or not state.slots):
        return Finish()
    if state.stopping:
        return Wait(None)
    ready = [one.fold for one in waiting if one.ready_s <= now_s]
    starts = assign_slots(ready, [one.slot for one in running if one.slot is not None], state.slots)
    if starts:
        return Start(*starts[0])
    return Wait(min((one.ready_s for one in waiting if one.ready_s > now_s), default=None))


def start_fold(state: LaunchState, fold: int, slot: Slot) -> LaunchState:
    """The state once the fold runs in the slot."""
    before = state.find(fold)
    assert before.status == "waiting" and not state.stopping
    assert all(one.slot is None or one.slot.number != slot.number for one in state.folds)
    return _update(state, replace(before, status="running", slot=slot))


def end_fold(state: LaunchState, fold: int, ending: Ending, policy: Policy, now_s: float) -> LaunchState:
    """The state once the fold's attempt has ended: done, failed, stopped, or waiting for another.

    The devices of one that can't be killed are used no more.
    """
    before = state.find(fold)
    assert before.status == "running"
    after = _judge(replace(before, slot=None), ending, policy, now_s)
    if after.status == "waiting" and state.stopping:
        after = replace(after, status="stopped")
    if ending.stays and before.slot is not None:
        lost = set(before.slot.devices)
        state = replace(state, slots=tuple(slot for slot in state.slots if lost.isdisjoint(slot.devices)))
    return _update(state, after)


def stop_launch(state: LaunchState) -> LaunchState:
    """The state once all that runs was asked to leave: what waits never starts."""
    return replace(state, stopping=True)


def choose_micro_batch_size(own: int, too_large: Sequence[int]) -> int:
    """Most images a rank takes at a time: the config's own, or less where some sizes were too large for the memory."""
    return min([own, *(-(-size // 2) for size in too_large)])


def _judge(fold: FoldState, ending: Ending, policy: Policy, now_s: float) -> FoldState:
    outcome = ending.outcome
    if outcome is Outcome.DONE:
        return replace(fold, status="done")
    if outcome is Outcome.STOPPED:
        return replace(fold, status="stopped")
    if outcome in MEMORY_OUTCOMES and fold.micro_batch_size > 1 and policy.shrink:
        smaller = choose_micro_batch_size(fold.micro_batch_size, [fold.micro_batch_size])
        return replace(fold, status="waiting", micro_batch_size=smaller)
    if outcome is Outcome.LEFT:
        return replace(fold, status="waiting", ready_s=now_s + policy.backoff_s)
    if outcome is Outcome.PORT_TAKEN and fold.taken_ports < MOST_TAKEN_PORTS:
        return replace(fold, status="waiting", taken_ports=fold.taken_ports + 1, ready_s=now_s + policy.backoff_s)
    came_back = ending.error is not None and ending.error == fold.error
    final = outcome in (Outcome.USER_ERROR, Outcome.UNKILLABLE, Outcome.PORT_TAKEN, *MEMORY_OUTCOMES)
    if final or came_back or fold.restarts == policy.max_restarts:
        return replace(fold, status="failed")
    wait_s = min(policy.backoff_s * 2.0 ** min(fold.restarts, 20), policy.longest_backoff_s)
    return replace(
        fold, status="waiting", restarts=fold.restarts + 1, ready_s=now_s + wait_s, error=ending.error or fold.error
    )


def _update(state: LaunchState, changed: FoldState) -> LaunchState:
    return replace(state, folds=tuple(changed if one.fold == changed.fold else one for one in state.folds))


def judge(
    codes: Sequence[int | None], causes: Sequence[Cause | None], done: bool, hung: bool, stopping: bool, advanced: bool
) -> Outcome:
    """What the end of a fold's ranks means together; its valid part counts for more than any word.

    When one rank fails, the others fail for want of it: the cause is the one that says most. `stopping`: the launcher
    has asked them to leave; `advanced`: a state was saved in this attempt, so that the next one begins further on.
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
    return Outcome.LEFT if advanced else Outcome.CRASHED
