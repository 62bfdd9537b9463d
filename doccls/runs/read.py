"""What is known about a run from its files. Nothing is written, no lock is waited for, and a bad file stops nothing."""

import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import psutil

from doccls.config.snapshot import flatten_settings, read_snapshot
from doccls.errors import UserError
from doccls.oof.blend_record import read_record
from doccls.oof.predictions import is_merged, read_predictions
from doccls.oof.summary import Summary, read_summary
from doccls.run.heartbeat import Beat, read_beat
from doccls.run.paths import RunPaths
from doccls.runs.scan import FolderScan, scan_folder
from doccls.system.disk import format_size
from doccls.system.holder import Holder
from doccls.system.lock import find_holder
from doccls.system.tensor_file import OtherVersionError

_T = TypeVar("_T")
_RUN_FILES = {"config.yaml", "summary.json", "blend.json", "precision.txt", "slurm_jobs.json"}
_RUN_FOLDERS = {"ckpt", "live", "metrics", "oof"}
_READ_FOLDERS = {"live", "oof", "oof/parts"}
_PREDICTIONS = re.compile(r"oof/parts/fold([0-9]+)\.safetensors")
_LOCK, _BEAT = re.compile(r"live/[^/]+\.lock"), re.compile(r"live/[^/]+_rank[0-9]+\.json")
_MAX_BYTES = 2**30  # no file that is read here comes near it
_MAX_PID = 2**31 - 1
_SILENT_S = 120.0  # as for a lock: after this silence a process counts as dead
# Errors of code that parses malformed content.
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Scores:
    """Macro-F1 on the pages and, if it was measured, on damaged copies of them."""

    clean: float
    damaged: float | None = None

    @property
    def gap(self) -> float | None:
        """The score on clean pages minus that on damaged copies."""
        return None if self.damaged is None else self.clean - self.damaged


@dataclass(frozen=True)
class FoldFacts:
    """What the predictions of a finished fold say."""

    fold: int
    num_folds: int
    scores: Scores


@dataclass(frozen=True)
class RunFacts:
    """What the files of a run say."""

    name: str  # its folder in the experiments folder: `YYYYMMDD/<run_id>`
    started: datetime  # local time
    size_bytes: int
    settings: dict[str, str] | None = None  # the config, by dotted key; None without a readable snapshot
    num_folds: int | None = None
    valid_fold: int | None = None  # the one fold that the config trains; None: all
    folds: tuple[FoldFacts, ...] = ()  # the finished ones, by fold; not read once the run is merged
    merged_scores: Scores | None = None  # of a merged run or a blend
    merged_folds: int = 0  # how many those are from
    is_blend: bool = False
    activity: Literal["training", "merging"] | None = None  # of a live process
    failure: str | None = None  # the error by which a process ended, unless the fold has been finished since
    is_submitted: bool = False  # to Slurm, at some time
    problems: tuple[str, ...] = ()  # files and folders that can't be read, in words
    is_of_other_version: bool = False  # another version of doccls wrote them, which is all that is wrong


def read_run(root: Path, now: datetime) -> RunFacts | None:
    """Return the facts about the run in the folder; None if there is nothing of a run in it."""
    scan = scan_folder(root)
    names = {*scan.files, *scan.links}
    if not scan.problems and not names & _RUN_FILES and not {name.partition("/")[0] for name in names} & _RUN_FOLDERS:
        return None
    return _Reader(RunPaths(root), scan).read(now)


