"""The file names of a run."""

import hashlib
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from doccls.config.paths import describe_error, find_problem, is_folder, list_matching, resolve_option
from doccls.errors import UserError

DAY = re.compile(r"[0-9]{8}")  # a folder of runs
_MAX_NAME = 160  # characters; file systems allow 255 bytes, and temporary files have longer names
_FOLD, _LAUNCH = r"fold[0-9]+", r"launch(?:_task[0-9]+)?"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True)
class RunPaths:
    """The folder of one run, `<exp_dir>/YYYYMMDD/<run_id>/`, and the files in it."""

    root: Path

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def exp_dir(self) -> Path:
        """The current parent of the run; output.exp_dir in its snapshot is where it was started."""
        return self.root.parent.parent

    @property
    def snapshot(self) -> Path:
        """The resolved config and its provenance."""
        return self.root / "config.yaml"

    @property
    def precision(self) -> Path:
        """The training precision of the run; the process that trains first writes it."""
        return self.root / "precision.txt"

    @property
    def images(self) -> Path:
        """The scan result of each image, for runs without a page store."""
        return self.root / "images.json"

    @property
    def consoles(self) -> Path:
        """The console output of processes: a file per rank of a fold, and per submitted task."""
        return self.root / "console"

    def console(self, fold: int, rank: int) -> Path:
        """Return the file for the console output, log included, of all processes launched for this rank of the fold."""
        return self.consoles / f"fold{fold}_rank{rank}.txt"

    @property
    def live(self) -> Path:
        """Files that matter only while a process works on the run."""
        return self.root / "live"

    def heartbeat(self, fold: int | None, rank: int) -> Path:
        """Return the heartbeat file of a process that trains the fold, or all folds if `fold` is None."""
        return self.live / f"{'all' if fold is None else f'fold{fold}'}_rank{rank}.json"

    def list_heartbeats(self) -> list[Path]:
        """Return the heartbeat files of all processes, sorted by name."""
        return list_matching(self.live, rf"(?:all|{_FOLD})_rank[0-9]+\.json")

    def fold_lock(self, fold: int) -> Path:
        """Return the lock that the main process holds while it trains the fold, whatever started it."""
        return self.live / f"fold{fold}.lock"

    @property
    def precision_lock(self) -> Path:
        """The lock of the process that sets the precision of the run.

        It is beside that file: by creating the lock, a client of NFS notices that another one has changed the folder.
        """
        return self.root / "precision.lock"

    @property
    def opening_lock(self) -> Path:
        """The lock of the array task that scans the data and creates the run."""
        return self.live / "opening.lock"

    @property
    def array_jobs(self) -> Path:
        """The record of job arrays submitted to Slurm for the run."""
        return self.root / "slurm_jobs.json"

    @property
    def submit_lock(self) -> Path:
        """The lock of a process that submits the run."""
        return self.live / "submission.lock"

    @property
    def merge_lock(self) -> Path:
        """The lock of the process that merges the run."""
        return self.live / "merge.lock"

    def launch_lock(self, task: int | None = None) -> Path:
        """Return the lock of the launcher, or of an array task, which launches its share of the folds."""
        return self.live / f"{_name_launch(task)}.lock"

    @property
    def cancel_request(self) -> Path:
        """The request to stop this run alone: the token of the launch lock of the study's launcher."""
        return self.live / "cancel.txt"

    def list_launch_locks(self) -> list[Path]:
        """Return the locks of all launches of the run."""
        return list_matching(self.live, rf"{_LAUNCH}\.lock")

    def ledger(self, task: int | None = None) -> Path:
        """Return the ledger: what launches started, where, and how it ended. Each array task keeps its own."""
        return self.root / f"{_name_launch(task)}.json"

    def list_ledgers(self) -> list[Path]:
        """Return the ledgers of all launches of the run."""
        return list_matching(self.root, rf"{_LAUNCH}\.json")

    @property
    def metrics(self) -> Path:
        """The metrics of all folds, one JSON line per epoch."""
        return self.root / "metrics.jsonl"

    def fold_metrics(self, fold: int) -> Path:
        """Return the metrics of one fold, in a file of its own because folds may train in parallel."""
        return self.metrics_dir / f"fold{fold}.jsonl"

    def list_fold_metrics(self) -> list[Path]:
        """Return the metrics of all folds, sorted by name."""
        return list_matching(self.metrics_dir, rf"{_FOLD}\.jsonl")

    @property
    def metrics_dir(self) -> Path:
        return self.root / "metrics"

    def best_checkpoint(self, fold: int) -> Path:
        """Return the checkpoint of the fold's best weights, with their logits on its validation rows."""
        return self.root / "ckpt" / f"best_fold{fold}.pth"

    def list_best_checkpoints(self) -> list[Path]:
        """Return the checkpoints of all folds' best weights, sorted by name."""
        return list_matching(self.root / "ckpt", rf"best_{_FOLD}\.pth")

    def resume_checkpoints(self, fold: int) -> tuple[Path, Path]:
        """Return the two files that hold the latest and the previous resume checkpoint of a fold, in either order."""
        return tuple(self.root / "ckpt" / f"last_fold{fold}_{slot}.safetensors" for slot in (0, 1))  # type: ignore[return-value]

    def predictions(self, fold: int) -> Path:
        """Return the fold predictions, which exist if and only if the fold is finished."""
        return self.root / "oof" / "parts" / f"fold{fold}.safetensors"

    @property
    def predictions_dir(self) -> Path:
        return self.root / "oof" / "parts"

    def list_predictions(self) -> list[Path]:
        """Return the fold predictions of all finished folds, sorted by name."""
        return list_matching(self.predictions_dir, rf"{_FOLD}\.safetensors")

    def views(self, fold: int, prior: int | None = None) -> Path:
        """Return the OOF logits of the fold in several views, which `doccls predict` writes to choose by them.

        With `prior`, they are those with BatchNorm statistics of the fold's pages, mixed with this prior strength.
        """
        suffix = "" if prior is None else f"_bn{prior}"
        return self.root / "oof" / "views" / f"fold{fold}{suffix}.safetensors"

    @property
    def views_record(self) -> Path:
        """The views and BatchNorm statistics that `doccls predict` chose, and the figures that decided."""
        return self.root / "views.json"

    @property
    def oof_logits(self) -> Path:
        """(n_samples, n_classes) float32, row i = row i of train.csv."""
        return self.root / "oof" / "oof_logits.npy"

    @property
    def oof_logits_damaged(self) -> Path:
        """The same, predicted from damaged copies of the pages; only with valid.damage."""
        return self.root / "oof" / "oof_logits_damaged.npy"

    @property
    def oof_targets(self) -> Path:
        """(n_samples,) int64 class indices."""
        return self.root / "oof" / "oof_targets.npy"

    @property
    def oof_csv(self) -> Path:
        """The OOF predictions as a table: ID, fold, target, prediction, and a probability per class."""
        return self.root / "oof" / "oof.csv"

    @property
    def summary(self) -> Path:
        """The results of the merged run: macro-F1 with a confidence interval, per fold and per class."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The results as one HTML file; `doccls report` writes it."""
        return self.root / "report.html"

    def comparison(self, run_ids: Sequence[str]) -> Path:
        """Return the HTML file that compares the run with others; `doccls report` writes it for several runs."""
        names = "+".join(run_ids)  # no run id contains a plus
        if len(names) > _MAX_NAME:
            names = f"{len(run_ids)}_runs_{hashlib.sha256(names.encode()).hexdigest()[:12]}"
        return self.root / f"compare_{names}.html"

    @property
    def blend(self) -> Path:
        """The members and weights of a blend; only in the folder of a blend."""
        return self.root / "blend.json"

    @property
    def results(self) -> "ResultPaths":
        """The files of a prediction of the test images."""
        return ResultPaths(self.root)

    def folder_results(self, name: str) -> "ResultPaths":
        """Return the files of a prediction of all images of a folder of that name."""
        return ResultPaths(self.root / "predictions" / name)


