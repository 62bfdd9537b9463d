"""Folds' parts -> the merged OOF files, or a refusal that says which part and why."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from doccls.errors import UserError
from doccls.oof.metrics import probabilities
from doccls.oof.predictions import FoldPredictions, read_predictions, remove_resume_checkpoints
from doccls.oof.summary import Summary, render_summary, summarize
from doccls.run.metrics_log import write_metrics
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import remove_leftovers, write_array, write_text
from doccls.system.tensor_file import TensorFileError


@dataclass(frozen=True)
class MergedOof:
    """Row i is row i of train.csv."""

    logits_NC: np.ndarray
    """(n_samples, n_classes) float32; NaN in the rows of `skipped`."""
    targets_N: np.ndarray
    """(n_samples,) int64."""
    folds_N: np.ndarray
    """(n_samples,) int64."""
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    skipped: tuple[int, ...]
    """Rows without a usable image, left out of every figure."""
    groups: tuple[str, ...] | None = None
    """Of each row, where data.group_col is set."""


def merge_run(paths: RunPaths) -> Summary:
    """Merge the run's folds: write metrics.jsonl, oof_logits.npy, oof_targets.npy, oof.csv and, last, summary.json.

    Raises:
        UserError: no parts, or parts that are missing, damaged, foreign or in each other's way.
    """
    merged, summary = load_merged(paths)
    for path in (paths.metrics, paths.oof_logits, paths.oof_targets, paths.oof_csv, paths.summary):
        remove_leftovers(path)  # of a merge that was killed
    remove_resume_checkpoints(paths, sorted(set(merged.folds_N.tolist())))  # of folds killed when their part stood
    summary = replace(summary, notes=(*summary.notes, *write_metrics(paths)))
    write_array(paths.oof_logits, merged.logits_NC)
    write_array(paths.oof_targets, merged.targets_N)
    write_text(paths.oof_csv, render_csv(merged))
    write_text(paths.summary, render_summary(summary))
    return summary


def load_merged(paths: RunPaths) -> tuple[MergedOof, Summary]:
    """What merging the run's folds gives; nothing is written.

    Raises:
        UserError: no parts, or parts that are missing, damaged, foreign or in each other's way.
    """
    found = sorted(paths.predictions_dir.glob("fold*.safetensors"))
    if not found:
        raise UserError(f"no OOF parts in {paths.predictions_dir}: no fold of this run is finished")
    fold_predictions, problems = [], []
    for path in found:
        try:
            fold_predictions.append(read_predictions(path))
        except TensorFileError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    merged = merge_predictions(fold_predictions)
    summary = summarize(
        merged.targets_N,
        merged.logits_NC,
        merged.folds_N,
        merged.skipped,
        merged.classes,
        merged.groups,
        note_micro_batches(fold_predictions),
    )
    return merged, summary


def merge_predictions(fold_predictions: Sequence[FoldPredictions]) -> MergedOof:
    """Pure: every row from exactly one part.

    Raises:
        UserError: another fingerprint or class order, missing or repeated folds or rows; each with its count.
    """
    _check_kinship(fold_predictions)
    first = fold_predictions[0].info
    count = first.num_samples
    logits = np.full((count, len(first.classes)), np.nan, dtype=np.float32)
    targets = np.full(count, -1, dtype=np.int64)
    folds = np.full(count, -1, dtype=np.int64)
    ids, groups = np.empty(count, dtype=object), np.empty(count, dtype=object)
    seen = np.zeros(count, dtype=np.int64)
    for predictions in fold_predictions:
        rows = predictions.indices_N
        logits[rows], targets[rows], folds[rows] = predictions.logits_NC, predictions.targets_N, predictions.info.fold
        ids[rows], groups[rows] = predictions.info.ids, predictions.info.groups
        seen[rows] += 1
    if np.any(seen != 1):
        missing, repeated = np.flatnonzero(seen == 0), np.flatnonzero(seen > 1)
        raise UserError(
            f"the parts don't cover train.csv: {len(missing)} rows missing {missing[:5].tolist()}, "
            f"{len(repeated)} rows repeated {repeated[:5].tolist()}"
        )
    return MergedOof(
        logits_NC=logits,
        targets_N=targets,
        folds_N=folds,
        ids=tuple(ids),
        classes=first.classes,
        skipped=tuple(sorted(row for predictions in fold_predictions for row in predictions.info.skipped)),
        groups=None if first.groups is None else tuple(groups),
    )


def note_micro_batches(fold_predictions: Sequence[FoldPredictions]) -> tuple[str, ...]:
    """What there is to know if the folds were not trained with the same number of images at a time."""
    sizes = {predictions.info.fold: predictions.info.micro_batch_size for predictions in fold_predictions}
    if len(set(sizes.values())) < 2:
        return ()
    told = ", ".join(f"fold {fold}: {size or 'its share'}" for fold, size in sorted(sizes.items()))
    return (
        f"the folds' processes took different numbers of images at a time (train.micro_batch_size, {told}): "
        "BatchNorm normalised over these, and dropout, stochastic depth and Mixup drew for each",
    )


def render_csv(merged: MergedOof) -> str:
    """oof.csv: ID, fold, target, prediction and a probability for each class; empty where there is no prediction."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ID", "fold", "target", "prediction", *(f"prob_{label}" for label in merged.classes)])
    probs = probabilities(merged.logits_NC)
    skipped = set(merged.skipped)
    for row, sample_id in enumerate(merged.ids):
        known = [sample_id, int(merged.folds_N[row]), merged.classes[merged.targets_N[row]]]
        if row in skipped:
            writer.writerow([*known, "", *("" for _ in merged.classes)])
        else:
            best = merged.classes[int(merged.logits_NC[row].argmax())]
            writer.writerow([*known, best, *(f"{chance:.6f}" for chance in probs[row])])
    return text.getvalue()


def _check_kinship(fold_predictions: Sequence[FoldPredictions]) -> None:
    first = fold_predictions[0].info
    problems = []
    for name, what in (
        ("fingerprint", "the run's fingerprint (config, data, folds or weights differ)"),
        ("classes", "the class order"),
        ("precision", "the precision"),
        ("num_folds", "the number of folds"),
        ("num_samples", "the number of rows"),
    ):
        values: dict[object, list[int]] = {}
        for predictions in fold_predictions:
            values.setdefault(getattr(predictions.info, name), []).append(predictions.info.fold)
        if len(values) > 1:
            told = "; ".join(f"folds {folds}: {_shorten(value)}" for value, folds in values.items())
            problems.append(f"parts differ in {what}: {told}")
    folds = [predictions.info.fold for predictions in fold_predictions]
    missing = sorted(set(range(first.num_folds)) - set(folds))
    repeated = sorted({fold for fold in folds if folds.count(fold) > 1})
    foreign = sorted(set(folds) - set(range(first.num_folds)))
    if missing:
        problems.append(f"{len(missing)} of {first.num_folds} folds have no part: {', '.join(map(str, missing))}")
    if repeated:
        problems.append(f"folds with more than one part: {', '.join(map(str, repeated))}")
    if foreign:
        problems.append(f"folds that a run of {first.num_folds} folds does not have: {', '.join(map(str, foreign))}")
    if problems:
        raise UserError("the OOF parts can't be merged:\n" + "\n".join(f"- {problem}" for problem in problems))


def _shorten(value: object) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 400 else f"{text[:400]}..."
