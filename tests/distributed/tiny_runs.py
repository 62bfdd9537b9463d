"""A data set of 48 tiny drawn pages, and access to the log, files and fold predictions of runs on it."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from rank_launcher import Rank, launch_ranks

from doccls.oof.predictions import FoldPredictions, read_predictions
from doccls.training.checkpoint import read_best

LABELS = ("card", "form", "letter", "table")
COUNT = 48
TEST_COUNT = 7
# In folds.csv: one fold is smaller than three processes, and none is a multiple of both two and three.
FOLD_SIZES = (2, 19, 27)
# No BatchNorm, no random numbers per rank, a batch that two and three processes divide unequally, and an optimizer
# that, unlike Adam, tells a gradient from its double.
PLAIN = (
    "data.train_csv=folds.csv", "data.num_workers=0", "train.log_interval=1", "train.batch_size=11",
    "train.optimizer=sgd", "train.lr=0.02", "train.grad_clip_norm=null",
)  # fmt: skip
# Everything that draws random numbers.
RICH = (
    "train.mixup_alpha=0.4", "train.cutmix_alpha=0.4", "train.ema_decay=0.8", "train.label_smoothing=0.1",
    "train.grad_clip_norm=1.0", "model.drop_rate=0.2", "model.drop_path_rate=0.2", "augment.rotate_deg=10",
    "augment.noise_prob=0.5", "augment.shadow_prob=0.5", "augment.brightness=0.2", "data.num_workers=0",
)  # fmt: skip
_CONFIG: dict[str, Any] = {
    "data": {"train_csv": "train.csv", "sample_csv": "sample.csv", "image_dir_train": "train",
             "image_dir_test": "test", "folds": 3},
    "model": {"name": "test_convnext", "pretrained": False},
    "train": {"img_size": 64, "batch_size": 12, "epochs": 2, "lr": 1e-3, "warmup_epochs": 0, "cpu_threads": 1},
    "augment": {"rotate_deg": 0, "scale": 0, "shift": 0, "brightness": 0},
    "output": {"report": False},  # it takes longer than such a training
}  # fmt: skip


def write_pages(folder: Path) -> Path:
    """Draw the pages, write the CSVs and the config, and return the config's path."""
    rng = np.random.default_rng(5)
    names = [f"page_{row:03d}.jpg" for row in range(COUNT)]
    labels = [LABELS[row % len(LABELS)] for row in range(COUNT)]
    (folder / "train").mkdir(parents=True)
    (folder / "test").mkdir()
    for name, label in zip(names, labels, strict=True):
        draw_page(label, rng).save(folder / "train" / name, quality=92)
    test_names = [f"test_{row:02d}.jpg" for row in rng.permutation(TEST_COUNT)]
    for row, name in enumerate(test_names):
        draw_page(LABELS[row % len(LABELS)], rng).save(folder / "test" / name, quality=92)
    folds = rng.permutation(np.repeat(np.arange(len(FOLD_SIZES)), FOLD_SIZES))
    _write_csv(folder / "train.csv", ["ID", "target"], zip(names, labels, strict=True))
    _write_csv(folder / "bare.csv", ["ID", "target"], zip([name[:-4] for name in names], labels, strict=True))
    _write_csv(folder / "folds.csv", ["ID", "target", "fold"], zip(names, labels, folds, strict=True))
    _write_csv(folder / "sample.csv", ["ID", "target"], ((name, LABELS[0]) for name in test_names))
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(_CONFIG), encoding="utf-8")
    return config


