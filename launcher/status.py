"""Where each fold of a run stands, by what was seen of it (`launcher.survey`), and how that is told; pure."""

from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from doccls.run.heartbeat import Beat, tell_place
from doccls.system.lock import Holder
from launcher.ledger import Attempt, Ledger, tell_duration
from launcher.slurm_text import Going, QueueEntry
from launcher.supervise import Outcome


class State(StrEnum):
    """Where a fold stands."""

    DONE = "done"
    """Its part is there and valid."""
    RUNNING = "running"
    WAITING = "waiting"
    """For a slot, or for the time of its restart: a launcher will start it."""
    FAILED = "failed"
    STOPPED = "stopped"
    """It was asked to leave, and left."""
    LOST = "lost"
    """Its launcher was killed."""
    MISSING = "missing"
    """Nobody trains it."""
    UNKNOWN = "unknown"
    """It was submitted, and Slurm does not answer, or in a word that doccls does not know."""


@dataclass(frozen=True)
class FoldStatus:
    """Of one fold."""

    fold: int
    state: State
    macro_f1: float | None = None
    slot: str | None = None
    """Where its last attempt runs or ran."""
    attempts: int = 0
    since: str | None = None
    """Start of the last attempt, UTC."""
    remark: str | None = None
    """How far it is, or what was wrong last."""
    log: str | None = None
    """Of its last attempt, once that has ended."""


@dataclass(frozen=True)
class RunStatus:
    """Of a run."""

    run_folder: str
    launchers: tuple[Holder, ...]
    """Who launches folds of it now."""
    folds: tuple[FoldStatus, ...]
    merged: bool
    again: str | None
    """The command that trains what is missing; None if the run was never launched, or has nothing to train."""


@dataclass(frozen=True)
class Seen:
    """What a fold's files say of it."""

    macro_f1: float | None = None
    """By its part, if that is valid."""
    damage: str | None = None
    """Why its part is not."""
    attempts: tuple[Attempt, ...] = ()
    beats: tuple[Beat, ...] = ()
    """Of its processes."""
    owned: bool = False
    """Whether a process holds its lock: it trains the fold, or another of its folds before."""
    alive: bool = False
    """Whether the beats are that process's."""
    submitted: bool = False
    """Whether a Slurm job was to train it."""
    queued: QueueEntry | None = None
    """That job in the queue, the newest; None if it is not there."""
    queue_answers: bool = True


def describe_fold(fold: int, seen: Seen, ledger: Ledger | None, launching: bool) -> FoldStatus:
    """Where the fold stands: a valid part counts for more than any word. `launching`: a launcher works on the run."""
    last = seen.attempts[-1] if seen.attempts else None
    state = _judge(fold, seen, last, ledger, launching)
    remark: str | None
    if state is State.DONE:
        remark = None
    elif state is State.RUNNING:
        remark = tell_place(min(seen.beats, key=lambda beat: beat.step) if seen.beats else None)
    else:
        remark = seen.damage or (last.message if last else None)
        if state not in (State.WAITING, State.FAILED) and seen.submitted:
            state, remark = _ask_slurm(state, remark, seen)
    return FoldStatus(
        fold=fold,
        state=state,
        macro_f1=seen.macro_f1,
        slot=last.slot if last else None,
        attempts=len(seen.attempts),
        since=last.started if last else None,
        remark=remark,
        log=last.log if last else None,
    )


def _judge(fold: int, seen: Seen, last: Attempt | None, ledger: Ledger | None, launching: bool) -> State:
    if seen.macro_f1 is not None:
        return State.DONE
    if seen.alive or (launching and last is not None and last.outcome is None):
        return State.RUNNING
    if launching and ledger is not None and fold in ledger.folds:
        its_turn_comes = last is None or last.then == "waiting" or last.started < ledger.started
        if its_turn_comes:
            return State.WAITING
    if seen.owned:
        return State.WAITING
    if last is None:
        return State.MISSING
    if last.outcome in (None, "lost"):
        return State.LOST
    if last.outcome == Outcome.STOPPED:
        return State.STOPPED
    return State.FAILED if last.then == "failed" else State.MISSING


def _ask_slurm(state: State, remark: str | None, seen: Seen) -> tuple[State, str | None]:
    """The queue's word on a fold that no launcher works on."""
    entry = seen.queued
    if not seen.queue_answers:
        return State.UNKNOWN, "Slurm does not answer (squeue)"
    if entry is None:
        return state, remark
    told = f"job {entry.job} {entry.state}"
    match entry.going:
        case Going.WAITS:
            return State.WAITING, f"{told}, {entry.reason}"
        case Going.RUNS:
            return State.RUNNING, told
        case Going.UNKNOWN:
            return State.UNKNOWN, told
        case Going.ENDED if entry.state in ("COMPLETED", "CANCELLED"):
            return state, remark or told
    return State.FAILED, f"{remark}; {told}" if remark else told


def render_status(status: RunStatus, now: datetime) -> str:
    """The status in lines for people; `now` with its time zone."""
    lines = [f"[STATUS] run {status.run_folder}"]
    lines += [f"[STATUS] {launcher}" for launcher in status.launchers] or ["[STATUS] no launcher works on it"]
    rows: list[tuple[str, ...]] = [("fold", "state", "on", "attempt", "macro_f1", "")]
    rows += [_render_row(one, now) for one in status.folds]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    done = sum(one.state is State.DONE for one in status.folds)
    lines.append(f"[STATUS] {done} of {len(status.folds)} folds done, {'' if status.merged else 'not '}merged")
    if status.again is not None:
        lines.append(f"[STATUS] to train the rest: {status.again}")
    return "\n".join(lines)


def _render_row(one: FoldStatus, now: datetime) -> tuple[str, ...]:
    remark = (one.remark or "").partition("\n")[0]
    if one.state is State.RUNNING and one.since is not None:
        remark += f", started {tell_duration((now - datetime.fromisoformat(one.since)).total_seconds())} ago"
    score = "" if one.macro_f1 is None else f"{one.macro_f1:.5f}"
    return str(one.fold), str(one.state), one.slot or "", str(one.attempts or ""), score, remark


def list_unfinished(status: RunStatus) -> list[str]:
    """A line for each fold that is not done: where it stands, and why."""
    lines = []
    for one in status.folds:
        if one.state is not State.DONE:
            told = [str(one.state), (one.remark or "").partition("\n")[0], f"log: {one.log}" if one.log else ""]
            lines.append(f"- fold {one.fold}: {', '.join(word for word in told if word)}")
    return lines


def describe_status(status: RunStatus) -> dict[str, Any]:
    """The status for scripts, as JSON values."""
    return asdict(status)
