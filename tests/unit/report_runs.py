"""A finished run of drawn numbers, with images and logs, that was never trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from doccls.config import Config, render_snapshot
from doccls.oof.merge import merge_run
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, write_predictions
from doccls.run.metrics_log import EpochMetrics, write_fold_metrics
from doccls.run.paths import RunPaths

COUNT, FOLDS = 30, 3
CLASSES = ("cat", "dog", "fish", "owl")  # no page is an owl
TARGETS = np.arange(COUNT) % 3
FOLD_OF = np.arange(COUNT) // 10
IDS = tuple(f"page{row:02}.jpg" for row in range(COUNT))


def draw_logits(seed: int = 0, noise: float = 2.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, noise, (COUNT, len(CLASSES)))
    logits[np.arange(COUNT), TARGETS] += 2
    return logits.astype(np.float32)


def write_run(
    folder: Path,
    ids: Sequence[str] = IDS,
    classes: Sequence[str] = CLASSES,
    skipped: Sequence[int] = (),
    is_damaged: bool = True,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> RunPaths:
    """Write the images, config, logs and fold predictions of a run, and merge it."""
    paths = RunPaths(folder / "experiments" / "20260101" / f"tiny{seed}")
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for row, name in enumerate(IDS):
        page = np.full((60, 40, 3), 255, np.uint8)
        page[10:30, 5:35] = (row * 37 % 256, row * 91 % 256, row * 53 % 256)
        Image.fromarray(page).save(folder / "train" / name)
    config = Config.model_validate(
        {
            "data": {"train_csv": "train.csv", "image_dir_train": "train", "store": "off", "folds": FOLDS},
            "output": {"exp_dir": "experiments", "logs_dir": "logs"},
        },
        context={"base": folder},
    )
    provenance = {
        "run_id": paths.run_id, "started": "2026-01-01T10:11:12", "fingerprint": f"fingerprint-{seed}",
        "data_digest": "data", "folds_digest": "folds",
    }  # fmt: skip
    paths.snapshot.parent.mkdir(parents=True)
    paths.snapshot.write_text(render_snapshot(config, provenance), encoding="utf-8")
    clean, damaged = draw_logits(seed), draw_logits(seed + 100, 3)
    clean[list(skipped)] = damaged[list(skipped)] = np.nan
    for fold in range(FOLDS):
        rows = np.flatnonzero(fold == FOLD_OF)
        info = PredictionsInfo(
            f"fingerprint-{seed}", fold, FOLDS, COUNT, tuple(classes), tuple(ids[row] for row in rows),
            tuple(row for row in skipped if row in rows), 1, 0.5,
            groups=None if groups is None else tuple(groups[row] for row in rows),
            damage="scan" if is_damaged else "none", macro_f1_damaged=0.25 if is_damaged else None,
        )  # fmt: skip
        write_predictions(
            paths.predictions(fold),
            FoldPredictions(info, rows, clean[rows], TARGETS[rows], damaged[rows] if is_damaged else None),
        )
        epochs = [
            EpochMetrics(
                fold, epoch, 2 / epoch, 2.2 / epoch, 0.2 * epoch, 0.001, 1.0, 100.0, 0.2 * epoch, "raw",
                0.1 * epoch if is_damaged else None,
            )
            for epoch in (1, 2, 3)
        ]  # fmt: skip
        write_fold_metrics(paths, epochs)
    merge_run(paths)
    return paths
