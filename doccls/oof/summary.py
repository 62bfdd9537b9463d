"""Metrics of a merged run: macro-F1 with a confidence interval, accuracy, and per-class and per-fold values; pure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from doccls.config.paths import describe_error
from doccls.errors import UserError
from doccls.oof.bootstrap import LEVEL, RESAMPLES, bootstrap_gap, bootstrap_macro_f1, encode_groups
from doccls.oof.calibrate import Calibration, OofRows, cross_fit, measure_calibration
from doccls.oof.metrics import macro_f1
from doccls.oof.thresholds import Thresholds, find_thresholds
from doccls.system.atomic_files import read_bytes

_SELECTION = (
    "each fold's best epoch was selected by its score on these same rows, so the scores are optimistic: expect "
    "somewhat lower ones on unseen pages"
)
_SELECTION_BY_DAMAGED = (
    "each fold's best epoch was selected by its score on damaged copies of these same rows, so the scores are "
    "optimistic, most of all the damaged ones: expect somewhat lower ones on unseen pages"
)


@dataclass(frozen=True)
class FoldMetrics:
    """The metrics of one fold's best epoch on its validation rows."""

    fold: int
    num_samples: int
    macro_f1: float
    accuracy: float


@dataclass(frozen=True)
class ClassMetrics:
    """The metrics of one class, over the out-of-fold predictions of all rows."""

    label: str
    num_samples: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class DamagedCopies:
    """The predictions for damaged copies of all pages."""

    level: str  # of the damage: `light` or `scan`
    logits_NC: np.ndarray  # (n, classes), rows as those of the pages
    has_selected: bool  # whether the best epochs were selected by the score on these copies, not on the pages


@dataclass(frozen=True)
class DamagedMetrics:
    """The metrics on damaged copies of the pages, by the same epochs' weights, and how far they are below.

    Intervals as in `Summary`.
    """

    level: str  # of the damage: `light` or `scan`
    macro_f1: float
    macro_f1_low: float
    macro_f1_high: float
    gap: float  # macro-F1 of the pages minus that of their damaged copies
    gap_low: float
    gap_high: float
    accuracy: float
    folds: tuple[FoldMetrics, ...]


@dataclass(frozen=True)
class Summary:
    """The metrics over all rows that have a prediction.

    The interval from `macro_f1_low` to `macro_f1_high` holds `interval_level` of `interval_resamples` bootstrap
    resamples.
    """

    num_samples: int
    num_skipped: int  # rows without a usable image, excluded from every metric
    macro_f1: float
    macro_f1_low: float
    macro_f1_high: float
    interval_level: float
    interval_resamples: int
    interval_units: str  # what was resampled: rows, or groups if data.group_col is set
    accuracy: float
    folds: tuple[FoldMetrics, ...]
    classes: tuple[ClassMetrics, ...]
    calibration: dict[str, Calibration]  # `clean` and, with valid.damage, `damaged`
    thresholds: Thresholds  # learned from the score that selected the epochs
    notes: tuple[str, ...] = ()  # caveats for comparing folds
    selection: str = _SELECTION  # how the epochs were selected, and how that biases the scores
    damaged: DamagedMetrics | None = None  # with valid.damage


_SUMMARY = TypeAdapter(Summary)