def draw_page(label: str, rng: np.random.Generator) -> Image.Image:
    """Draw a page of a class with its own size, position and noise."""
    width, height = (int(side) for side in rng.integers(56, 90, 2))
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    left, top = (int(start) for start in rng.integers(3, 12, 2))
    right, bottom = width - left, height - top
    if label == "card":
        pen.rectangle((left, top, right, bottom), fill=(60, 90, int(rng.integers(120, 220))))
    if label in ("form", "table"):
        for y in range(top, bottom, 8):
            pen.line((left, y, right, y), fill="black")
    if label == "table":
        for x in range(left, right, 10):
            pen.line((x, top, x, bottom), fill="black")
    if label == "letter":
        pen.ellipse((left, top, left + 14, top + 14), fill="red")
    pixels = np.asarray(image, dtype=np.int16) + rng.integers(-20, 20, (height, width, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Run:
    """The files that one command wrote, and how its ranks ended."""

    ranks: list[Rank]
    folder: Path  # holds logs/ and experiments/

    @property
    def root(self) -> Path:
        """The only run folder."""
        (root,) = self.folder.glob("experiments/*/*")
        return root

    @property
    def log(self) -> Path:
        """The newest log."""
        return max(self.folder.glob("logs/*.log"), key=lambda file: file.stat().st_mtime_ns)

    @property
    def lines(self) -> list[str]:
        """Lines of the newest command in the newest log (commands with the same run id share a log within a minute)."""
        start = ">> Logger started"
        return (start + self.log.read_text(encoding="utf-8").rpartition(start)[2]).splitlines()

    @property
    def codes(self) -> list[int | None]:
        """Exit codes, by rank; None for a rank that hung."""
        return [rank.code for rank in self.ranks]

    @property
    def stderr(self) -> str:
        """Standard error of all ranks."""
        return "".join(rank.stderr for rank in self.ranks)

    def predictions(self, fold: int) -> FoldPredictions:
        """Return the fold's verified predictions."""
        return read_predictions(self.root / "oof" / "parts" / f"fold{fold}.safetensors")

    def read_weights(self, fold: int) -> dict[str, bytes]:
        """Return the bytes of each tensor in the fold's verified best weights."""
        best = read_best(self.root / "ckpt" / f"best_fold{fold}.pth")
        return {name: tensor.numpy().tobytes() for name, tensor in best.state_dict.items()}

    def read_oof(self) -> bytes:
        """Return the bytes of oof_logits.npy."""
        return (self.root / "oof" / "oof_logits.npy").read_bytes()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.root / "metrics.jsonl").read_text().splitlines()]

    def list_step_losses(self, fold: int) -> list[float]:
        """Return the loss of each logged step of a fold."""
        matches = (re.match(rf"\[STEP .*fold={fold} .*loss=(\S+)", line) for line in self.lines)
        return [float(match[1]) for match in matches if match]

    def list_files(self) -> dict[str, str]:
        """Return each file of the run folder with its digest."""
        return {
            str(file.relative_to(self.root)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(self.root.rglob("*"))
            if file.is_file()
        }


@dataclass
class Trainer:
    """Start `doccls.train` on the tiny pages, each run in a folder of its own unless one is given."""

    config: Path
    workspace: Path
    environment: Mapping[str, str] = field(default_factory=dict)  # overrides the ranks' own, which hides GPUs
    _numbers: Any = field(default_factory=itertools.count)

    def new_folder(self) -> Path:
        """Return a folder that no run has used."""
        return self.workspace / f"run{next(self._numbers):02d}"

    def arguments(self, overrides: Sequence[str], folder: Path, run_id: str | None = None) -> list[str]:
        """Return the command line; CSV names are relative to the config."""
        options = ["--config", str(self.config)]
        for override in (*overrides, f"output.logs_dir={folder / 'logs'}", f"output.exp_dir={folder / 'experiments'}"):
            options += ["--set", override]
        return options if run_id is None else [*options, "--run-id", run_id]

    def run(
        self,
        *overrides: str,
        world_size: int = 1,
        folder: Path | None = None,
        run_id: str | None = None,
        program: str = "doccls.train:main",
    ) -> Run:
        """Train, and return however it ended."""
        folder = folder or self.new_folder()
        variables = {"DOCCLS_TEST_FOLDER": str(folder), **self.environment}
        arguments = self.arguments(overrides, folder, run_id)
        return Run(launch_ranks(program, arguments, folder / "console", world_size, variables), folder)

    def train(
        self,
        *overrides: str,
        world_size: int = 1,
        folder: Path | None = None,
        run_id: str | None = None,
        program: str = "doccls.train:main",
    ) -> Run:
        """Train; unless every rank succeeds, fail the test with the ranks' standard error."""
        run = self.run(*overrides, world_size=world_size, folder=folder, run_id=run_id, program=program)
        if run.codes != [0] * world_size:
            pytest.fail(f"exit codes {run.codes} (None: hung)\n{run.stderr}")
        return run


def _write_csv(path: Path, header: list[str], rows: Any) -> None:
    path.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
