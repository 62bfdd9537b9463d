"""The status of each fold of a run, derived from its files and Slurm's queue, and rendered."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from doccls.config.paths import is_file
from doccls.errors import UserError
from doccls.oof.predictions import PredictionsInfo, is_merged, read_predictions
from doccls.run.heartbeat import Beat, format_progress, read_beat
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import read_text
from doccls.system.lock import Holder, find_holder
from doccls.system.tensor_file import TensorFileError
from launcher.ledger import Attempt, Ledger, format_duration, read_ledger
from launcher.slurm.array_jobs import ArrayJob, RunJob, find_newest, list_clusters, list_jobs, read_array_jobs
from launcher.slurm.format import JobPhase, QueueEntry
from launcher.slurm.queue import read_queue
from launcher.supervise import Outcome

_T = TypeVar("_T")


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


@dataclass(frozen=True)
class _Launch:
    """The ledger of a launch, and the holder of its lock."""

    ledger: Ledger
    holder: Holder | None


@dataclass(frozen=True)
class _RunEvidence:
    """The facts about a run from its files and Slurm's queue, except for fold predictions."""

    launches: list[_Launch]
    beats: list[Beat]
    jobs: list[RunJob]
    array_jobs: tuple[ArrayJob, ...]
    queue: list[QueueEntry] | None  # None if Slurm does not answer


class Source:
    """Where a status is read from; who reads it every second keeps what has not changed."""

    def read(self, path: Path, reader: Callable[[Path], _T]) -> _T:
        """Return what the reader makes of the file."""
        return reader(path)

    def find_holder(self, lock: Path) -> Holder | None:
        """Return the holder of the lock, if there is one."""
        return find_holder(lock)

    def ask_queue(self, clusters: Sequence[str]) -> list[QueueEntry] | None:
        """Return Slurm's queue; None if it does not answer."""
        return read_queue(clusters)


def read_status(paths: RunPaths, source: Source | None = None) -> RunStatus:
    """Return the status of a run; write nothing.

    Raises:
        UserError: the folder holds no run.
        UserError: the run's ledger is damaged.
    """
    source = source or Source()
    evidence = _read_evidence(paths, source)
    newest = max((launch.ledger for launch in evidence.launches), key=lambda ledger: ledger.started, default=None)
    fingerprint = newest.fingerprint if newest else None
    folds = tuple(
        _describe(
            fold,
            _read_predictions(paths, fold, fingerprint, source),
            source.find_holder(paths.fold_lock(fold)),
            evidence,
        )
        for fold in range(count_folds(paths, newest))
    )
    holders = find_launchers(paths, source)
    is_unfinished = any(fold.state is not State.DONE for fold in folds)
    is_active = bool(holders) or any(fold.state in (State.RUNNING, State.WAITING) for fold in folds)
    return RunStatus(
        run_folder=str(paths.root),
        launchers=holders,
        folds=folds,
        merged=not is_unfinished and is_merged(paths),
        resume_command=_find_resume_command(evidence) if is_unfinished and not is_active else None,
    )


def find_launchers(paths: RunPaths, source: Source | None = None) -> tuple[Holder, ...]:
    """Return the holders of the run's launch locks; each array task has a lock of its own."""
    source = source or Source()
    return tuple(holder for lock in paths.list_launch_locks() if (holder := source.find_holder(lock)) is not None)


def _find_resume_command(evidence: _RunEvidence) -> str | None:
    """Return the resume command of the newest launch or submission of the run."""
    launched = [(launch.ledger.started, launch.ledger.resume_command) for launch in evidence.launches]
    submitted = [(job.started, job.resume_command) for job in evidence.array_jobs]
    return max(launched + submitted, key=lambda start: start[0], default=("", None))[1]


def list_run_jobs(paths: RunPaths) -> list[RunJob]:
    """Return the Slurm jobs that were submitted to train folds of the run, by the run's files.

    Raises:
        UserError: one of these files is damaged.
    """
    ledgers = [ledger for path in paths.list_ledgers() if (ledger := read_ledger(path)) is not None]
    return list_jobs(read_array_jobs(paths.array_jobs), ledgers)


