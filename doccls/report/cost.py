"""What it took to train a run: epochs, time, memory, devices, and the size of its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from doccls.config.paths import describe_error, is_file
from doccls.config.snapshot import read_snapshot
from doccls.errors import UserError
from doccls.report.inputs import ReportInputs
from doccls.run.metrics_log import EpochMetrics, read_metrics
from doccls.run.paths import RunPaths


@dataclass(frozen=True)
class Cost:
    """The cost of a run, or of the runs of a blend together; only what their files record."""

    num_epochs: tuple[int, ...]  # of each fold
    fold_times_s: tuple[float, ...]  # of each fold: the sum over its epochs
    peak_mem_MiB: float | None
    devices: tuple[str, ...]
    world_sizes: tuple[int, ...]  # processes per fold; several only if the runs of a blend differ
    weights_bytes: int  # of all files of weights
    num_weights: int
    missing: tuple[str, ...] = ()  # runs of a blend whose folders are no longer beside it


def read_cost(inputs: ReportInputs) -> Cost:
    """Read the cost of a run, or add up those of a blend's runs.

    Raises:
        UserError: a file of them can't be read.
    """
    if not inputs.members:
        return add_up([_measure(inputs.paths, inputs.epochs, inputs.snapshot)])
    costs, missing = [], []
    for member in inputs.members:
        paths = RunPaths((inputs.paths.root / member.path).resolve())
        if paths.list_fold_metrics() or paths.list_best_checkpoints():
            snapshot = read_snapshot(paths.snapshot) if is_file(paths.snapshot) else None
            try:
                epochs, _ = read_metrics(paths)
            except OSError as error:
                raise UserError(describe_error(error, Path(error.filename or paths.metrics_dir), "file")) from error
            costs.append(_measure(paths, epochs, snapshot))
        else:
            missing.append(paths.run_id)
    return add_up(costs, missing)


def add_up(costs: Sequence[Cost], missing: Sequence[str] = ()) -> Cost:
    """Add up the costs of runs; pure."""
    peaks = [cost.peak_mem_MiB for cost in costs if cost.peak_mem_MiB is not None]
    return Cost(
        num_epochs=tuple(epochs for cost in costs for epochs in cost.num_epochs),
        fold_times_s=tuple(time_s for cost in costs for time_s in cost.fold_times_s),
        peak_mem_MiB=max(peaks, default=None),
        devices=tuple(dict.fromkeys(device for cost in costs for device in cost.devices)),
        world_sizes=tuple(dict.fromkeys(size for cost in costs for size in cost.world_sizes)),
        weights_bytes=sum(cost.weights_bytes for cost in costs),
        num_weights=sum(cost.num_weights for cost in costs),
        missing=tuple(missing),
    )


def _measure(paths: RunPaths, epochs: Sequence[EpochMetrics], snapshot: dict[str, Any] | None) -> Cost:
    folds = [list(rows) for _, rows in groupby(epochs, key=lambda row: row.fold)]
    provenance = {} if snapshot is None else snapshot["provenance"]
    device, world_size = provenance.get("device"), provenance.get("world_size")
    sizes = [_measure_file(path) for path in paths.list_best_checkpoints()]
    return Cost(
        num_epochs=tuple(map(len, folds)),
        fold_times_s=tuple(sum(row.time_s for row in rows) for rows in folds),
        peak_mem_MiB=max((row.mem_MiB for row in epochs), default=None),
        devices=tuple(map(str, device)) if isinstance(device, list) else (),
        world_sizes=(world_size,) if isinstance(world_size, int) else (),
        weights_bytes=sum(sizes),
        num_weights=len(sizes),
    )


def _measure_file(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(describe_error(error, path, "file")) from error
