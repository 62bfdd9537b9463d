"""launch.json: what was started, where, and how it ended, written before it happens where the disk allows."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from doccls.errors import UserError
from doccls.reporting.log import RunLog
from doccls.system.atomic_files import write_text
from doccls.system.lock import Lock

_FORMAT = "doccls-launch-2"
_REWRITE_S = 5.0
"""Between two tries to write a ledger that could not be written."""


@dataclass(frozen=True)
class Attempt:
    """One start of one fold."""

    fold: int
    number: int
    """1-based, over all launches of the run."""
    slot: str
    devices: tuple[str, ...]
    """A GPU's UUID, or the place of a CPU process; one a rank."""
    micro_batch_size: int
    """Most images a rank takes at a time."""
    started: str
    pids: tuple[int, ...] = ()
    """Of the ranks; empty until they are started."""
    ended: str | None = None
    outcome: str | None = None
    """None while it runs; `lost` if the launcher was killed."""
    then: str | None = None
    """What became of the fold: done, waiting for another attempt, stopped or failed."""
    exit_codes: tuple[int | None, ...] = ()
    message: str | None = None
    log: str | None = None
    """What the fold's processes logged or printed."""


@dataclass(frozen=True)
class Ledger:
    """All launches of a run."""

    run_id: str
    fingerprint: str
    num_folds: int
    folds: tuple[int, ...]
    """Asked for by the last launch."""
    ranks_per_fold: int
    host: str
    """Of the last launch."""
    pid: int
    resume_command: str
    """The command that trains what is missing."""
    started: str
    log: str
    job: str | None = None
    """Slurm's name of the array task, such as `12_3`."""
    first_task: int = 0
    """Index of that array's first task."""
    sharing: int = 0
    """How many tasks of that array share the folds out; 0: each trains the fold of its index."""
    attempts: tuple[Attempt, ...] = ()

    def list_attempts(self, fold: int) -> list[Attempt]:
        """Of one fold, in order."""
        return [attempt for attempt in self.attempts if attempt.fold == fold]

    def list_sizes(self, fold: int, outcome: str, ranks: int) -> list[int]:
        """Micro-batch sizes of those attempts at one fold, by so many ranks, that ended so."""
        return [
            one.micro_batch_size
            for one in self.list_attempts(fold)
            if one.outcome == outcome and len(one.devices) == ranks
        ]

    def add(self, attempt: Attempt) -> "Ledger":
        """With one more attempt."""
        return replace(self, attempts=(*self.attempts, attempt))

    def amend(self, fold: int, **changes: Any) -> "Ledger":
        """With the fold's last attempt changed."""
        last = self.list_attempts(fold)[-1]
        return replace(self, attempts=tuple(replace(one, **changes) if one is last else one for one in self.attempts))

    def close_open(self, now: str) -> "Ledger":
        """With every attempt that a killed launcher left open ended as lost."""
        return replace(
            self,
            attempts=tuple(
                replace(one, ended=now, outcome="lost", then="waiting") if one.outcome is None else one
                for one in self.attempts
            ),
        )


def begin_launch(path: Path, launch: Ledger) -> Ledger:
    """`launch`, which has no attempts yet, with those of the run's earlier launches. Nothing is written.

    Raises:
        UserError: the earlier ones were of another config, data, folds or weights.
        UserError: the ledger is damaged.
    """
    before = read_ledger(path)
    if before is None:
        return launch
    if before.fingerprint != launch.fingerprint:
        raise UserError(
            f"run {launch.run_id} in {path.parent} was launched with another config, data, folds or weights "
            f"(fingerprint {before.fingerprint[:12]}, now {launch.fingerprint[:12]}): take another --run-id"
        )
    return replace(launch, attempts=before.attempts)


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Write it, whole; only the holder of the launch lock may call."""
    write_text(path, json.dumps({"format": _FORMAT} | asdict(ledger), indent=1) + "\n")


def read_ledger(path: Path) -> Ledger | None:
    """The run's ledger; None if the run was never launched.

    Raises:
        UserError: it is damaged, or of another version of doccls.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != _FORMAT:
            raise ValueError("another format")
        attempts = tuple(Attempt(**_with_tuples(attempt)) for attempt in fields.pop("attempts"))
        return Ledger(attempts=attempts, **_with_tuples(fields))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged, or of another version ({error}). Delete it to go on: what is finished is in oof/parts"
        ) from error


class LedgerFile:
    """A launch's ledger, kept on disk. A full disk or a file server that is away ends no fold: it is tried again."""

    def __init__(self, path: Path, ledger: Ledger, lock: Lock, log: RunLog) -> None:
        """Nothing is written yet. `lock` is the launch's."""
        self.path, self.content = path, ledger
        self._lock, self._log = lock, log
        self._failed_s: float | None = None
        """When the last write failed; None if it did not."""

    def write(self, ledger: Ledger) -> None:
        """Keep this one from now on.

        Raises:
            LockError: another process has taken the launch, while this one was suspended.
        """
        self._lock.check()
        self.content = ledger
        try:
            write_ledger(self.path, ledger)
        except OSError as error:
            if self._failed_s is None:
                self._log.line(f"[WARNING] {error}: the folds go on, and it is tried again")
            self._failed_s = time.monotonic()
        else:
            self._failed_s = None

    def try_again(self, wait_s: float = _REWRITE_S) -> None:
        """Write what could not be written, if the last try was so long ago."""
        if self._failed_s is not None and time.monotonic() - self._failed_s >= wait_s:
            self.write(self.content)


def format_time(now: datetime) -> str:
    """As the ledger writes times: in UTC, so that their texts order as they do."""
    return now.astimezone(UTC).isoformat(timespec="milliseconds")


def format_duration(seconds: float) -> str:
    """Such as `45 s`, `12 min` or `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            for name, value in fields.items()}  # fmt: skip
