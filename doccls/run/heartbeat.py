"""The progress of each process of a run, in a small file per process that watchers of the run read."""

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
from doccls.system.gpu_memory import SIGNIFICANT_GIB, is_full, measure_others_gib
from doccls.system.signals import Interrupted

_T = TypeVar("_T")
_WRITE_INTERVAL_S = 1.0
_POLL_S = 0.1


class Cause(StrEnum):
    """The kind of error that ended a process."""

    USER_ERROR = "user error"  # the user has to fix something
    OUT_OF_MEMORY = "out of memory"  # of a GPU
    MEMORY_TAKEN = "out of memory that others hold"  # of a GPU, too, but other processes hold much of it
    PORT_TAKEN = "port taken"  # another process listens on the port of the rendezvous
    DOWNLOAD_FAILED = "download failed"  # another attempt may succeed
    ERROR = "error"


@dataclass(frozen=True)
class Beat:
    """The progress of one process."""

    host: str
    pid: int
    # `stopping`: the resume checkpoint is being saved, and then all ranks stop.
    phase: Literal["start", "train", "validate", "stopping", "stopped", "failed"] = "start"
    fold: int | None = None
    epoch: int = 0  # 1-based; 0 before the first
    step: int = 0  # completed optimizer steps of the fold, over all epochs
    count: int = 0  # grows with every beat: watchers time its changes by their own clock, since clocks differ
    time_s: float = 0.0  # seconds since 1970 by this process's clock, only for display
    cause: Cause | None = None
    error: str | None = None  # type of the error that ended the process
    message: str | None = None
    # What the fold has to do, once it is known; 0 before.
    epochs: int = 0
    steps_per_epoch: int = 0
    batch_size: int = 0  # training images of all processes in a step
    # The time and step of the beat that entered this phase of this epoch: the pace since then is that of its steps.
    stage_s: float = 0.0
    stage_step: int = 0


class Heartbeat:
    """Writer of a process's beats. The training thread itself calls it, so a process that hangs falls silent."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._beat = Beat(socket.gethostname(), os.getpid())
        self._written_s = float("-inf")
        self.earlier: Beat | None = None  # the last beat of an earlier process at this path, which was killed

    @property
    def last(self) -> Beat:
        """The last beat, on disk or not; any thread may read it."""
        return self._beat

    def write_to(self, path: Path) -> None:
        """Write the beats to `path` from now on, provided that its folder exists."""
        if self._path != path:
            self._path, self.earlier = path, read_beat(path)
            remove_leftovers(path)
        self.beat()

    def beat(self, **changes: Any) -> None:
        """Record a beat with these changes; write it at each change of phase, fold or epoch, else once a second."""
        before = self._beat
        after = replace(before, count=before.count + 1, time_s=time.time(), **changes)
        entered_stage = (before.phase, before.fold, before.epoch) != (after.phase, after.fold, after.epoch)
        if entered_stage:
            after = replace(after, stage_s=after.time_s, stage_step=after.step)
        self._beat = after
        if entered_stage or time.monotonic() - self._written_s >= _WRITE_INTERVAL_S:
            self._written_s = time.monotonic()
            if self._path is not None and self._path.parent.is_dir():
                content = json.dumps(asdict(after)).encode()
                with suppress(OSError), replacing(self._path, len(content), durable=False) as file:  # harmless if not
                    file.write(content)

    def end(self) -> None:
        """Remove the heartbeat file when the work is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def watch(self, items: Iterable[_T], phase: str) -> Iterator[_T]:
        """Yield the items, with a beat in `phase` before each."""
        for item in items:
            self.beat(phase=phase)
            yield item


@contextmanager
def open_heartbeat() -> Iterator[Heartbeat]:
    """Yield a heartbeat for the block; its last beat records the error, and a successful block leaves no file."""
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
    """Wait up to `within_s` seconds for a failed process; return the failed ones' last beats by index in `paths`."""
    end_s = time.monotonic() + within_s
    while True:
        beats = {index: beat for index, path in enumerate(paths) if (beat := read_beat(path)) is not None}
        failed = {index: beat for index, beat in beats.items() if beat.phase == "failed"}
        if failed or not paths or time.monotonic() >= end_s:
            return failed
        time.sleep(_POLL_S)


def find_cause(error: Exception) -> Cause:
    """Return the cause by the error's type and by torch's message, which may be that of its `__cause__`."""
    if isinstance(error, PortTakenError):
        return Cause.PORT_TAKEN
    if isinstance(error, UserError):
        return Cause.USER_ERROR
    if isinstance(error, DownloadError):
        return Cause.DOWNLOAD_FAILED
    if isinstance(error, RuntimeError) and is_full(str(error)):  # torch.OutOfMemoryError is a RuntimeError
        others_gib = measure_others_gib(f"{error} {error.__cause__}")
        return Cause.MEMORY_TAKEN if others_gib > SIGNIFICANT_GIB else Cause.OUT_OF_MEMORY
    return Cause.ERROR


def format_progress(beat: Beat | None) -> str:
    """Return the progress as text; None stands for a process without a beat."""
    return f"{beat.phase} step {beat.step}, epoch {beat.epoch}" if has_begun(beat) else "startup (imports, weights)"


def has_begun(beat: Beat | None) -> TypeGuard[Beat]:
    """Return whether the process has begun to train."""
    return beat is not None and beat.phase != "start"


def read_beat(path: Path) -> Beat | None:
    """Return the process's last beat; None if the file is missing or unreadable."""
    try:
        beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
        return replace(beat, cause=None if beat.cause is None else Cause(beat.cause))
    except (OSError, ValueError, TypeError):
        return None
