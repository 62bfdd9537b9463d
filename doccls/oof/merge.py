"""Merge the folds' predictions into the OOF files, or report which folds can't be merged and why."""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from doccls.errors import UserError
from doccls.oof.metrics import probabilities
from doccls.oof.predictions import FoldPredictions, read_predictions, remove_resume_checkpoints
from doccls.oof.summary import DamagedCopies, Summary, render_summary, summarize
from doccls.oof.thresholds import Thresholds
from doccls.run.metrics_log import write_metrics
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import remove_leftovers, write_array, write_text
from doccls.system.lock import Lock, hold_lock
from doccls.system.tensor_file import TensorFileError

_MERGE_LIMIT_S = 600.0  # how long another process's merge may take


@dataclass(frozen=True)
class MergedOof:
    """The out-of-fold predictions of all folds; row i is row i of train.csv.

    If only finished folds were merged, the rows of the others are left out, and later rows move up.
    """

    logits_NC: np.ndarray  # (n_samples, n_classes) float32; NaN in the rows of `skipped`
    targets_N: np.ndarray  # (n_samples,) int64
    folds_N: np.ndarray  # (n_samples,) int64
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    skipped: tuple[int, ...]  # rows without a usable image, excluded from every metric
    fingerprint: str  # of the run
    groups: tuple[str, ...] | None = None  # of each row, if data.group_col is set
    damaged_logits_NC: np.ndarray | None = None  # like `logits_NC`, of damaged copies of the pages (valid.damage)

    def find_damaged_hits(self) -> np.ndarray | None:
        """Return whether the prediction for the damaged copy of each row is right, (n_samples,) bool; None without."""
        return None if self.damaged_logits_NC is None else self.damaged_logits_NC.argmax(axis=1) == self.targets_N


@contextmanager
def lock_merge(paths: RunPaths) -> Iterator[Lock]:
    """Hold the lock of the process that merges the run within the block; another one's merge is waited for.

    Raises:
        LockError: another process has been merging the run for ten minutes.
    """
    with hold_lock(paths.merge_lock, f"run {paths.run_id} is being merged", wait_s=_MERGE_LIMIT_S) as lock:
        yield lock


def merge_run(paths: RunPaths) -> Summary:
    """Merge the run's folds as `merge_locked` does; processes that do so at the same time take turns.

    Raises:
        UserError: another process merges the run for too long, or see `merge_locked`.
    """
    _find_predictions(paths)  # no lock is left in a folder that holds no run
    with lock_merge(paths) as lock:
        return merge_locked(paths, lock)


def merge_locked(paths: RunPaths, lock: Lock) -> Summary:
    """Merge the run's folds: write metrics.jsonl, oof_logits.npy, oof_targets.npy, oof.csv and, last, summary.json.

    With `valid.damage`, there is oof_logits_damaged.npy too. `lock` is that of `lock_merge`.

    Raises:
        UserError: fold predictions are missing, damaged, from another run or overlapping.
        LockError: this process was suspended for so long that another one merges the run.
    """
    merged, summary = load_merged(paths)
    lock.check()
    for path in (paths.metrics, paths.report):
        remove_leftovers(path)  # left by a merge that was killed
    # A fold that was killed right after writing its predictions still has its resume checkpoints.
    remove_resume_checkpoints(paths, sorted(set(merged.folds_N.tolist())))
    summary = replace(summary, notes=(*summary.notes, *write_metrics(paths)))
    write_merged(paths, merged, summary)
    return summary


def write_merged(paths: RunPaths, merged: MergedOof, summary: Summary) -> None:
    """Write the files in `oof/`, oof_logits_damaged.npy only if there are such logits, and, last, summary.json."""
    written = (paths.oof_logits, paths.oof_logits_damaged, paths.oof_targets, paths.oof_csv, paths.summary)
    for path in written:
        remove_leftovers(path)  # left by a merge that was killed
    write_array(paths.oof_logits, merged.logits_NC)
    if merged.damaged_logits_NC is not None:
        write_array(paths.oof_logits_damaged, merged.damaged_logits_NC)
    else:
        paths.oof_logits_damaged.unlink(missing_ok=True)  # of a blend that the damaged scores decided
    write_array(paths.oof_targets, merged.targets_N)
    write_text(paths.oof_csv, render_csv(merged))
    write_text(paths.summary, render_summary(summary))


