"""Faults at each point and damage to each file: how the run ends, and how many steps are repeated."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from faulty_program import FAULTS, FILLER, POINTS, SECOND_FOLD, STEPS
from rank_launcher import Rank, launch_ranks
from tiny_runs import PLAIN, Run, Trainer

from doccls.oof.predictions import read_predictions, write_predictions
from doccls.run.paths import RunPaths
from doccls.training.checkpoint import read_resume, write_resume
from launcher.ledger import Ledger, write_ledger

DAMAGES = ("truncated", "one bit flipped", "empty", "foreign")
FILES = (
    "newest resume checkpoint", "both resume checkpoints", "best weights so far", "predictions of a finished fold",
    "ledger", "a fold's metrics",
)  # fmt: skip
# A resume checkpoint after each step; three folds of two epochs of 7, 4 and 3 steps.
SETS = (*PLAIN, "train.batch_size=6", "train.checkpoint_interval_s=0.001")
SAME = "the same bytes"
_DISK = "16m"
_RUN_ID = "faulty"


@dataclass(frozen=True)
class Case:
    """A fault at a point of the training, or damage to a file of a run that was killed in the middle of fold 1."""

    what: str
    where: str

    @property
    def is_damage(self) -> bool:
        return self.where in FILES

    @property
    def name(self) -> str:
        return f"{self.what}, {self.where}"


CASES = (
    *(Case(fault, point) for fault in FAULTS for point in POINTS),
    *(Case(damage, file) for damage in DAMAGES for file in FILES),
)


@dataclass(frozen=True)
class Result:
    """The result of a case."""

    observed: str  # how the process with the fault ended, or what the next one reported about the damage
    outcome: str  # of the resumed run: `the same bytes`, or which files differ
    repeated_steps: int


class MountError(Exception):
    """A small disk can't be mounted on this machine."""


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run; each case runs in its folder, since best weights hold the config and its paths."""

    folder: Path
    contents: dict[str, bytes]
    steps: int


def train_reference(trainer: Trainer, world_size: int = 1) -> Reference:
    """Train the uninterrupted run."""
    folder = trainer.new_folder()
    folder.mkdir(parents=True)
    run = _resume(trainer, folder, world_size)
    assert set(run.codes) == {0}, run.stderr
    return Reference(folder, _read_contents(run), _count_steps(folder))


def run_case(trainer: Trainer, reference: Reference, case: Case, world_size: int = 1) -> Result:
    """Inject the fault or damage the file, and then repeat the command.

    Raises:
        MountError: a small disk can't be mounted here.
    """
    folder = reference.folder
    shutil.rmtree(folder)
    (folder / "experiments").mkdir(parents=True)
    with _small_disk(folder / "experiments") if case.what == "disk full" else nullcontext():
        point, fault = (SECOND_FOLD, "SIGKILL") if case.is_damage else (case.where, case.what)
        observed = _train_with_fault(trainer, folder, point, fault, world_size)
        (folder / "experiments" / FILLER).unlink(missing_ok=True)
        if case.is_damage:
            observed = _damage(trainer, folder, case)
        run = _resume(trainer, folder, world_size)
        repeated = _count_steps(folder) - reference.steps
        if set(run.codes) != {0}:
            return Result(observed, f"fails: {run.stderr[-300:]}", repeated)
        if case.is_damage and not observed:
            observed = next((line for line in run.lines if line.startswith("[WARNING]")), "nothing")
        contents = _read_contents(run)
        names = sorted(reference.contents.keys() | contents.keys())
        differing = [name for name in names if contents.get(name) != reference.contents.get(name)]
        outcome = f"differ: {differing}" if differing else SAME
        return Result(observed.replace(str(run.root), "RUN"), outcome, repeated)


def _test_variables(folder: Path, **variables: str) -> dict[str, str]:
    return {"DOCCLS_TEST_FOLDER": str(folder), **variables}


def _resume(trainer: Trainer, folder: Path, world_size: int) -> Run:
    argv = trainer.arguments(SETS, folder, _RUN_ID)
    ranks = launch_ranks("faulty_program:inject_fault", argv, folder / "console", world_size, _test_variables(folder))
    return Run(ranks, folder)


def _train_with_fault(trainer: Trainer, folder: Path, point: str, fault: str, world_size: int) -> str:
    variables = _test_variables(folder, DOCCLS_TEST_PLACE=point, DOCCLS_TEST_FAULT=fault)
    argv = trainer.arguments(SETS, folder, _RUN_ID)
    program, console = "faulty_program:inject_fault", folder / "console"
    return _format_exit(launch_ranks(program, argv, console, world_size, variables, kill_stopped=True)[0])


def _format_exit(rank: Rank) -> str:
    if rank.code is None:
        return "hung"
    if rank.code < 0:
        return signal.Signals(-rank.code).name
    return f"exit code {rank.code}" + (f": {_read_error(rank)}" if rank.code == 1 else "")


def _read_error(rank: Rank) -> str:
    errors = [line for line in rank.stderr.splitlines() if line.startswith("[EXIT][ERROR] ")]
    return errors[-1].removeprefix("[EXIT][ERROR] training failed: ") if errors else "no message"


def _count_steps(folder: Path) -> int:
    return len((folder / STEPS).read_text().splitlines())


def _read_contents(run: Run) -> dict[str, bytes]:
    """Return all results except the metrics, which hold times, and the notes about damaged metrics."""
    files = [*run.root.glob("oof/**/*"), *run.root.glob("ckpt/*")]
    contents = {str(file.relative_to(run.root)): file.read_bytes() for file in files if file.is_file()}
    summary = json.loads((run.root / "summary.json").read_text())
    return contents | {"summary.json": json.dumps(summary | {"notes": []}).encode()}


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
    """Damage the file; if the command then rejects it, delete the file and return the error, else an empty string."""
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
        arguments = ["run", *trainer.arguments(SETS, folder, _RUN_ID), "--slots", "1"]
        (rank,) = launch_ranks("launcher.cli:main", arguments, folder / "console")
    elif (case.what, case.where) == ("foreign", "predictions of a finished fold"):
        (rank,) = _resume(trainer, folder, 1).ranks
    else:
        return ""
    for path in _find_damaged(paths, case.where):
        path.unlink()
    return f"rejected: {_read_error(rank)}" if rank.code == 1 else f"exit code {rank.code}"


def _find_damaged(paths: RunPaths, where: str) -> list[Path]:
    match where:
        case "newest resume checkpoint":
            return [max(paths.resume_checkpoints(1), key=lambda path: path.stat().st_mtime_ns)]
        case "both resume checkpoints":
            return list(paths.resume_checkpoints(1))
        case "best weights so far":
            return [paths.best_checkpoint(1)]
        case "predictions of a finished fold":
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
            position = len(content) * 2 // 3
            return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        case "empty":
            return b""
        case _:
            raise AssertionError(damage)


def _make_foreign(path: Path, where: str, paths: RunPaths) -> None:
    """Replace the file with a valid one of another experiment or fold."""
    other = "f" * 64
    match where:
        case "newest resume checkpoint" | "both resume checkpoints":
            write_resume(path, replace(read_resume(path), fingerprint=other))
        case "best weights so far":
            path.write_bytes(paths.best_checkpoint(0).read_bytes())
        case "predictions of a finished fold":
            predictions = read_predictions(path)
            write_predictions(path, replace(predictions, info=replace(predictions.info, fingerprint=other)))
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
    return Ledger(_RUN_ID, fingerprint, 3, (0, 1, 2), 1, "host", 1, "command", "2026-01-01T00:00:00+00:00", "a.log")


# --- expected results ------------------------------------------------------------------------------------------------

# Repeated steps, at most: an epoch whose best weights did not fit on the disk, or the whole fold.
# Otherwise 2: one that was begun, and one whose resume checkpoint was being written.
_MAX_REPEATED = {
    "disk full": 7, "newest resume checkpoint": 3, "both resume checkpoints": 8, "best weights so far": 8
}  # fmt: skip
_FOLD_STEPS = 14


def is_as_expected(case: Case, result: Result) -> bool:
    """Return whether the case went as docs/reliability.md says."""
    if result.outcome != SAME:
        return False
    if case.where == "predictions of a finished fold":  # that fold is retrained
        message = "rejected: " if case.what == "foreign" else "[WARNING] "
        return _FOLD_STEPS <= result.repeated_steps <= _FOLD_STEPS + 2 and result.observed.startswith(message)
    if case.where == "ledger":
        return result.repeated_steps <= 2 and result.observed.startswith("rejected: ")
    if case.is_damage:
        return result.observed.startswith("[WARNING] ") and result.repeated_steps <= _MAX_REPEATED.get(case.where, 2)
    codes = {"SIGKILL": "SIGKILL", "SIGSTOP, then SIGKILL": "SIGKILL", "disk full": "exit code 1: can't write "}
    limit = 0 if case.what == "SIGTERM" else _MAX_REPEATED.get(case.what, 2)
    return result.observed.startswith(codes.get(case.what, "exit code 143")) and result.repeated_steps <= limit
