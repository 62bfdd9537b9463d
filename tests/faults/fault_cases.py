"""Each fault at each place, each damage to each file: what became of the run, and which steps were done again."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from faulty_program import FAULTS, FILLER, PLACES, SECOND_FOLD, STEPS
from rank_launcher import Rank, launch_ranks
from tiny_runs import PLAIN, Run, Trainer

from doccls.oof.predictions import read_predictions, write_predictions
from doccls.run.paths import RunPaths
from doccls.training.checkpoint import read_resume, write_resume
from launcher.ledger import Ledger, write_ledger

DAMAGES = ("truncated", "one bit flipped", "empty", "foreign")
FILES = ("newest state", "both states", "best weights so far", "part of a finished fold", "ledger", "a fold's metrics")
SETS = (*PLAIN, "train.batch_size=6", "train.checkpoint_interval_s=0.001")
"""A state after every step; three folds of two epochs, of 7, 4 and 3 steps."""
SAME = "the same bytes"
_DISK = "16m"
_RUN_ID = "faulty"


@dataclass(frozen=True)
class Case:
    """A fault at a place of the work, or a damage to a file of a run that was killed in the midst of fold 1."""

    what: str
    where: str

    @property
    def is_damage(self) -> bool:
        return self.where in FILES

    @property
    def name(self) -> str:
        return f"{self.what}, {self.where}"


CASES = (
    *(Case(fault, place) for fault in FAULTS for place in PLACES),
    *(Case(damage, file) for damage in DAMAGES for file in FILES),
)


@dataclass(frozen=True)
class Result:
    """What became of a case."""

    ended: str
    """How the process ended that met the fault, or what the next one said of the damage."""
    outcome: str
    """Of the run that went on: `the same bytes`, or which files differ."""
    steps_again: int


class MountError(Exception):
    """This machine lets nobody make a small disk."""


@dataclass(frozen=True)
class Whole:
    """The undisturbed run. Best weights hold the config, and with it the folders: each case is made in its folder."""

    folder: Path
    contents: dict[str, bytes]
    steps: int


def train_whole(trainer: Trainer, world_size: int = 1) -> Whole:
    """The run that nothing disturbs."""
    folder = trainer.new_folder()
    folder.mkdir(parents=True)
    run = _go_on(trainer, folder, world_size)
    assert set(run.codes) == {0}, run.stderr
    return Whole(folder, _read_contents(run), _count_steps(folder))


def run_case(trainer: Trainer, whole: Whole, case: Case, world_size: int = 1) -> Result:
    """Meet the fault, or damage the file; then say the same command again.

    Raises:
        MountError: a full disk can't be had here.
    """
    folder = whole.folder
    shutil.rmtree(folder)
    (folder / "experiments").mkdir(parents=True)
    with _small_disk(folder / "experiments") if case.what == "disk full" else nullcontext():
        place, fault = (SECOND_FOLD, "SIGKILL") if case.is_damage else (case.where, case.what)
        ended = _meet(trainer, folder, place, fault, world_size)
        (folder / "experiments" / FILLER).unlink(missing_ok=True)
        if case.is_damage:
            ended = _damage(trainer, folder, case)
        run = _go_on(trainer, folder, world_size)
        again = _count_steps(folder) - whole.steps
        if set(run.codes) != {0}:
            return Result(ended, f"fails: {run.stderr[-300:]}", again)
        if case.is_damage and not ended:
            ended = next((line for line in run.lines if line.startswith("[WARNING]")), "nothing")
        found = _read_contents(run)
        names = sorted(whole.contents.keys() | found.keys())
        differing = [name for name in names if found.get(name) != whole.contents.get(name)]
        return Result(ended.replace(str(run.root), "RUN"), SAME if not differing else f"differ: {differing}", again)


def _start(folder: Path, **told: str) -> dict[str, str]:
    return {"DOCCLS_TEST_FOLDER": str(folder), **told}


def _go_on(trainer: Trainer, folder: Path, world_size: int) -> Run:
    argv = trainer.arguments(SETS, folder, _RUN_ID)
    ranks = launch_ranks("faulty_program:meet_fault", argv, folder / "console", world_size, _start(folder))
    return Run(ranks, folder)


def _meet(trainer: Trainer, folder: Path, place: str, fault: str, world_size: int) -> str:
    told = _start(folder, DOCCLS_TEST_PLACE=place, DOCCLS_TEST_FAULT=fault)
    argv = trainer.arguments(SETS, folder, _RUN_ID)
    return _report_end(
        launch_ranks("faulty_program:meet_fault", argv, folder / "console", world_size, told, kill_stopped=True)[0]
    )


def _report_end(rank: Rank) -> str:
    if rank.code is None:
        return "hung"
    if rank.code < 0:
        return signal.Signals(-rank.code).name
    return f"exit code {rank.code}" + (f": {_report_last(rank)}" if rank.code == 1 else "")


def _report_last(rank: Rank) -> str:
    last = [line for line in rank.stderr.splitlines() if line.startswith("[EXIT][ERROR] ")]
    return last[-1].removeprefix("[EXIT][ERROR] training failed: ") if last else "no word"


def _count_steps(folder: Path) -> int:
    return len((folder / STEPS).read_text().splitlines())


def _read_contents(run: Run) -> dict[str, bytes]:
    """All results, but for metrics, which hold times, and what is noted of their damaged lines."""
    files = [*run.root.glob("oof/**/*"), *run.root.glob("ckpt/*")]
    found = {str(file.relative_to(run.root)): file.read_bytes() for file in files if file.is_file()}
    summary = json.loads((run.root / "summary.json").read_text())
    return found | {"summary.json": json.dumps(summary | {"notes": []}).encode()}


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "none", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MountError(f"a tmpfs can't be mounted: {getattr(error, 'stderr', error)}") from error
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- damage ----------------------------------------------------------------------------------------------------------


def _damage(trainer: Trainer, folder: Path, case: Case) -> str:
    """Damage the file; how the command is refused then, before the file is taken away; empty if it is not."""
    (root,) = folder.glob(f"experiments/*/{_RUN_ID}")
    paths = RunPaths(root)
    if case.where == "ledger":
        write_ledger(paths.ledger(), _make_ledger(_find_fingerprint(paths)))
    for path in _find_damaged(paths, case.where):
        if case.what == "foreign":
            _make_foreign(path, case.where, paths)
        else:
            path.write_bytes(_spoil(path.read_bytes(), case.what))
    if case.where == "ledger":
        words = ["run", *trainer.arguments(SETS, folder, _RUN_ID), "--slots", "1"]
        (rank,) = launch_ranks("launcher.cli:main", words, folder / "console")
    elif (case.what, case.where) == ("foreign", "part of a finished fold"):
        (rank,) = _go_on(trainer, folder, 1).ranks
    else:
        return ""
    for path in _find_damaged(paths, case.where):
        path.unlink()
    return f"refused: {_report_last(rank)}" if rank.code == 1 else f"exit code {rank.code}"


def _find_damaged(paths: RunPaths, where: str) -> list[Path]:
    match where:
        case "newest state":
            return [max(paths.resume_checkpoints(1), key=lambda path: path.stat().st_mtime_ns)]
        case "both states":
            return list(paths.resume_checkpoints(1))
        case "best weights so far":
            return [paths.best_checkpoint(1)]
        case "part of a finished fold":
            return [paths.predictions(0)]
        case "ledger":
            return [paths.ledger()]
        case "a fold's metrics":
            return [paths.fold_metrics(0)]
        case _:
            raise AssertionError(where)


def _spoil(content: bytes, damage: str) -> bytes:
    match damage:
        case "truncated":
            return content[: len(content) * 2 // 3]
        case "one bit flipped":
            place = len(content) * 2 // 3
            return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        case "empty":
            return b""
        case _:
            raise AssertionError(damage)


def _make_foreign(path: Path, where: str, paths: RunPaths) -> None:
    """A whole file of the kind, and of another experiment or fold."""
    other = "f" * 64
    match where:
        case "newest state" | "both states":
            write_resume(path, replace(read_resume(path), fingerprint=other))
        case "best weights so far":
            path.write_bytes(paths.best_checkpoint(0).read_bytes())
        case "part of a finished fold":
            part = read_predictions(path)
            write_predictions(path, replace(part, info=replace(part.info, fingerprint=other)))
        case "ledger":
            write_ledger(path, _make_ledger(other))
        case "a fold's metrics":
            path.write_text('{"loss": 1.5}\n')
        case _:
            raise AssertionError(where)


def _find_fingerprint(paths: RunPaths) -> str:
    fingerprint: str = yaml.safe_load(paths.snapshot.read_text())["provenance"]["fingerprint"]
    return fingerprint


def _make_ledger(fingerprint: str) -> Ledger:
    return Ledger(_RUN_ID, fingerprint, 3, (0, 1, 2), 1, "here", 1, "again", "2026-01-01T00:00:00+00:00", "a.log")


# --- what is to become of them ---------------------------------------------------------------------------------------

_MOST_AGAIN = {"disk full": 7, "newest state": 3, "both states": 8, "best weights so far": 8}
"""Steps: an epoch whose best weights found no room; all of the fold. Else 2: one that was begun, and one whose state
was being written."""
_FOLD = 14


def is_as_expected(case: Case, result: Result) -> bool:
    """Whether the case went as docs/reliability.md says."""
    if result.outcome != SAME:
        return False
    if case.where == "part of a finished fold":  # that fold is trained again
        told = "refused: " if case.what == "foreign" else "[WARNING] "
        return _FOLD <= result.steps_again <= _FOLD + 2 and result.ended.startswith(told)
    if case.where == "ledger":
        return result.steps_again <= 2 and result.ended.startswith("refused: ")
    if case.is_damage:
        told = result.ended.startswith("[WARNING] ")
        return told and result.steps_again <= _MOST_AGAIN.get(case.where, 2)
    codes = {"SIGKILL": "SIGKILL", "SIGSTOP, then SIGKILL": "SIGKILL", "disk full": "exit code 1: can't write "}
    most_again = 0 if case.what == "SIGTERM" else _MOST_AGAIN.get(case.what, 2)
    return result.ended.startswith(codes.get(case.what, "exit code 143")) and result.steps_again <= most_again
