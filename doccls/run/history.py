"""metrics.jsonl: a line an epoch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from doccls.run.artifacts import write_text
from doccls.run.paths import RunPaths


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl."""

    fold: int
    epoch: int
    """1-based."""
    train_loss: float
    valid_loss: float
    macro_f1: float
    lr: float
    time_s: float
    mem_MiB: float


def write_fold_metrics(paths: RunPaths, rows: Sequence[EpochMetrics]) -> None:
    """Write one fold's epochs so far, and metrics.jsonl anew from all folds. The main process calls."""
    assert rows
    write_text(paths.fold_metrics(rows[0].fold), "".join(json.dumps(asdict(row)) + "\n" for row in rows))
    write_metrics(paths)


def write_metrics(paths: RunPaths) -> None:
    """metrics.jsonl from every fold's file, sorted by (fold, epoch)."""
    lines = [line for file in paths.metrics_dir.glob("fold*.jsonl") for line in file.read_text().splitlines()]
    rows = sorted((json.loads(line) for line in lines), key=lambda row: (row["fold"], row["epoch"]))
    write_text(paths.metrics, "".join(json.dumps(row) + "\n" for row in rows))
