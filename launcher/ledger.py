"""The ledger of a run (launch.json): every attempt, written before it starts, and how it ended."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from doccls.errors import UserError
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import read_text, write_text
from doccls.system.lock import Lock
from doccls.system.tensor_file import OtherVersionError, TensorFileError, refuse_format

_FORMAT = "doccls-launch-2"
_RETRY_S = 5.0  # between two tries to write a ledger that could not be written


@dataclass(frozen=True)
class Attempt:
    """One start of one fold, as the ledger records it."""

    fold: int
    number: int  # 1-based, over all launches of the run
    slot: str
    devices: tuple[str, ...]  # by rank: the UUID of a GPU, or the name of a CPU device
    micro_batch_size: int  # most images that a rank takes at a time
    started: str
    pids: tuple[int, ...] = ()  # by rank; empty until they are started
    ended: str | None = None
    outcome: str | None = None  # None while it runs; `lost` if the launcher was killed
    then: str | None = None  # the fold's status after it: done, waiting (for another attempt), stopped or failed
    exit_codes: tuple[int | None, ...] = ()
    message: str | None = None
    log: str | None = None  # path of the fold's log, or of its console output


@dataclass(frozen=True)
class Ledger:
    """The attempts of all launches of a run, and the facts of its last launch."""

    run_id: str
    fingerprint: str
    num_folds: int
    folds: tuple[int, ...]  # those that the launch was asked to train
    ranks_per_fold: int
    host: str
    pid: int
    resume_command: str  # trains the missing folds
    started: str
    log: str
    job: str | None = None  # Slurm's name of the array task, such as `12_3`
    first_task: int = 0  # index of that array's first task
    sharing: int = 0  # number of tasks of that array that share the folds; 0: each trains the fold of its index
    offset: int = 0  # number of the run's fold 0 among the folds that the array trains
    study: str | None = None  # the study that the launch trains
    cancelled: bool = False  # a launch of a study was asked to stop this run alone
    attempts: tuple[Attempt, ...] = ()

    def list_attempts(self, fold: int) -> list[Attempt]:
        """Return the attempts at one fold, in order."""
        return [attempt for attempt in self.attempts if attempt.fold == fold]

    def list_sizes(self, fold: int, outcome: str, ranks: int) -> list[int]:
        """Return the micro-batch sizes of the attempts at a fold by that number of ranks with that outcome."""
        return [
            attempt.micro_batch_size
            for attempt in self.list_attempts(fold)
            if attempt.outcome == outcome and len(attempt.devices) == ranks
        ]

    def add(self, attempt: Attempt) -> "Ledger":
        """Return the ledger with one more attempt."""
        return replace(self, attempts=(*self.attempts, attempt))

    def amend(self, fold: int, **changes: Any) -> "Ledger":
        """Return the ledger with changes to the fold's last attempt."""
        last = self.list_attempts(fold)[-1]
        attempts = (replace(attempt, **changes) if attempt is last else attempt for attempt in self.attempts)
        return replace(self, attempts=tuple(attempts))

    def close_open(self, now: str) -> "Ledger":
        """Return the ledger with all attempts that a killed launcher left open ended as lost."""
        attempts = (
            replace(attempt, ended=now, outcome="lost", then="waiting") if attempt.outcome is None else attempt
            for attempt in self.attempts
        )
        return replace(self, attempts=tuple(attempts))


def begin_launch(path: Path, launch: Ledger) -> Ledger:
    """Return `launch`, which has no attempts yet, with those of the run's earlier launches; write nothing.

    Raises:
        UserError: an earlier launch had another config, data, folds or weights.
        UserError: the ledger is damaged.
    """
    before = read_ledger(path)
    if before is None:
        return launch
    if before.fingerprint != launch.fingerprint:
        raise UserError(
            f"run {launch.run_id} in {path.parent} was started with another config, data, folds or weights "
            f"(fingerprint {before.fingerprint[:12]}, now {launch.fingerprint[:12]}): choose another --run-id"
        )
    return replace(launch, attempts=before.attempts)


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Write the ledger atomically; only the holder of the launch lock may call this."""
    write_text(path, json.dumps({"format": _FORMAT} | asdict(ledger), indent=1) + "\n")


def read_ledger(path: Path) -> Ledger | None:
    """Return the run's ledger, or None if the run was never launched.

    Raises:
        UserError: it is damaged, or was written by another version of doccls.
    """
    try:
        fields = json.loads(read_text(path))
        refuse_format(path, fields.pop("format"), _FORMAT)
        attempts = tuple(Attempt(**_with_tuples(attempt)) for attempt in fields.pop("attempts"))
        return Ledger(attempts=attempts, **_with_tuples(fields))
    except FileNotFoundError:
        return None
    except OtherVersionError as error:
        raise UserError(f"{error}. Continue the run with that version, or choose another --run-id") from error
    except (TensorFileError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({error}). Delete it to continue: finished folds keep their results"
        ) from error


def read_ledgers(paths: RunPaths) -> list[Ledger]:
    """Return all ledgers of the run: that of its launches, and those of array tasks.

    Raises:
        UserError: see `read_ledger`.
    """
    return [ledger for path in paths.list_ledgers() if (ledger := read_ledger(path)) is not None]


class LedgerFile:
    """A launch's ledger and its file. A failed write (full disk, lost file server) stops no fold: it is retried."""

    def __init__(self, path: Path, ledger: Ledger, lock: Lock, log: RunLog) -> None:
        """Keep the ledger, and write nothing yet; `lock` is the lock of the launch."""
        self.path, self.content = path, ledger
        self._lock, self._log = lock, log
        self._failed_s: float | None = None  # time of the last write, if that failed

    def write(self, ledger: Ledger) -> None:
        """Replace the ledger and write it.

        Raises:
            LockError: another process took over the launch while this one was suspended.
        """
        self._lock.check()
        self.content = ledger
        try:
            write_ledger(self.path, ledger)
        except OSError as error:
            if self._failed_s is None:
                self._log.line(f"[WARNING] {error}: the folds continue; the write will be retried")
            self._failed_s = time.monotonic()
        else:
            self._failed_s = None

    def retry_write(self, wait_s: float = _RETRY_S) -> None:
        """Write the ledger if the last write failed, at least `wait_s` ago."""
        if self._failed_s is not None and time.monotonic() - self._failed_s >= wait_s:
            self.write(self.content)


def format_time(now: datetime) -> str:
    """Format a time for the ledger: ISO 8601 in UTC, so that texts sort like times."""
    return now.astimezone(UTC).isoformat(timespec="milliseconds")


def format_duration(seconds: float) -> str:
    """Format a duration, such as `45 s`, `12 min` or `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            for name, value in fields.items()}  # fmt: skip