class _Reader:
    """Reads the files of one run, and collects what is wrong with them."""

    def __init__(self, paths: RunPaths, scan: FolderScan) -> None:
        self._paths, self._scan = paths, scan
        self._problems = [*scan.problems, *map(_describe_link, sorted(scan.links & _READ_FOLDERS))]
        self._num_other_version = 0

    def read(self, now: datetime) -> RunFacts:
        started, settings = self._read("config.yaml", lambda: _read_config(self._paths.snapshot)) or (None, {})
        is_blend = self._read("blend.json", lambda: read_record(self._paths)) is not None
        merged = None
        if is_blend or self._is_merged():
            merged = self._read("summary.json", lambda: _take_scores(read_summary(self._paths.summary)))
        folds = () if merged is not None else self._read_folds()
        beats = self._read_beats()
        scores, merged_folds = merged or (None, 0)
        return RunFacts(
            name=f"{self._paths.root.parent.name}/{self._paths.run_id}",
            started=started or self._guess_start(),
            size_bytes=self._scan.size_bytes,
            settings=settings or None,
            num_folds=_parse_count(settings.get("data.folds")) or next((row.num_folds for row in folds), None),
            valid_fold=_parse_count(settings.get("data.valid_fold")),
            folds=folds,
            merged_scores=scores,
            merged_folds=merged_folds,
            is_blend=is_blend,
            activity=self._find_activity(beats, now),
            failure=_find_failure(beats, [row.fold for row in folds]),
            is_submitted="slurm_jobs.json" in self._scan.files,
            problems=tuple(self._problems),
            is_of_other_version=0 < self._num_other_version == len(self._problems),
        )

    def _read(self, name: str, read: Callable[[], _T]) -> _T | None:
        """Return what `read` gives; None if there is no such file, or it can't be read, which is a problem."""
        if name in self._scan.links:
            self._problems.append(_describe_link(name))
        if name not in self._scan.files:
            return None
        try:
            if self._scan.files[name].size_bytes > _MAX_BYTES:
                raise UserError(f"{name}: damaged: over {format_size(_MAX_BYTES)}")
            return read()
        except OtherVersionError as error:
            self._num_other_version += 1
            self._add(error)
        except UserError as error:
            self._add(error)
        except _DAMAGE:
            self._problems.append(f"{name}: damaged")
        return None

    def _add(self, error: UserError) -> None:
        self._problems.append(str(error).replace(f"{self._paths.root}/", ""))

    def _find_files(self, pattern: re.Pattern[str]) -> list[str]:
        return sorted(name for name in (*self._scan.files, *self._scan.links) if pattern.fullmatch(name))

    def _is_merged(self) -> bool:
        if self._scan.links & _READ_FOLDERS:
            return False
        return self._read("summary.json", lambda: is_merged(self._paths)) or False

    def _read_folds(self) -> tuple[FoldFacts, ...]:
        names = self._find_files(_PREDICTIONS)
        found = [self._read(name, partial(_read_fold, self._paths.root / name)) for name in names]
        return tuple(sorted((row for row in found if row is not None), key=lambda row: row.fold))

    def _read_beats(self) -> list[tuple[float, Beat]]:
        """Return the last beats of all processes, and when they were written, in seconds since 1970."""
        beats = []
        for name in self._find_files(_BEAT):
            beat = self._read(name, partial(read_beat, self._paths.root / name))
            if beat is not None:
                beats.append((self._scan.files[name].modified_s, beat))
        return beats

    def _find_activity(self, beats: list[tuple[float, Beat]], now: datetime) -> Literal["training", "merging"] | None:
        held = [name for name in self._find_files(_LOCK) if self._read(name, partial(self._find_holder, name))]
        if held == ["live/merge.lock"]:
            return "merging"
        is_alive = any(_is_alive(beat, now.timestamp() - written_s) for written_s, beat in beats)
        return "training" if held or is_alive else None

    def _find_holder(self, name: str) -> Holder | None:
        return find_holder(self._paths.root / name, read_only=True)

    def _guess_start(self) -> datetime:
        """Return the time of the oldest file, as far as it is within the day that the run's folder is in."""
        oldest_s = min((entry.modified_s for entry in self._scan.files.values()), default=0.0)
        with suppress(ValueError, OverflowError, OSError):
            start = datetime.strptime(self._paths.root.parent.name, "%Y%m%d")
            return min(max(datetime.fromtimestamp(oldest_s), start), start.replace(hour=23, minute=59, second=59))
        return datetime.min  # the folder's name is no date, or the time is out of range


def _describe_link(name: str) -> str:
    return f"{name}: a link, and links are not followed"


def _read_config(path: Path) -> tuple[datetime | None, dict[str, str]]:
    """Return when the run was started, and its settings without the provenance."""
    snapshot = read_snapshot(path)
    started = None
    with suppress(KeyError, ValueError):
        started = datetime.fromisoformat(str(snapshot["provenance"]["started"])).replace(tzinfo=None)
    return started, dict(flatten_settings({key: value for key, value in snapshot.items() if key != "provenance"}))


def _take_scores(summary: Summary) -> tuple[Scores, int]:
    """Return the scores, checked to be numbers, and the number of folds that they are from."""
    damaged = summary.damaged
    scores = Scores(float(summary.macro_f1), None if damaged is None else float(damaged.macro_f1))
    return scores, len(summary.folds)


def _read_fold(path: Path) -> FoldFacts:
    info = read_predictions(path).info
    if path.name != f"fold{info.fold}.safetensors":
        raise UserError(f"{path}: the predictions of fold {info.fold}")
    damaged = info.macro_f1_damaged
    scores = Scores(float(info.macro_f1), None if damaged is None else float(damaged))
    return FoldFacts(info.fold, info.num_folds, scores)


def _parse_count(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch("[0-9]{1,6}", text) else None


def _is_alive(beat: Beat, silent_s: float) -> bool:
    if beat.phase in ("stopped", "failed") or silent_s > _SILENT_S:
        return False
    if beat.host != socket.gethostname():
        return True
    return isinstance(beat.pid, int) and 0 < beat.pid <= _MAX_PID and psutil.pid_exists(beat.pid)


def _find_failure(beats: list[tuple[float, Beat]], finished: Sequence[int]) -> str | None:
    """Return the first line of the error that ended the last process; None if it ended otherwise.

    Errors of folds that are finished by now don't count.
    """
    known = [(at_s, beat) for at_s, beat in beats if beat.phase != "failed" or beat.fold not in finished]
    beat = max(known, key=lambda pair: pair[0], default=(0.0, None))[1]
    if beat is None or beat.phase != "failed":
        return None
    where = "" if beat.fold is None else f"fold {beat.fold}: "
    return f"{where}{beat.message or beat.error}".partition("\n")[0]
