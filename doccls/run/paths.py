"""Every file name of a run, once."""

import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from doccls.errors import UserError

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True)
class RunPaths:
    """The folder of one run, `<exp_dir>/YYYYMMDD/<run_id>/`, and what lies in it."""

    root: Path

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def exp_dir(self) -> Path:
        """Where the run lies now; output.exp_dir says where it was begun."""
        return self.root.parent.parent

    @property
    def snapshot(self) -> Path:
        """The resolved config and where it came from."""
        return self.root / "config.yaml"

    @property
    def precision(self) -> Path:
        """In which precision the run is trained; the first fold's process writes it."""
        return self.root / "precision.txt"

    @property
    def images(self) -> Path:
        """What the scan of each image found, where no page store holds it."""
        return self.root / "images.json"

    @property
    def consoles(self) -> Path:
        """What processes printed: a file for each rank of a fold, and for each submitted task."""
        return self.root / "console"

    def console(self, fold: int, rank: int) -> Path:
        """What the launched processes of the fold's rank printed, one after the other, their log and all else."""
        return self.consoles / f"fold{fold}_rank{rank}.txt"

    @property
    def live(self) -> Path:
        """What counts while a process works on the run."""
        return self.root / "live"

    def heartbeat(self, fold: int | None, rank: int) -> Path:
        """How far a process is that trains the fold; None is one that trains all."""
        return self.live / f"{'all' if fold is None else f'fold{fold}'}_rank{rank}.json"

    def fold_lock(self, fold: int) -> Path:
        """Held by the main process that trains the fold, whoever started it."""
        return self.live / f"fold{fold}.lock"

    @property
    def opening_lock(self) -> Path:
        """Held by the array task that looks at the data and makes the run."""
        return self.live / "opening.lock"

    @property
    def array_jobs(self) -> Path:
        """The job arrays that were submitted to Slurm for the run."""
        return self.root / "slurm_jobs.json"

    @property
    def submit_lock(self) -> Path:
        """Held by whoever submits."""
        return self.live / "submission.lock"

    @property
    def merge_lock(self) -> Path:
        """Held by the array task that merges."""
        return self.live / "merge.lock"

    def launch_lock(self, task: int | None = None) -> Path:
        """Held by the launcher of the run, or by an array task, which launches its share of the folds."""
        return self.live / f"{_name_launch(task)}.lock"

    def list_launch_locks(self) -> list[Path]:
        """Of all that have launched folds of the run."""
        return sorted(self.live.glob("launch*.lock"))

    def ledger(self, task: int | None = None) -> Path:
        """What launches of the run started, where, and how it ended; an array task keeps its own."""
        return self.root / f"{_name_launch(task)}.json"

    def list_ledgers(self) -> list[Path]:
        """Of all that have launched folds of the run."""
        return sorted(self.root.glob("launch*.json"))

    @property
    def metrics(self) -> Path:
        """All folds' epochs, one JSON a line."""
        return self.root / "metrics.jsonl"

    def fold_metrics(self, fold: int) -> Path:
        """One fold's epochs: written by the process that trains it, so that folds side by side share no file."""
        return self.metrics_dir / f"fold{fold}.jsonl"

    @property
    def metrics_dir(self) -> Path:
        return self.root / "metrics"

    def best_checkpoint(self, fold: int) -> Path:
        """Best weights of the fold, with the logits they gave on its validation rows."""
        return self.root / "ckpt" / f"best_fold{fold}.pth"

    def resume_checkpoints(self, fold: int) -> tuple[Path, Path]:
        """Where an unfinished fold can go on: the newest state in one of them, the one before it in the other."""
        return tuple(self.root / "ckpt" / f"last_fold{fold}_{slot}.safetensors" for slot in (0, 1))  # type: ignore[return-value]

    def predictions(self, fold: int) -> Path:
        """The fold's OOF part: it exists when, and only when, the fold is done."""
        return self.root / "oof" / "parts" / f"fold{fold}.safetensors"

    @property
    def predictions_dir(self) -> Path:
        return self.root / "oof" / "parts"

    @property
    def oof_logits(self) -> Path:
        """(n_samples, n_classes) float32, row i = row i of train.csv."""
        return self.root / "oof" / "oof_logits.npy"

    @property
    def oof_targets(self) -> Path:
        """(n_samples,) int64 class indices."""
        return self.root / "oof" / "oof_targets.npy"

    @property
    def oof_csv(self) -> Path:
        """The same for people: ID, fold, target, prediction, a probability a class."""
        return self.root / "oof" / "oof.csv"

    @property
    def summary(self) -> Path:
        """The merged run's figures: macro-F1 with an interval, of each fold, of each class."""
        return self.root / "summary.json"

    @property
    def submission(self) -> Path:
        return self.root / "submission.csv"

    @property
    def test_probabilities(self) -> Path:
        """(n_test, n_classes) float32, row i = row i of the sample submission."""
        return self.root / "test_probabilities.npy"


def _name_launch(task: int | None) -> str:
    return "launch" if task is None else f"launch_task{task}"


def check_run_id(run_id: str) -> str:
    """The run id itself.

    Raises:
        UserError: it would not do as a folder's name.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise UserError(f"run id {run_id!r}: letters, digits, '.', '_' and '-' only, at most 80, no '/'")
    return run_id


def locate_run(exp_dir: Path, run_id: str, now: datetime) -> RunPaths:
    """The run of that id under `exp_dir`, whatever its day; today's folder if there is none yet."""
    found = sorted(exp_dir.glob(f"[0-9]*/{run_id}"))
    return RunPaths(found[0] if found else exp_dir / now.strftime("%Y%m%d") / run_id)


def new_run_id(version: str) -> str:
    """Such as `v087-8c206e`."""
    return f"{version}-{secrets.token_hex(3)}"


def name_log(logs_dir: Path, run_id: str, now: datetime, suffix: str = "") -> Path:
    """`logs/run_YYYYMMDD-HHMM_<run_id>.log`; with a suffix such as `fold2` for a command that does only that."""
    return logs_dir / f"run_{now:%Y%m%d-%H%M}_{run_id}{f'_{suffix}' if suffix else ''}.log"
