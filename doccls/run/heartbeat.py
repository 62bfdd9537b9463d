"""How far each process of a run is: a small file each, written as it goes on, read by whoever watches the run."""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

from doccls.errors import DownloadError, PortTakenError, UserError
from doccls.system.atomic_files import remove_leftovers, replacing
from doccls.system.gpu_memory import MUCH_GIB, is_full, measure_others_gib
from doccls.system.signals import Interrupted

_T = TypeVar("_T")
_INTERVAL_S = 1.0
_LOOK_S = 0.1


class Cause(StrEnum):
    """What kind of error ended a process."""

    USER_ERROR = "user error"
    """A user has to mend something."""
    OUT_OF_MEMORY = "out of memory"
    """Of a GPU."""
    MEMORY_TAKEN = "out of memory that others hold"
    """Of a GPU, too; other processes hold much of it."""
    PORT_TAKEN = "port taken"
    """Where the ranks were to meet, another process listens."""
    DOWNLOAD_FAILED = "download failed"
    """The network may be back for another attempt."""
    ERROR = "error"


@dataclass(frozen=True)
class Beat:
    """One process's place in its work."""

    host: str
    pid: int
    phase: Literal["start", "train", "validate", "stopping", "stopped", "failed"] = "start"
    """`stopping`: its state is being saved, and then all ranks leave."""
    fold: int | None = None
    epoch: int = 0
    """1-based; 0 before the first."""
    step: int = 0
    """Optimizer steps of the fold that are done, over all epochs."""
    count: int = 0
    """Grows with every beat: a watcher compares counts with its own clock, since clocks differ between machines."""
    time_s: float = 0.0
    """Seconds since 1970 by this process's clock, for people."""
    cause: Cause | None = None
    error: str | None = None
    """Type of the error that ended the process."""
    message: str | None = None


class Heartbeat:
    """Writes a process's beats. It is called by the very thread that trains: a process that hangs falls silent."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._beat = Beat(socket.gethostname(), os.getpid())
        self._written_s = float("-inf")
        self.earlier: Beat | None = None
        """What an earlier process left where this one writes: it was killed there."""

    @property
    def last(self) -> Beat:
        """The last beat, on disk or not; any thread may ask."""
        return self._beat

    def write_to(self, path: Path) -> None:
        """From now on the beats are on disk, as long as the run has a folder for them."""
        if self._path != path:
            self._path, self.earlier = path, read_beat(path)
            remove_leftovers(path)
        self.beat()

    def beat(self, **changes: Any) -> None:
        """Still alive, with these changes; on disk at once at a change of phase, fold or epoch, else once a second."""
        before = self._beat
        now = self._beat = replace(before, count=before.count + 1, time_s=time.time(), **changes)
        turned = (before.phase, before.fold, before.epoch) != (now.phase, now.fold, now.epoch)
        if turned or time.monotonic() - self._written_s >= _INTERVAL_S:
            self._written_s = time.monotonic()
            if self._path is not None and self._path.parent.is_dir():
                with suppress(OSError), replacing(self._path, durable=False) as file:  # a file that matters tells
                    file.write(json.dumps(asdict(now)).encode())

    def end(self) -> None:
        """The work is done: no beat is left."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def watch(self, items: Iterable[_T], phase: str) -> Iterator[_T]:
        """The items, with a beat in `phase` before each."""
        for item in items:
            self.beat(phase=phase)
            yield item


@contextmanager
def beating() -> Iterator[Heartbeat]:
    """A heartbeat for the block; the last one says what ended it, and none is left if it ended well."""
    heartbeat = Heartbeat()
    try:
        yield heartbeat
    except Interrupted as error:
        heartbeat.beat(phase="stopped", message=str(error))
        raise
    except Exception as error:
        heartbeat.beat(phase="failed", cause=find_cause(error), error=type(error).__name__, message=str(error))
        raise
    heartbeat.end()


def await_failures(paths: Sequence[Path], within_s: float = 2.0) -> dict[int, Beat]:
    """The last beats of those processes that failed, by their place in `paths`; the first of them is waited for."""
    end_s = time.monotonic() + within_s
    while True:
        beats = {place: beat for place, path in enumerate(paths) if (beat := read_beat(path)) is not None}
        failed = {place: beat for place, beat in beats.items() if beat.phase == "failed"}
        if failed or not paths or time.monotonic() >= end_s:
            return failed
        time.sleep(_LOOK_S)


def find_cause(error: Exception) -> Cause:
    """What kind of error it is, by its type and by torch's words, which it may have been raised from."""
    if isinstance(error, PortTakenError):
        return Cause.PORT_TAKEN
    if isinstance(error, UserError):
        return Cause.USER_ERROR
    if isinstance(error, DownloadError):
        return Cause.DOWNLOAD_FAILED
    if isinstance(error, RuntimeError) and is_full(str(error)):  # torch.OutOfMemoryError is a RuntimeError
        others_gib = measure_others_gib(f"{error} {error.__cause__}")
        return Cause.MEMORY_TAKEN if others_gib > MUCH_GIB else Cause.OUT_OF_MEMORY
    return Cause.ERROR


def format_progress(beat: Beat | None) -> str:
    """How far a process is; None is one that has not said anything yet."""
    return f"{beat.phase} step {beat.step}, epoch {beat.epoch}" if has_begun(beat) else "its start (imports, weights)"


def has_begun(beat: Beat | None) -> TypeGuard[Beat]:
    """Whether the process has begun to train."""
    return beat is not None and beat.phase != "start"


def read_beat(path: Path) -> Beat | None:
    """The process's last beat; None if there is none, or none that can be read."""
    try:
        beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
        return replace(beat, cause=None if beat.cause is None else Cause(beat.cause))
    except (OSError, ValueError, TypeError):
        return None
