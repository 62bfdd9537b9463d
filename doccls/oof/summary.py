"""Metrics of a merged run: macro-F1 with a confidence interval, accuracy, and per-class and per-fold values; pure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from doccls.oof.metrics import macro_f1

RESAMPLES = 1000
LEVEL = 0.95
_SELECTION = (
    "each fold's best epoch was selected by its score on these same rows, so the scores are optimistic: expect "
    "somewhat lower ones on unseen pages"
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
    notes: tuple[str, ...] = ()  # caveats for comparing folds
    selection: str = _SELECTION  # how the epochs were selected, and how that biases the scores


def summarize(
    targets_N: np.ndarray,
    logits_NC: np.ndarray,
    folds_N: np.ndarray,
    skipped: Sequence[int],
    classes: Sequence[str],
    groups: Sequence[str] | None = None,
    notes: tuple[str, ...] = (),
) -> Summary:
    """Compute the metrics of out-of-fold logits (n, classes), with their targets (n,) and the fold of each row (n,).

    With `groups` (one name per row) the interval comes from resampling groups, else from resampling rows.
    """
    used = np.setdiff1d(np.arange(len(targets_N)), skipped)
    targets, logits, folds = targets_N[used], logits_NC[used], folds_N[used]
    hits = logits.argmax(axis=1) == targets
    unit_N = None if groups is None else _encode_groups([groups[row] for row in used.tolist()])
    low, high = bootstrap_macro_f1(targets, logits.argmax(axis=1), len(classes), unit_N)
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
        folds=tuple(
            FoldMetrics(int(fold), int(rows.sum()), macro_f1(targets[rows], logits[rows]), float(hits[rows].mean()))
            for fold, rows in ((fold, folds == fold) for fold in np.unique(folds))
        ),
        classes=tuple(
            ClassMetrics(label, int(support), float(precision), float(recall), float(f1))
            for label, precision, recall, f1, support in zip(classes, *per_class, strict=True)
        ),
        notes=notes,
    )


def _encode_groups(groups: Sequence[str]) -> np.ndarray:
    """Encode group names as (n,) int64, numbered from 0 in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def bootstrap_macro_f1(
    targets_N: np.ndarray, predictions_N: np.ndarray, num_classes: int, unit_N: np.ndarray | None = None
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of macro-F1, from a fixed seed.

    The units that are resampled with replacement are rows, or, with `unit_N` ((n,) int64 from 0), the groups of rows
    with equal numbers: pages of one document tend to be right or wrong together, so resampling single pages would give
    too narrow an interval (Davison & Hinkley, Bootstrap Methods and their Application, 1997, sec. 3.8).

    Resampling n of n rows is one multinomial draw over the cells of the confusion matrix (Efron & Tibshirani, An
    Introduction to the Bootstrap, ch. 6 and 13), so its cost does not grow with n.
    """
    cells, cell_N, rows_K = np.unique(targets_N * num_classes + predictions_N, return_inverse=True, return_counts=True)
    true, predicted = np.divmod(cells, num_classes)
    count = 0 if unit_N is None else int(unit_N.max()) + 1
    rng = np.random.Generator(np.random.PCG64(0))
    scores = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        if unit_N is None:
            drawn = rng.multinomial(rows_K.sum(), rows_K / rows_K.sum())
        else:
            times_U = np.bincount(rng.integers(0, count, count), minlength=count)
            drawn = np.bincount(cell_N, times_U[unit_N], len(cells))
        in_target = np.bincount(true, drawn, num_classes)
        in_prediction = np.bincount(predicted, drawn, num_classes)
        hits = np.bincount(true[true == predicted], drawn[true == predicted], num_classes)
        present = in_target + in_prediction > 0  # as in `macro_f1`, an absent class is ignored
        scores[number] = np.mean(2 * hits[present] / (in_target + in_prediction)[present])
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def render_summary(summary: Summary) -> str:
    """Return summary.json; equal summaries give equal bytes."""
    return json.dumps(asdict(summary), indent=2, ensure_ascii=False) + "\n"


def list_scores(summary: Summary) -> list[str]:
    """Format the summary as log lines: one per class, one per fold, the notes, and last the overall scores."""
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
    lines += [f"note: {note}" for note in summary.notes]
    interval = f"[{summary.macro_f1_low:.3f}, {summary.macro_f1_high:.3f}]"
    lines.append(
        f"all folds macro_f1={summary.macro_f1:.5f} {summary.interval_level:.0%} interval {interval} "
        f"accuracy={summary.accuracy:.5f} rows={summary.num_samples}"
    )
    return [f"[OOF] {line}" for line in lines]