def _read_evidence(paths: RunPaths, source: Source) -> _RunEvidence:
    launches = []
    for path in paths.list_ledgers():
        ledger = source.read(path, read_ledger)
        if ledger is not None:
            launches.append(_Launch(ledger, source.find_holder(paths.live / f"{path.stem}.lock")))
    array_jobs = read_array_jobs(paths.array_jobs)
    jobs = list_jobs(array_jobs, [launch.ledger for launch in launches])
    return _RunEvidence(
        launches=launches,
        beats=[beat for file in paths.list_heartbeats() if (beat := source.read(file, read_beat)) is not None],
        jobs=jobs,
        array_jobs=array_jobs,
        queue=source.ask_queue(list_clusters(array_jobs)) if array_jobs or jobs else [],
    )


def _describe(
    fold: int, predictions: PredictionsInfo | str | None, owner: Holder | None, run: _RunEvidence
) -> FoldStatus:
    """Describe a fold; `predictions` may be an error message, and `owner` trains the fold, or will."""
    beats = _list_beats(fold, run)
    newest, attempts = _find_attempts(fold, run)
    if owner is not None and newest is not None and _is_stuck(owner, newest, attempts):
        owner = None  # it still holds the fold's lock, but no longer trains
    evidence = FoldEvidence(
        macro_f1=predictions.macro_f1 if isinstance(predictions, PredictionsInfo) else None,
        macro_f1_damaged=predictions.macro_f1_damaged if isinstance(predictions, PredictionsInfo) else None,
        damage=predictions if isinstance(predictions, str) else None,
        attempts=tuple(attempts),
        beats=beats,
        owned=owner is not None,
        alive=owner is not None and any((beat.host, beat.pid) == (owner.host, owner.pid) for beat in beats),
        submitted=bool(run.jobs) or any(fold in job.folds for job in run.array_jobs),
        queued=find_newest(fold, run.jobs, run.queue or []),
        queue_answers=run.queue is not None,
    )
    launching = newest is not None and newest.holder is not None
    return describe_fold(fold, evidence, newest.ledger if newest else None, launching)


def _list_beats(fold: int, run: _RunEvidence) -> tuple[Beat, ...]:
    """Return the beats of processes that work on the fold."""
    working = ("train", "validate", "stopping")
    return tuple(beat for beat in run.beats if beat.fold == fold and beat.phase in working)


def _is_stuck(owner: Holder, launch: _Launch, attempts: Sequence[Attempt]) -> bool:
    """Return whether the owner of a fold is the unkillable process of its last attempt."""
    if not attempts or attempts[-1].outcome != Outcome.UNKILLABLE:
        return False
    return owner.host == launch.ledger.host and owner.pid in attempts[-1].pids  # with Slurm, only srun's


def _find_attempts(fold: int, run: _RunEvidence) -> tuple[_Launch | None, list[Attempt]]:
    """Return the newest launch of the fold, preferably an active one, and all attempts at the fold by start."""
    own = [launch for launch in run.launches if fold in launch.ledger.folds or launch.ledger.list_attempts(fold)]
    newest = max(own, key=lambda launch: (launch.holder is not None, launch.ledger.started), default=None)
    attempts = [attempt for launch in own for attempt in launch.ledger.list_attempts(fold)]
    return newest, sorted(attempts, key=lambda attempt: attempt.started)


def count_folds(paths: RunPaths, ledger: Ledger | None) -> int:
    """Return the number of folds by a ledger, the run's snapshot or fold predictions, whichever exists.

    Raises:
        UserError: there is no run in the folder.
    """
    if ledger is not None:
        return ledger.num_folds
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return int(yaml.safe_load(read_text(paths.snapshot))["data"]["folds"])
    for file in paths.list_predictions():
        with suppress(TensorFileError):
            return read_predictions(file).info.num_folds
    raise UserError(f"no run in {paths.root} (runs are in <output.exp_dir>/YYYYMMDD/<run_id>)")


def _read_predictions(
    paths: RunPaths, fold: int, fingerprint: str | None, source: Source
) -> PredictionsInfo | str | None:
    """Return the info of the fold's predictions, or what is wrong with them; None if they do not exist.

    Without a fingerprint, that of the predictions is not checked.
    """
    path = paths.predictions(fold)
    info = source.read(path, _read_info)
    if isinstance(info, PredictionsInfo) and (info.fold != fold or fingerprint not in (None, info.fingerprint)):
        return f"{path}: predictions of another fold or another experiment"
    return info


def _read_info(path: Path) -> PredictionsInfo | str | None:
    if not is_file(path):
        return None
    try:
        return read_predictions(path).info
    except TensorFileError as error:
        return str(error)
