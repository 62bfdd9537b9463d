"""What is to be seen of a run: its parts, ledgers, locks, heartbeats, and its jobs in Slurm's queue."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import yaml

from doccls.errors import UserError
from doccls.oof.predictions import PartInfo, is_merged, read_part
from doccls.run.heartbeat import Beat, read_beat
from doccls.run.paths import RunPaths
from doccls.system.lock import Holder, find_holder
from doccls.system.tensor_file import TensorFileError
from launcher.ledger import Attempt, Ledger, read_ledger
from launcher.slurm_queue import ask_queue
from launcher.slurm_text import QueueEntry
from launcher.status import FoldStatus, RunStatus, Seen, State, describe_fold
from launcher.submissions import RunJob, Submission, find_newest, list_jobs, read_submissions
from launcher.supervise import Outcome


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
    submissions: tuple[Submission, ...]
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
    identity = newest.identity if newest else None
    folds = tuple(
        _describe(fold, _read_part(paths, fold, identity), find_holder(paths.fold_lock(fold)), survey)
        for fold in range(_count_folds(paths, newest))
    )
    holders = tuple(holder for lock in paths.list_launch_locks() if (holder := find_holder(lock)) is not None)
    unfinished = any(one.state is not State.DONE for one in folds)
    on_its_way = bool(holders) or any(one.state in (State.RUNNING, State.WAITING) for one in folds)
    return RunStatus(
        run_folder=str(paths.root),
        launchers=holders,
        folds=folds,
        merged=not unfinished and is_merged(paths),
        again=_find_again(survey) if unfinished and not on_its_way else None,
    )


def _find_again(survey: _Survey) -> str | None:
    """The command that trains what is missing, as the newest launch or submission of the run was told it."""
    launched = [(one.ledger.started, one.ledger.again) for one in survey.launches]
    submitted = [(one.started, one.again) for one in survey.submissions]
    return max(launched + submitted, key=lambda told: told[0], default=("", None))[1]


def list_run_jobs(paths: RunPaths) -> list[RunJob]:
    """The Slurm jobs that were to train folds of the run, as its files know them.

    Raises:
        UserError: one of them is damaged.
    """
    ledgers = [ledger for path in paths.list_ledgers() if (ledger := read_ledger(path)) is not None]
    return list_jobs(read_submissions(paths.submissions), ledgers)


def _survey(paths: RunPaths) -> _Survey:
    launches = []
    for path in paths.list_ledgers():
        ledger = read_ledger(path)
        if ledger is not None:
            launches.append(_Launch(ledger, find_holder(paths.live / f"{path.stem}.lock")))
    submissions = read_submissions(paths.submissions)
    jobs = list_jobs(submissions, [one.ledger for one in launches])
    return _Survey(
        launches=launches,
        beats=[beat for file in sorted(paths.live.glob("*_rank*.json")) if (beat := read_beat(file)) is not None],
        jobs=jobs,
        submissions=submissions,
        queue=ask_queue() if submissions or jobs else [],
    )


def _describe(fold: int, part: PartInfo | str | None, owner: Holder | None, survey: _Survey) -> FoldStatus:
    """`part` is what the fold's part says of itself, or what is wrong with it; `owner` trains the fold, or will."""
    beats = _list_beats(fold, survey)
    newest, attempts = _find_attempts(fold, survey)
    if owner is not None and newest is not None and _is_stuck(owner, newest, attempts):
        owner = None  # it holds the fold's lock, and does nothing any more
    seen = Seen(
        macro_f1=part.macro_f1 if isinstance(part, PartInfo) else None,
        damage=part if isinstance(part, str) else None,
        attempts=tuple(attempts),
        beats=beats,
        owned=owner is not None,
        alive=owner is not None and any((beat.host, beat.pid) == (owner.host, owner.pid) for beat in beats),
        submitted=bool(survey.jobs) or any(fold in one.folds for one in survey.submissions),
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
    for file in sorted(paths.parts_dir.glob("fold*.safetensors")):
        with suppress(TensorFileError):
            return read_part(file).info.num_folds
    raise UserError(f"no run in {paths.root} (runs lie in <output.exp_dir>/YYYYMMDD/<run_id>)")


def _read_part(paths: RunPaths, fold: int, identity: str | None) -> PartInfo | str | None:
    """What the fold's part says of itself, or what is wrong with it; None if there is none. No identity is any."""
    path = paths.part(fold)
    if not path.exists():
        return None
    try:
        info = read_part(path).info
    except TensorFileError as error:
        return str(error)
    if info.fold != fold or identity not in (None, info.identity):
        return f"OOF part {path}: of another fold or another experiment"
    return info