def load_merged(paths: RunPaths, thresholds: Thresholds | None = None) -> tuple[MergedOof, Summary]:
    """Merge the run's folds in memory, without writing anything; thresholds are learned unless they are given.

    Raises:
        UserError: fold predictions are missing, damaged, from another run or overlapping.
    """
    fold_predictions = read_finished(paths)
    merged = merge_predictions(fold_predictions)
    return merged, summarize_folds(merged, fold_predictions, thresholds)


def read_finished(paths: RunPaths) -> list[FoldPredictions]:
    """Read the predictions of the run's finished folds.

    Raises:
        UserError: no fold has finished, or predictions are damaged.
    """
    fold_predictions, problems = [], []
    for path in _find_predictions(paths):
        try:
            fold_predictions.append(read_predictions(path))
        except TensorFileError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return fold_predictions


def _find_predictions(paths: RunPaths) -> list[Path]:
    found = paths.list_predictions()
    if not found:
        raise UserError(f"no fold predictions in {paths.predictions_dir}: no fold of this run has finished")
    return found


def summarize_folds(
    merged: MergedOof, fold_predictions: Sequence[FoldPredictions], thresholds: Thresholds | None = None
) -> Summary:
    """Compute the metrics of folds and of `merged`, their merged predictions; thresholds as for `load_merged`."""
    notes, first = (
        (*note_micro_batches(fold_predictions), *note_split_images(fold_predictions)),
        fold_predictions[0].info,
    )
    return summarize_merged(merged, notes, first.damage, first.selected_by, thresholds)


def summarize_merged(
    merged: MergedOof,
    notes: tuple[str, ...],
    damage: str,
    selected_by: Literal["clean", "damaged"],
    thresholds: Thresholds | None = None,
) -> Summary:
    """Compute the metrics; `damage` is the level of the damaged copies, if there are any.

    Thresholds are learned unless they are given.
    """
    copies = None
    if merged.damaged_logits_NC is not None:
        copies = DamagedCopies(damage, merged.damaged_logits_NC, selected_by == "damaged")
    return summarize(
        merged.targets_N,
        merged.logits_NC,
        merged.folds_N,
        merged.skipped,
        merged.classes,
        merged.groups,
        notes,
        copies,
        thresholds,
    )


def merge_predictions(fold_predictions: Sequence[FoldPredictions], finished_only: bool = False) -> MergedOof:
    """Take each row from the one fold that predicted it; pure.

    Args:
        fold_predictions: those of the finished folds.
        finished_only: whether folds may be missing; their rows are then left out.

    Raises:
        UserError: fingerprints or class orders differ, only some have damaged copies, or folds or rows are missing or
            repeated (with their counts).
    """
    _check_compatible(fold_predictions, finished_only)
    first = fold_predictions[0].info
    count = first.num_samples
    logits = np.full((count, len(first.classes)), np.nan, dtype=np.float32)
    damaged = None if fold_predictions[0].damaged_logits_NC is None else np.full_like(logits, np.nan)
    targets = np.full(count, -1, dtype=np.int64)
    folds = np.full(count, -1, dtype=np.int64)
    ids, groups = np.empty(count, dtype=object), np.empty(count, dtype=object)
    seen = np.zeros(count, dtype=np.int64)
    for predictions in fold_predictions:
        rows = predictions.indices_N
        logits[rows], targets[rows], folds[rows] = predictions.logits_NC, predictions.targets_N, predictions.info.fold
        ids[rows], groups[rows] = predictions.info.ids, predictions.info.groups
        seen[rows] += 1
        if damaged is not None:
            damaged[rows] = predictions.damaged_logits_NC
    used = np.flatnonzero(seen) if finished_only else np.arange(count)
    if np.any(seen[used] != 1):
        missing, repeated = np.flatnonzero(seen == 0), np.flatnonzero(seen > 1)
        raise UserError(
            f"the fold predictions don't cover train.csv: {len(missing)} rows missing {missing[:5].tolist()}, "
            f"{len(repeated)} rows repeated {repeated[:5].tolist()}"
        )
    skipped = sorted(row for predictions in fold_predictions for row in predictions.info.skipped)
    return MergedOof(
        logits_NC=logits[used],
        targets_N=targets[used],
        folds_N=folds[used],
        ids=tuple(ids[used]),
        classes=first.classes,
        skipped=tuple(np.searchsorted(used, skipped).tolist()),
        fingerprint=first.fingerprint,
        groups=None if first.groups is None else tuple(groups[used]),
        damaged_logits_NC=None if damaged is None else damaged[used],
    )