def summarize(
    targets_N: np.ndarray,
    logits_NC: np.ndarray,
    folds_N: np.ndarray,
    skipped: Sequence[int],
    classes: Sequence[str],
    groups: Sequence[str] | None = None,
    notes: tuple[str, ...] = (),
    copies: DamagedCopies | None = None,
    thresholds: Thresholds | None = None,
) -> Summary:
    """Compute the metrics of out-of-fold logits (n, classes), with their targets (n,) and the fold of each row (n,).

    With `groups` (one name per row) the intervals come from resampling groups, else from resampling rows. With damaged
    copies, the summary also measures those. Thresholds are learned unless they are given.
    """
    from sklearn.metrics import precision_recall_fscore_support  # as in `doccls.oof.metrics`

    used = np.setdiff1d(np.arange(len(targets_N)), skipped)
    targets, logits, folds = targets_N[used], logits_NC[used], folds_N[used]
    if copies is not None:
        copies = replace(copies, logits_NC=copies.logits_NC[used])
    hits = logits.argmax(axis=1) == targets
    unit_N = None if groups is None else encode_groups([groups[row] for row in used.tolist()])
    low, high = bootstrap_macro_f1(targets, logits.argmax(axis=1), len(classes), unit_N)
    calibration, thresholds = _calibrate(OofRows(targets, logits, folds, unit_N), copies, thresholds)
    labels = np.arange(len(classes))
    per_class = precision_recall_fscore_support(targets, logits.argmax(axis=1), labels=labels, zero_division=0)
    return Summary(
        num_samples=len(used),
        num_skipped=len(targets_N) - len(used),
        macro_f1=macro_f1(targets, logits),
        macro_f1_low=low,
        macro_f1_high=high,
        interval_level=LEVEL,
        interval_resamples=RESAMPLES,
        interval_units="rows" if groups is None else "groups",
        accuracy=float(hits.mean()),
        folds=_measure_folds(targets, logits, folds),
        classes=tuple(
            ClassMetrics(label, int(support), float(precision), float(recall), float(f1))
            for label, precision, recall, f1, support in zip(classes, *per_class, strict=True)
        ),
        calibration=calibration,
        thresholds=thresholds,
        notes=notes,
        selection=_SELECTION_BY_DAMAGED if copies is not None and copies.has_selected else _SELECTION,
        damaged=None if copies is None else _measure_damaged(targets, logits, copies, folds, len(classes), unit_N),
    )


def _measure_folds(targets_N: np.ndarray, logits_NC: np.ndarray, folds_N: np.ndarray) -> tuple[FoldMetrics, ...]:
    hits = logits_NC.argmax(axis=1) == targets_N
    return tuple(
        FoldMetrics(int(fold), int(rows.sum()), macro_f1(targets_N[rows], logits_NC[rows]), float(hits[rows].mean()))
        for fold, rows in ((fold, folds_N == fold) for fold in np.unique(folds_N))
    )


def _calibrate(
    rows: OofRows, copies: DamagedCopies | None, thresholds: Thresholds | None
) -> tuple[dict[str, Calibration], Thresholds]:
    """Measure the calibration of all logits, and find thresholds for those that selected the epochs, unless given."""
    both = {"clean": rows}
    if copies is not None:
        both["damaged"] = replace(rows, logits_NC=copies.logits_NC)
    fits = {name: cross_fit(own) for name, own in both.items()}
    selecting = "damaged" if copies is not None and copies.has_selected else "clean"
    calibration = {name: measure_calibration(own, fits[name]) for name, own in both.items()}
    if thresholds is None:
        thresholds = find_thresholds(both[selecting], fits[selecting])
    return calibration, thresholds


def _measure_damaged(
    targets_N: np.ndarray,
    logits_NC: np.ndarray,
    copies: DamagedCopies,
    folds_N: np.ndarray,
    num_classes: int,
    unit_N: np.ndarray | None,
) -> DamagedMetrics:
    predictions, damaged = logits_NC.argmax(axis=1), copies.logits_NC.argmax(axis=1)
    low, high = bootstrap_macro_f1(targets_N, damaged, num_classes, unit_N)
    gap_low, gap_high = bootstrap_gap(targets_N, predictions, damaged, num_classes, unit_N)
    score = macro_f1(targets_N, copies.logits_NC)
    return DamagedMetrics(
        level=copies.level,
        macro_f1=score,
        macro_f1_low=low,
        macro_f1_high=high,
        gap=macro_f1(targets_N, logits_NC) - score,
        gap_low=gap_low,
        gap_high=gap_high,
        accuracy=float((damaged == targets_N).mean()),
        folds=_measure_folds(targets_N, copies.logits_NC, folds_N),
    )