@dataclass(frozen=True)
class ResultPaths:
    """The folder of a prediction's results, and the files in it."""

    root: Path

    @property
    def submission(self) -> Path:
        return self.root / "submission.csv"

    @property
    def submission_record(self) -> Path:
        """The folds and rows that the submission was predicted from."""
        return self.root / "submission.json"

    @property
    def test_probabilities(self) -> Path:
        """(n_test, n_classes) float32, row i = row i of the sample submission."""
        return self.root / "test_probabilities.npy"

    @property
    def predictions(self) -> Path:
        """Each page's label and its probability, in the order of the pages."""
        return self.root / "predictions.csv"

    @property
    def predictions_record(self) -> Path:
        """What the predictions come from, and the digests of both files."""
        return self.root / "predictions.json"

    @property
    def review(self) -> Path:
        """The pages whose label is less probable than `--min-confidence`, the least certain first."""
        return self.root / "review.csv"


def _name_launch(task: int | None) -> str:
    return "launch" if task is None else f"launch_task{task}"


def check_run_id(run_id: str) -> str:
    """Return the run id if it is valid as a folder name.

    Raises:
        UserError: it is not valid.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise UserError(f"run id {run_id!r}: at most 80 letters, digits, '.', '_' and '-', the first a letter or digit")
    return run_id


def locate_run(exp_dir: Path, run_id: str, now: datetime) -> RunPaths:
    """Return the run with that id under `exp_dir`, whatever its date; for a new run, the folder under today's date.

    Raises:
        UserError: `exp_dir` can't be listed, or the file system takes another run's id for this one.
    """
    try:
        dates = sorted(entry.name for entry in os.scandir(exp_dir) if DAY.fullmatch(entry.name))
    except FileNotFoundError:
        dates = []
    except OSError as error:
        raise UserError(f"output.exp_dir: {describe_error(error, exp_dir, 'folder')}") from error
    found = [exp_dir / date / run_id for date in dates if is_folder(exp_dir / date / run_id)]
    if found:
        _check_case(found[0])
    return RunPaths(found[0] if found else exp_dir / now.strftime("%Y%m%d") / run_id)


def locate_study(exp_dir: Path, name: str) -> Path:
    """Return the folder of a study, a launch of several runs under `exp_dir`."""
    return exp_dir / "studies" / name


def _check_case(root: Path) -> None:
    """Refuse the name of a run in another case, which names the same folder on some file systems.

    Raises:
        UserError: the folder has another name.
    """
    with suppress(OSError):  # a folder that can't be listed
        names = {entry.name for entry in os.scandir(root.parent)}
        other = next((name for name in sorted(names) if name.lower() == root.name.lower()), None)
        if root.name not in names and other is not None:
            raise UserError(
                f"run id {root.name!r}: upper and lower case make no difference on the file system of {root.parent}, "
                f"and run {other!r} exists: continue it with --run-id {other}, or choose another --run-id"
            )


def find_run(folder: Path) -> RunPaths:
    """Return the paths of the run whose folder a command's argument RUN names.

    Raises:
        UserError: there is no such folder, or it can't be listed.
    """
    root = resolve_option(folder, "RUN")
    problem = find_problem(root, "run folder")
    if problem is not None:
        raise UserError(f"RUN: {problem} (runs are in <output.exp_dir>/YYYYMMDD/<run_id>)")
    return RunPaths(root)


def new_run_id(version: str) -> str:
    """Return a new random run id such as `v087-8c206e`."""
    return f"{version}-{secrets.token_hex(3)}"


def name_log(logs_dir: Path, run_id: str, now: datetime, suffix: str = "") -> Path:
    """Return `<logs_dir>/run_YYYYMMDD-HHMM_<run_id>[_<suffix>].log`; `fold2` is such a suffix."""
    return logs_dir / f"run_{now:%Y%m%d-%H%M}_{run_id}{f'_{suffix}' if suffix else ''}.log"
