"""`doccls-launch logs RUN`: the log of a run's last launch, of a fold, or the console output of a rank."""

import codecs
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from doccls.config.paths import list_matching
from doccls.errors import UserError
from doccls.run.paths import RunPaths
from launcher.attempt import find_log_name
from launcher.ledger import Ledger, read_ledgers
from launcher.live_files import LiveReader, watch_run
from launcher.progress import ACTIVE
from launcher.slurm.array_jobs import read_array_jobs
from launcher.status import State
from launcher.status_files import read_status

_POLL_S = 0.5
_CONSOLE = re.compile(r"fold([0-9]+)_rank([0-9]+)\.txt")
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class LogRequest:
    """Which log to print: the launch's, a fold's, or the console output of one of its ranks."""

    fold: int | None = None
    rank: int | None = None


def print_log(paths: RunPaths, request: LogRequest, follows: bool, write: Callable[[str], bool]) -> None:
    """Write the log; with `follows`, go on until the run has ended, also with the log of a later attempt.

    `write` returns whether somebody still reads.

    Raises:
        UserError: there is no such log; the message says which there are.
        KeyboardInterrupt: the user has seen enough.
    """
    if request.rank is not None and request.fold is None:
        raise UserError("--rank: say of which fold, with --fold K")
    tail, reader = _Tail(find_log(paths, request)), LiveReader(watch_run(paths))
    while True:
        is_active = follows and _is_active(reader, request.fold)  # asked first, so that the last lines are read, too
        if not tail.copy(write) or not is_active:
            return
        time.sleep(_POLL_S)
        newest = find_log(paths, request)
        if newest != tail.path:
            tail.copy(write)
            write(f"==> {newest} <==\n")
            tail = _Tail(newest)


def find_log(paths: RunPaths, request: LogRequest) -> Path:
    """Return the log that is asked for.

    Raises:
        UserError: there is none; the message says which there are.
    """
    path = _name_log(paths, request)
    if path is not None and path.is_file():
        return path
    what = "a launch" if request.fold is None else f"fold {request.fold}"
    what += "" if request.rank is None else f", rank {request.rank}"
    moved = "" if path is None else f": {path} does not exist here"
    raise UserError(f"run {paths.root} has no log of {what}{moved} ({_describe_existing(paths)})")


def _name_log(paths: RunPaths, request: LogRequest) -> Path | None:
    if request.fold is None:
        newest = _find_newest(paths)
        return None if newest is None else Path(newest.log)
    if request.rank is not None:
        return paths.console(request.fold, request.rank)
    console = paths.console(request.fold, 0)  # its first lines name the log, also of an attempt that still runs
    try:
        started = find_log_name(console.read_bytes().decode(errors="replace"))
    except OSError:
        return None
    return console if started is None else started


def _find_newest(paths: RunPaths) -> Ledger | None:
    return max(read_ledgers(paths), key=lambda ledger: ledger.started, default=None)


def _describe_existing(paths: RunPaths) -> str:
    """Return which logs there are, in words."""
    newest, found = _find_newest(paths), dict[int, list[int]]()
    for file in list_matching(paths.consoles, _CONSOLE.pattern):
        match = _CONSOLE.fullmatch(file.name)
        assert match is not None
        found.setdefault(int(match[1]), []).append(int(match[2]))
    logs = [f"of the launch: {newest.log}"] if newest is not None else []
    logs += [f"fold {fold}: ranks {', '.join(map(str, sorted(ranks)))}" for fold, ranks in sorted(found.items())]
    return f"there are {'; '.join(logs)}" if logs else _describe_unlaunched(paths)


def _describe_unlaunched(paths: RunPaths) -> str:
    """Return why a run has no log at all, in words: Slurm may not have started its tasks yet."""
    if not read_array_jobs(paths.array_jobs):
        return "it was not launched with doccls-launch"
    waiting = [fold for fold in read_status(paths).folds if fold.state is State.WAITING]
    if not waiting:
        return f"it was submitted to Slurm, and no task has begun a log; see doccls-launch status {paths.root}"
    tasks = [f"fold {fold.fold}, {fold.remark}" if fold.remark else f"fold {fold.fold}" for fold in waiting]
    return f"its tasks wait in Slurm's queue: {'; '.join(tasks)}"


def _is_active(reader: LiveReader, fold: int | None) -> bool:
    """Return whether the log may still grow: that of a launch while it is active, that of a fold until it has ended."""
    (status,) = reader.read_statuses()
    if fold is None:
        return bool(status.launchers)
    return any(own.fold == fold and own.state in ACTIVE for own in status.folds)


class _Tail:
    """A file that grows, and how far it has been read."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def copy(self, write: Callable[[str], bool]) -> bool:
        """Write what the file has that was not written yet, and return whether somebody still reads."""
        is_read = True
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while is_read and (chunk := file.read(_CHUNK_BYTES)):
                self._offset += len(chunk)
                is_read = write(self._decoder.decode(chunk))
        return is_read