def note_micro_batches(fold_predictions: Sequence[FoldPredictions]) -> tuple[str, ...]:
    """Return a note if the folds were trained with different micro-batch sizes, else nothing."""
    sizes = {predictions.info.fold: predictions.info.micro_batch_size for predictions in fold_predictions}
    if len(set(sizes.values())) < 2:
        return ()
    listed = ", ".join(f"fold {fold}: {size or 'per-rank batch'}" for fold, size in sorted(sizes.items()))
    return (
        f"the folds were trained with different micro-batch sizes (train.micro_batch_size, {listed}): BatchNorm, "
        "dropout, stochastic depth and Mixup work per micro-batch, so the folds are not strictly comparable",
    )


def note_split_images(fold_predictions: Sequence[FoldPredictions]) -> tuple[str, ...]:
    """Return a note if some rows were validated by a model that trained on their image, else nothing."""
    counts = {predictions.info.fold: predictions.info.num_split for predictions in fold_predictions}
    if not any(counts.values()):
        return ()
    listed = ", ".join(f"fold {fold}: {count}" for fold, count in sorted(counts.items()) if count)
    return (
        f"{sum(counts.values())} rows were validated by a model that trained on their image, since the `fold` column "
        f"splits duplicates (data.on_duplicate: allow; {listed}): the scores are too high",
    )


def render_csv(merged: MergedOof) -> str:
    """Return oof.csv: ID, fold, target, prediction and class probabilities (the last two empty in skipped rows)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ID", "fold", "target", "prediction", *(f"prob_{label}" for label in merged.classes)])
    probs = probabilities(merged.logits_NC)
    skipped = set(merged.skipped)
    for row, sample_id in enumerate(merged.ids):
        cells = [sample_id, int(merged.folds_N[row]), merged.classes[merged.targets_N[row]]]
        if row in skipped:
            writer.writerow([*cells, "", *("" for _ in merged.classes)])
        else:
            best = merged.classes[int(merged.logits_NC[row].argmax())]
            writer.writerow([*cells, best, *(f"{prob:.6f}" for prob in probs[row])])
    return text.getvalue()


def _check_compatible(fold_predictions: Sequence[FoldPredictions], finished_only: bool) -> None:
    first = fold_predictions[0].info
    problems = []
    for name, what in (
        ("fingerprint", "the run's fingerprint (config, data, folds or weights differ)"),
        ("classes", "the class order"),
        ("precision", "the precision"),
        ("num_folds", "the number of folds"),
        ("num_samples", "the number of rows"),
        ("selected_by", "the score that selected their epochs (valid.select)"),
    ):
        values: dict[object, list[int]] = {}
        for predictions in fold_predictions:
            values.setdefault(getattr(predictions.info, name), []).append(predictions.info.fold)
        if len(values) > 1:
            listed = "; ".join(f"folds {folds}: {_shorten(value)}" for value, folds in values.items())
            problems.append(f"the folds differ in {what}: {listed}")
    folds = [predictions.info.fold for predictions in fold_predictions]
    damaged = [item.info.fold for item in fold_predictions if item.damaged_logits_NC is not None]
    if 0 < len(damaged) < len(folds):
        clean = [fold for fold in folds if fold not in damaged]
        problems.append(
            f"folds {damaged} were validated on damaged copies of their pages too (valid.damage), folds {clean} not"
        )
    missing = sorted(set(range(first.num_folds)) - set(folds))
    repeated = sorted({fold for fold in folds if folds.count(fold) > 1})
    unknown = sorted(set(folds) - set(range(first.num_folds)))
    if missing and not finished_only:
        problems.append(
            f"{len(missing)} of {first.num_folds} folds have no predictions: {', '.join(map(str, missing))}"
        )
    if repeated:
        problems.append(f"folds with more than one predictions file: {', '.join(map(str, repeated))}")
    if unknown:
        problems.append(f"folds outside 0 to {first.num_folds - 1}: {', '.join(map(str, unknown))}")
    if problems:
        raise UserError("the fold predictions can't be merged:\n" + "\n".join(f"- {problem}" for problem in problems))


def _shorten(value: object) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 400 else f"{text[:400]}..."
