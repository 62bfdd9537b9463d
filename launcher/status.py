"""The status of each fold of a run: read from its files and Slurm's queue, judged, and formatted."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import yaml

from doccls.errors import UserError
from doccls.oof.predictions import PredictionsInfo, is_merged, read_predictions
from doccls.run.heartbeat import Beat, format_progress, read_beat
from doccls.run.paths import RunPaths
from doccls.system.lock import Holder, find_holder
from doccls.system.tensor_file import TensorFileError
from launcher.ledger import Attempt, Ledger, format_duration, read_ledger
from launcher.slurm.array_jobs import ArrayJob, RunJob, find_newest, list_clusters, list_jobs, read_array_jobs
from launcher.slurm.format import JobPhase, QueueEntry
from launcher.slurm.queue import read_queue
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
    resume_command: str | None
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
        remark = format_progress(min(seen.beats, key=lambda beat: beat.step) if seen.beats else None)
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
    match entry.phase:
        case JobPhase.WAITING:
            return State.WAITING, f"{told}, {entry.reason}"
        case JobPhase.RUNNING:
            return State.RUNNING, told
        case JobPhase.UNKNOWN:
            return State.UNKNOWN, told
        case JobPhase.ENDED if entry.state in ("COMPLETED", "CANCELLED"):
            return state, remark or told
        case JobPhase.ENDED if entry.state == "PREEMPTED":
            return State.STOPPED, f"job {entry.job} was preempted"
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
    if status.resume_command is not None:
        lines.append(f"[STATUS] to train the rest: {status.resume_command}")
    return "\n".join(lines)


def _render_row(one: FoldStatus, now: datetime) -> tuple[str, ...]:
    remark = (one.remark or "").partition("\n")[0]
    if one.state is State.RUNNING and one.since is not None:
        remark += f", started {format_duration((now - datetime.fromisoformat(one.since)).total_seconds())} ago"
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


@dataclass(frozen=True)
class _Launch:
    """A launch's ledger, and who holds its lock."""

    ledger: Ledger
    holder: Holder | None


@dataclass(frozen=True)
class _Survey:
    """All of a run but its parts."""

    launches: list[_Launch]
    beats: list[Beat]
    jobs: list[RunJob]
    array_jobs: tuple[ArrayJob, ...]
    queue: list[QueueEntry] | None
    """None if Slurm does not answer."""


def read_status(paths: RunPaths) -> RunStatus:
    """Where the run stands now. Nothing is written.

    Raises:
        UserError: there is no run in that folder.
        UserError: its ledger is damaged.
    """
    survey = _survey(paths)
    newest = max((one.ledger for one in survey.launches), key=lambda ledger: ledger.started, default=None)
    fingerprint = newest.fingerprint if newest else None
    folds = tuple(
        _describe(fold, _read_predictions(paths, fold, fingerprint), find_holder(paths.fold_lock(fold)), survey)
        for fold in range(_count_folds(paths, newest))
    )
    holders = find_launchers(paths)
    unfinished = any(one.state is not State.DONE for one in folds)
    on_its_way = bool(holders) or any(one.state in (State.RUNNING, State.WAITING) for one in folds)
    return RunStatus(
        run_folder=str(paths.root),
        launchers=holders,
        folds=folds,
        merged=not unfinished and is_merged(paths),
        resume_command=_find_resume_command(survey) if unfinished and not on_its_way else None,
    )


def find_launchers(paths: RunPaths) -> tuple[Holder, ...]:
    """Who launches folds of the run now; array tasks each on their own."""
    return tuple(holder for lock in paths.list_launch_locks() if (holder := find_holder(lock)) is not None)


def _find_resume_command(survey: _Survey) -> str | None:
    """The command that trains what is missing, as the newest launch or submission of the run was told it."""
    launched = [(one.ledger.started, one.ledger.resume_command) for one in survey.launches]
    submitted = [(one.started, one.resume_command) for one in survey.array_jobs]
    return max(launched + submitted, key=lambda told: told[0], default=("", None))[1]


def list_run_jobs(paths: RunPaths) -> list[RunJob]:
    """The Slurm jobs that were to train folds of the run, as its files know them.

    Raises:
        UserError: one of them is damaged.
    """
    ledgers = [ledger for path in paths.list_ledgers() if (ledger := read_ledger(path)) is not None]
    return list_jobs(read_array_jobs(paths.array_jobs), ledgers)