def render_summary(summary: Summary) -> str:
    """Return summary.json, which has `damaged` only with damaged copies; equal summaries give equal bytes."""
    values = asdict(summary)
    if summary.damaged is None:
        del values["damaged"]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def read_summary(path: Path) -> Summary:
    """Read summary.json.

    Raises:
        UserError: it can't be read, is damaged, or another version of doccls wrote it.
    """
    try:
        return _SUMMARY.validate_json(read_bytes(path), strict=True)
    except OSError as error:
        raise UserError(describe_error(error, path, "file")) from error
    except ValueError as error:
        raise UserError(
            f"{path}: damaged, or another version of doccls wrote it: merge the run, or blend its members, again"
        ) from error


def list_scores(summary: Summary) -> list[str]:
    """Format the summary as log lines: per class, per fold, calibration, the notes, and last the overall scores.

    Scores on damaged copies follow those of the pages.
    """
    width = max(len("class"), *(len(row.label) for row in summary.classes))
    lines = [f"{'class':<{width}}  {'rows':>6}  precision  recall       f1"]
    lines += [
        f"{row.label:<{width}}  {row.num_samples:>6}  {row.precision:>9.4f}  {row.recall:>6.4f}  {row.f1:>7.4f}"
        for row in summary.classes
    ]
    lines += [
        f"fold={row.fold} macro_f1={row.macro_f1:.5f} accuracy={row.accuracy:.5f} rows={row.num_samples}"
        for row in summary.folds
    ]
    damaged = summary.damaged
    if damaged is not None:
        lines += [
            f"fold={row.fold}, damaged pages macro_f1={row.macro_f1:.5f} accuracy={row.accuracy:.5f} "
            f"rows={row.num_samples}"
            for row in damaged.folds
        ]
    level = f"{summary.interval_level:.0%} interval"
    lines += [_format_calibration(name, calibration) for name, calibration in summary.calibration.items()]
    lines.append(f"per-class thresholds: {describe_thresholds(summary.thresholds)}")
    lines += [f"note: {note}" for note in summary.notes]
    lines.append(
        f"all folds macro_f1={summary.macro_f1:.5f} {level} [{summary.macro_f1_low:.3f}, {summary.macro_f1_high:.3f}] "
        f"accuracy={summary.accuracy:.5f} rows={summary.num_samples}"
    )
    if damaged is not None:
        lines += [
            f"all folds, damaged pages macro_f1={damaged.macro_f1:.5f} "
            f"{level} [{damaged.macro_f1_low:.3f}, {damaged.macro_f1_high:.3f}] "
            f"accuracy={damaged.accuracy:.5f} rows={summary.num_samples}",
            f"clean minus damaged macro_f1={damaged.gap:.5f} {level} [{damaged.gap_low:.3f}, {damaged.gap_high:.3f}]",
        ]
    return [f"[OOF] {line}" for line in lines]


def _format_calibration(name: str, calibration: Calibration) -> str:
    changes = ", ".join(
        f"{what} {before:.3f} -> {after:.3f}"
        for what, before, after in (
            ("nll", calibration.nll, calibration.nll_calibrated),
            ("ece", calibration.ece, calibration.ece_calibrated),
            ("brier", calibration.brier, calibration.brier_calibrated),
        )
    )
    return f"temperature={calibration.temperature:.3f} {changes} ({name} pages; cross-fitted)"


def describe_thresholds(thresholds: Thresholds) -> str:
    """Describe what the thresholds gain, and whether they are used."""
    if thresholds.gain is None:
        return str(thresholds.reason)
    use = "not used" if thresholds.offsets is None else "used by predict"
    return (
        f"macro_f1 changes by {thresholds.gain:+.4f}, {thresholds.gain_level:.0%} interval "
        f"[{thresholds.gain_low:+.3f}, {thresholds.gain_high:+.3f}] (cross-fitted): {use}"
    )
