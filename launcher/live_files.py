"""The progress of runs, read from their files alone, so that it can be watched from any machine that has them."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from doccls.config.snapshot import read_snapshot
from doccls.errors import UserError
from doccls.run.heartbeat import read_beat
from doccls.run.metrics_log import read_fold_metrics
from doccls.run.paths import RunPaths, find_run
from doccls.system.holder import Holder
from doccls.system.lock import find_holder
from launcher.file_cache import FileCache
from launcher.ledger import Ledger, read_ledger
from launcher.progress import Progress, RunEvidence, derive_progress
from launcher.slurm.format import QueueEntry
from launcher.slurm.queue import POLL_S
from launcher.status import FoldStatus, RunStatus, State
from launcher.status_files import Source, read_status
from launcher.study_file import find_study, locate_member, locate_study_lock, read_study

_T = TypeVar("_T")


@dataclass(frozen=True)
class WatchedRun:
    """A run to watch; its folder may not exist yet."""

    paths: RunPaths
    num_folds: int = 0  # 0: as its files say


@dataclass(frozen=True)
class Watched:
    """Runs to watch, and the lock of a launcher that has not begun them yet, if there is one."""

    title: str
    runs: tuple[WatchedRun, ...]
    lock: Path | None = None


def find_watched(path: Path) -> Watched:
    """Return the run or the study that a command's argument names by its folder.

    Raises:
        UserError: it names neither, or a study.json that is damaged.
    """
    folder = find_study(path)
    if folder is None:
        return watch_run(find_run(path))
    study = read_study(folder)
    members = () if study is None else study.members
    runs = tuple(WatchedRun(locate_member(folder, member), member.num_folds) for member in members)
    return Watched(f"study {folder.name}", runs, locate_study_lock(folder))


def watch_run(paths: RunPaths) -> Watched:
    """Return a single run to watch."""
    return Watched(f"run {paths.run_id}", (WatchedRun(paths),))


class _KeepingSource(Source):
    """A source for reading again and again: it reads a file only once it has changed, and writes nothing."""

    def __init__(self) -> None:
        self._files = FileCache()
        self._queues: dict[tuple[str, ...], tuple[float, list[QueueEntry] | None]] = {}

    def read(self, path: Path, reader: Callable[[Path], _T]) -> _T:
        return self._files.read(path, reader)

    def find_holder(self, lock: Path) -> Holder | None:
        return find_holder(lock, read_only=True)

    def ask_queue(self, clusters: Sequence[str]) -> list[QueueEntry] | None:
        """Return Slurm's queue, asked for at most every 15 s: all users share Slurm."""
        key, now_s = tuple(clusters), time.monotonic()
        asked_s, queue = self._queues.get(key, (float("-inf"), None))
        if now_s - asked_s >= POLL_S:
            queue = super().ask_queue(clusters)
            self._queues[key] = (now_s, queue)
        return queue


class LiveReader:
    """Reads the progress of runs again and again; a file that has not changed is not read again."""

    def __init__(self, watched: Watched) -> None:
        self._watched, self._source = watched, _KeepingSource()

    def read(self) -> Progress:
        """Return the progress of all folds; write nothing.

        Raises:
            UserError: there is no run in a folder, or its files are damaged.
        """
        lock = self._watched.lock
        is_launched = lock is not None and self._source.find_holder(lock) is not None
        return derive_progress(self._watched.title, [self._read_run(run) for run in self._watched.runs], is_launched)

    def read_statuses(self) -> list[RunStatus]:
        """Return the status of each run; see `read`."""
        return [self._read_status(run) for run in self._watched.runs]

    def _read_status(self, run: WatchedRun) -> RunStatus:
        has_begun = run.paths.snapshot.is_file() or run.paths.list_ledgers()
        if run.num_folds and not has_begun:  # by its study
            missing = tuple(FoldStatus(fold, State.MISSING) for fold in range(run.num_folds))
            return RunStatus(str(run.paths.root), (), missing, merged=False, resume_command=None)
        try:
            return read_status(run.paths, self._source)
        except UserError as error:
            if not run.num_folds:
                raise
            unknown = tuple(FoldStatus(fold, State.UNKNOWN, remark=str(error)) for fold in range(run.num_folds))
            return RunStatus(str(run.paths.root), (), unknown, merged=False, resume_command=None)

    def _read_run(self, run: WatchedRun) -> RunEvidence:
        paths, status, read = run.paths, self._read_status(run), self._source.read
        ledgers = list[Ledger | None]()
        with suppress(UserError):  # the status says what is wrong with it
            ledgers = [read(path, read_ledger) for path in paths.list_ledgers()]
        beats = [read(file, read_beat) for file in paths.list_heartbeats()]
        return RunEvidence(
            paths.run_id,
            status,
            tuple(beat for beat in beats if beat is not None),
            {fold.fold: read(paths.fold_metrics(fold.fold), read_fold_metrics) for fold in status.folds},
            tuple(attempt for ledger in ledgers if ledger is not None for attempt in ledger.attempts),
            read(paths.snapshot, _read_num_epochs),
        )


def read_or_keep(read: Callable[[], Progress], kept: Progress) -> Progress:
    """Return the progress or, while a file server does not answer or a file is being replaced, that of before."""
    with suppress(OSError, UserError):
        return read()
    return kept


def _read_num_epochs(path: Path) -> int:
    """Return the epochs of a run by its snapshot; 0 without a readable one."""
    with suppress(UserError, KeyError, TypeError, ValueError):
        return int(read_snapshot(path)["train"]["epochs"])
    return 0
