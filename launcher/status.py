"""The status of each fold of a run, derived from its files and Slurm's queue by `status_files`, and rendered; pure."""

from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from doccls.run.heartbeat import Beat, format_progress
from doccls.system.holder import Holder
from launcher.ledger import Attempt, Ledger, format_duration
from launcher.slurm.format import JobPhase, QueueEntry
from launcher.supervise import Outcome


class State(StrEnum):
    """The state of a fold, across launches."""

    DONE = "done"  # its predictions exist and are valid
    RUNNING = "running"
    WAITING = "waiting"  # a launcher will start it, in a free slot or after its back-off
    FAILED = "failed"
    STOPPED = "stopped"  # at somebody's request
    LOST = "lost"  # its launcher was killed
    MISSING = "missing"  # nobody trains it
    UNKNOWN = "unknown"  # it was submitted, and Slurm does not answer or reports an unknown state


@dataclass(frozen=True)
class FoldStatus:
    """The status of one fold; slot, start and log are those of its last attempt."""

    fold: int
    state: State
    macro_f1: float | None = None
    macro_f1_damaged: float | None = None  # on damaged copies of the pages, if there are any
    slot: str | None = None
    attempts: int = 0
    since: str | None = None  # start, UTC
    remark: str | None = None  # its progress, or its last error
    log: str | None = None  # None until the attempt has ended


@dataclass(frozen=True)
class RunStatus:
    """The status of a run and its folds."""

    run_folder: str
    launchers: tuple[Holder, ...]  # active launchers
    folds: tuple[FoldStatus, ...]
    merged: bool
    # Trains the missing folds; None if there are none, if they are on their way, or if the run was never launched.
    resume_command: str | None


@dataclass(frozen=True)
class FoldEvidence:
    """The facts about a fold from its files and Slurm's queue."""

    macro_f1: float | None = None  # of its predictions, if they are valid
    macro_f1_damaged: float | None = None
    damage: str | None = None  # why its predictions are invalid
    attempts: tuple[Attempt, ...] = ()
    beats: tuple[Beat, ...] = ()
    owned: bool = False  # a process holds its lock: it trains this fold, or another of its folds first
    alive: bool = False  # the beats come from that process
    submitted: bool = False  # a Slurm job was submitted to train it
    queued: QueueEntry | None = None  # the newest such job in the queue
    queue_answers: bool = True


def describe_fold(fold: int, evidence: FoldEvidence, ledger: Ledger | None, launching: bool) -> FoldStatus:
    """Derive the status of a fold: valid predictions override all else. `launching`: the run has a launcher."""
    last = evidence.attempts[-1] if evidence.attempts else None
    state = _derive_state(fold, evidence, last, ledger, launching)
    remark: str | None
    if state is State.DONE:
        remark = None
    elif state is State.RUNNING:
        remark = format_progress(min(evidence.beats, key=lambda beat: beat.step, default=None))
    else:
        remark = evidence.damage or (last.message if last else None)
        if state not in (State.WAITING, State.FAILED) and evidence.submitted:
            state, remark = _apply_queue(state, remark, evidence)
    return FoldStatus(
        fold=fold,
        state=state,
        macro_f1=evidence.macro_f1,
        macro_f1_damaged=evidence.macro_f1_damaged,
        slot=last.slot if last else None,
        attempts=len(evidence.attempts),
        since=last.started if last else None,
        remark=remark,
        log=last.log if last else None,
    )


def _derive_state(
    fold: int, evidence: FoldEvidence, last: Attempt | None, ledger: Ledger | None, launching: bool
) -> State:
    if evidence.macro_f1 is not None:
        return State.DONE
    if evidence.alive or (launching and last is not None and last.outcome is None):
        return State.RUNNING
    if launching and ledger is not None and not ledger.cancelled and fold in ledger.folds:
        will_start = last is None or last.then == "waiting" or last.started < ledger.started
        if will_start:
            return State.WAITING
    if evidence.owned:
        return State.WAITING
    if last is None:
        return State.MISSING
    if last.outcome in (None, "lost"):
        return State.LOST
    if last.outcome == Outcome.STOPPED:
        return State.STOPPED
    return State.FAILED if last.then == "failed" else State.MISSING


def _apply_queue(state: State, remark: str | None, evidence: FoldEvidence) -> tuple[State, str | None]:
    """Return the state and remark by Slurm's queue of a fold that no launcher works on."""
    entry = evidence.queued
    if not evidence.queue_answers:
        return State.UNKNOWN, "Slurm does not answer (squeue)"
    if entry is None:
        return state, remark
    job = f"job {entry.job} {entry.state}"
    match entry.phase:
        case JobPhase.WAITING:
            return State.WAITING, f"{job}, {entry.reason}"
        case JobPhase.RUNNING:
            return State.RUNNING, job
        case JobPhase.UNKNOWN:
            return State.UNKNOWN, job
        case JobPhase.ENDED if entry.state in ("COMPLETED", "CANCELLED"):
            return state, remark or job
        case JobPhase.ENDED if entry.state == "PREEMPTED":
            return State.STOPPED, f"job {entry.job} was preempted"
    return State.FAILED, f"{remark}; {job}" if remark else job


def render_status(status: RunStatus, now: datetime) -> str:
    """Render the status for people; `now` needs a time zone."""
    lines = [f"[STATUS] run {status.run_folder}"]
    lines += [f"[STATUS] {launcher}" for launcher in status.launchers] or ["[STATUS] no launcher is active"]
    has_damaged = any(fold.macro_f1_damaged is not None for fold in status.folds)
    scores = ("macro_f1", "damaged") if has_damaged else ("macro_f1",)
    rows: list[tuple[str, ...]] = [("fold", "state", "on", "attempt", *scores, "")]
    rows += [_render_row(fold, now, has_damaged) for fold in status.folds]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    done = sum(fold.state is State.DONE for fold in status.folds)
    lines.append(f"[STATUS] {done} of {len(status.folds)} folds done, {'' if status.merged else 'not '}merged")
    if status.resume_command is not None:
        lines.append(f"[STATUS] to train the missing folds: {status.resume_command}")
    return "\n".join(lines)


def _render_row(fold: FoldStatus, now: datetime, has_damaged: bool) -> tuple[str, ...]:
    remark = (fold.remark or "").partition("\n")[0]
    if fold.state is State.RUNNING and fold.since is not None:
        remark += f", started {format_duration((now - datetime.fromisoformat(fold.since)).total_seconds())} ago"
    scores = [fold.macro_f1, fold.macro_f1_damaged] if has_damaged else [fold.macro_f1]
    cells = ["" if score is None else f"{score:.5f}" for score in scores]
    return str(fold.fold), str(fold.state), fold.slot or "", str(fold.attempts or ""), *cells, remark


def list_unfinished(status: RunStatus) -> list[str]:
    """Return a line for each fold that is not done: its state, remark and log."""
    lines = []
    for fold in status.folds:
        if fold.state is not State.DONE:
            facts = [str(fold.state), (fold.remark or "").partition("\n")[0], f"log: {fold.log}" if fold.log else ""]
            lines.append(f"- fold {fold.fold}: {', '.join(filter(None, facts))}")
    return lines


def describe_status(status: RunStatus) -> dict[str, Any]:
    """Return the status as JSON values."""
    return asdict(status)
