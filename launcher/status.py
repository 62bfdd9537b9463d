"""`doccls-launch status RUN`: where each fold of a run stands, by the run's own files."""

import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import psutil
import yaml

from doccls.oof.parts import PartError, PartInfo, read_part
from doccls.run.heartbeat import Beat, read_beat
from doccls.run.lock import Holder, find_holder
from doccls.run.paths import RunError, RunPaths
from launcher.attempt import tell_place
from launcher.ledger import Attempt, Ledger, read_ledger, tell_duration
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


@dataclass(frozen=True)
class RunStatus:
    """Of a run."""

    run_folder: str
    launcher: Holder | None
    """Who launches it now."""
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
    alive: bool = False
    """Whether one of these runs on this machine."""


def read_status(paths: RunPaths) -> RunStatus:
    """Where the run stands now. Nothing is written.

    Raises:
        RunError: there is no run in that folder.
        LedgerError: its ledger is damaged.
    """
    ledger, holder = read_ledger(paths.ledger), find_holder(paths.launch_lock)
    identity = ledger.identity if ledger else None
    parts = {fold: _read_part(paths, fold, identity) for fold in range(_count_folds(paths, ledger))}
    beats = [beat for file in sorted(paths.live.glob("*_rank*.json")) if (beat := read_beat(file)) is not None]
    folds = []
    for fold, part in parts.items():
        own = tuple(beat for beat in beats if beat.fold == fold and beat.phase in ("train", "validate"))
        seen = Seen(
            part.macro_f1 if isinstance(part, PartInfo) else None,
            part if isinstance(part, str) else None,
            tuple(ledger.list_attempts(fold)) if ledger else (),
            own,
            any(beat.host == socket.gethostname() and psutil.pid_exists(beat.pid) for beat in own),
        )
        folds.append(describe_fold(fold, seen, ledger, holder is not None))
    unfinished = any(one.state is not State.DONE for one in folds)
    return RunStatus(
        run_folder=str(paths.root),
        launcher=holder,
        folds=tuple(folds),
        merged=not unfinished and paths.summary.exists(),
        again=ledger.again if ledger and holder is None and unfinished else None,
    )


def _count_folds(paths: RunPaths, ledger: Ledger | None) -> int:
    """By the ledger, by the run's snapshot, or by a part, whichever is there."""
    if ledger is not None:
        return ledger.num_folds
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return int(yaml.safe_load(paths.snapshot.read_text(encoding="utf-8"))["data"]["folds"])
    for file in sorted(paths.parts_dir.glob("fold*.safetensors")):
        with suppress(PartError):
            return read_part(file).info.num_folds
    raise RunError(f"no run in {paths.root} (runs lie in <output.exp_dir>/YYYYMMDD/<run_id>)")


def _read_part(paths: RunPaths, fold: int, identity: str | None) -> PartInfo | str | None:
    """What the fold's part says of itself, or what is wrong with it; None if there is none. No identity is any."""
    path = paths.part(fold)
    if not path.exists():
        return None
    try:
        info = read_part(path).info
    except PartError as error:
        return str(error)
    if info.fold != fold or identity not in (None, info.identity):
        return f"OOF part {path}: of another fold or another experiment"
    return info


def describe_fold(fold: int, seen: Seen, ledger: Ledger | None, launching: bool) -> FoldStatus:
    """Where the fold stands: a valid part counts for more than any word. `launching`: a launcher works on the run."""
    last = seen.attempts[-1] if seen.attempts else None
    state = _judge(fold, seen, last, ledger, launching)
    if state is State.DONE:
        remark = None
    elif state is State.RUNNING:
        remark = tell_place(min(seen.beats, key=lambda beat: beat.step) if seen.beats else None)
    else:
        remark = seen.damage or (last.message if last else None)
    return FoldStatus(
        fold=fold,
        state=state,
        macro_f1=seen.macro_f1,
        slot=last.slot if last else None,
        attempts=len(seen.attempts),
        since=last.started if last else None,
        remark=remark,
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
    if last is None:
        return State.MISSING
    if last.outcome in (None, "lost"):
        return State.LOST
    if last.outcome == Outcome.STOPPED:
        return State.STOPPED
    return State.FAILED if last.then == "failed" else State.MISSING


def render_status(status: RunStatus, now: datetime) -> str:
    """The status in lines for people; `now` with its time zone."""
    lines = [f"[STATUS] run {status.run_folder}"]
    lines.append(f"[STATUS] {status.launcher}" if status.launcher else "[STATUS] no launcher works on it")
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


def describe_status(status: RunStatus) -> dict[str, Any]:
    """The status for scripts, as JSON values."""
    return asdict(status)
