"""The status of a run, read from its files and Slurm's queue."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml

from doccls.config.paths import is_file
from doccls.errors import UserError
from doccls.oof.predictions import PredictionsInfo, is_merged, read_predictions
from doccls.run.heartbeat import Beat, read_beat
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import read_text
from doccls.system.holder import Holder
from doccls.system.lock import find_holder
from doccls.system.tensor_file import TensorFileError
from launcher.ledger import Attempt, Ledger, read_ledger, read_ledgers
from launcher.slurm.array_jobs import ArrayJob, RunJob, find_newest, list_clusters, list_jobs, read_array_jobs
from launcher.slurm.format import QueueEntry
from launcher.slurm.queue import read_queue
from launcher.status import FoldEvidence, FoldStatus, RunStatus, State, describe_fold
from launcher.supervise import Outcome

_T = TypeVar("_T")


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
    return list_jobs(read_array_jobs(paths.array_jobs), read_ledgers(paths))


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