def _survey(paths: RunPaths) -> _Survey:
    launches = []
    for path in paths.list_ledgers():
        ledger = read_ledger(path)
        if ledger is not None:
            launches.append(_Launch(ledger, find_holder(paths.live / f"{path.stem}.lock")))
    array_jobs = read_array_jobs(paths.array_jobs)
    jobs = list_jobs(array_jobs, [one.ledger for one in launches])
    return _Survey(
        launches=launches,
        beats=[beat for file in sorted(paths.live.glob("*_rank*.json")) if (beat := read_beat(file)) is not None],
        jobs=jobs,
        array_jobs=array_jobs,
        queue=read_queue(list_clusters(array_jobs)) if array_jobs or jobs else [],
    )


def _describe(
    fold: int, predictions: PredictionsInfo | str | None, owner: Holder | None, survey: _Survey
) -> FoldStatus:
    """`part` is what the fold's part says of itself, or what is wrong with it; `owner` trains the fold, or will."""
    beats = _list_beats(fold, survey)
    newest, attempts = _find_attempts(fold, survey)
    if owner is not None and newest is not None and _is_stuck(owner, newest, attempts):
        owner = None  # it holds the fold's lock, and does nothing any more
    seen = Seen(
        macro_f1=predictions.macro_f1 if isinstance(predictions, PredictionsInfo) else None,
        damage=predictions if isinstance(predictions, str) else None,
        attempts=tuple(attempts),
        beats=beats,
        owned=owner is not None,
        alive=owner is not None and any((beat.host, beat.pid) == (owner.host, owner.pid) for beat in beats),
        submitted=bool(survey.jobs) or any(fold in one.folds for one in survey.array_jobs),
        queued=find_newest(fold, survey.jobs, survey.queue or []),
        queue_answers=survey.queue is not None,
    )
    launching = newest is not None and newest.holder is not None
    return describe_fold(fold, seen, newest.ledger if newest else None, launching)


def _list_beats(fold: int, survey: _Survey) -> tuple[Beat, ...]:
    """Those of processes that work on the fold."""
    working = ("train", "validate", "stopping")
    return tuple(beat for beat in survey.beats if beat.fold == fold and beat.phase in working)


def _is_stuck(owner: Holder, launch: _Launch, attempts: Sequence[Attempt]) -> bool:
    """Whether the owner of a fold is the process of its last attempt, which could not be killed."""
    if not attempts or attempts[-1].outcome != Outcome.UNKILLABLE:
        return False
    return owner.host == launch.ledger.host and owner.pid in attempts[-1].pids  # of Slurm's, srun's PID is known


def _find_attempts(fold: int, survey: _Survey) -> tuple[_Launch | None, list[Attempt]]:
    """The launch that has the fold, of several a living one or the newest; and all attempts at it, by their start."""
    own = [launch for launch in survey.launches if fold in launch.ledger.folds or launch.ledger.list_attempts(fold)]
    newest = max(own, key=lambda launch: (launch.holder is not None, launch.ledger.started), default=None)
    attempts = [attempt for launch in own for attempt in launch.ledger.list_attempts(fold)]
    return newest, sorted(attempts, key=lambda attempt: attempt.started)


def _count_folds(paths: RunPaths, ledger: Ledger | None) -> int:
    """By the ledger, by the run's snapshot, or by a part, whichever is there."""
    if ledger is not None:
        return ledger.num_folds
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return int(yaml.safe_load(paths.snapshot.read_text(encoding="utf-8"))["data"]["folds"])
    for file in sorted(paths.predictions_dir.glob("fold*.safetensors")):
        with suppress(TensorFileError):
            return read_predictions(file).info.num_folds
    raise UserError(f"no run in {paths.root} (runs lie in <output.exp_dir>/YYYYMMDD/<run_id>)")


def _read_predictions(paths: RunPaths, fold: int, fingerprint: str | None) -> PredictionsInfo | str | None:
    """What the fold's part says of itself, or what is wrong with it; None if there is none. No fingerprint is any."""
    path = paths.predictions(fold)
    if not path.exists():
        return None
    try:
        info = read_predictions(path).info
    except TensorFileError as error:
        return str(error)
    if info.fold != fold or fingerprint not in (None, info.fingerprint):
        return f"OOF part {path}: of another fold or another experiment"
    return info
