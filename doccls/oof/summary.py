"""What a merged run is worth: macro-F1 with an interval, accuracy and each class's figures; pure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from doccls.oof.metrics import macro_f1

RESAMPLES = 1000
LEVEL = 0.95
_SELECTED = (
    "each fold's epoch was selected by its score on these very rows: on pages that played no part in that, the figures "
    "would be somewhat lower"
)


@dataclass(frozen=True)
class FoldFigures:
    """One fold's best epoch on its validation rows."""

    fold: int
    num_samples: int
    macro_f1: float
    accuracy: float


@dataclass(frozen=True)
class ClassFigures:
    """One class, over the out-of-fold predictions of all rows."""

    label: str
    num_samples: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Summary:
    """Figures over all rows that have a prediction."""

    num_samples: int
    num_skipped: int
    """Rows without a usable image, in no figure."""
    macro_f1: float
    macro_f1_low: float
    """Lower end of the interval that holds `interval_level` of `interval_resamples` bootstrap resamples."""
    macro_f1_high: float
    interval_level: float
    interval_resamples: int
    interval_units: str
    """What was drawn with replacement: rows, or, where data.group_col is set, groups."""
    accuracy: float
    folds: tuple[FoldFigures, ...]
    classes: tuple[ClassFigures, ...]
    notes: tuple[str, ...] = ()
    """What to know when folds are compared."""
    selection: str = _SELECTED
    """How the epochs were selected, and what that does to the figures."""


def summarize(
    targets_N: np.ndarray,
    logits_NC: np.ndarray,
    folds_N: np.ndarray,
    skipped: Sequence[int],
    classes: Sequence[str],
    groups: Sequence[str] | None = None,
    notes: tuple[str, ...] = (),
) -> Summary:
    """The figures of out-of-fold logits (n, classes), their targets (n,) and the fold of each row (n,).

    With `groups`, each row's, the interval is of resamples of groups, else of rows.
    """
    used = np.setdiff1d(np.arange(len(targets_N)), skipped)
    targets, logits, folds = targets_N[used], logits_NC[used], folds_N[used]
    hits = logits.argmax(axis=1) == targets
    unit_N = None if groups is None else _number([groups[row] for row in used.tolist()])
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
            FoldFigures(int(fold), int(rows.sum()), macro_f1(targets[rows], logits[rows]), float(hits[rows].mean()))
            for fold, rows in ((fold, folds == fold) for fold in np.unique(folds))
        ),
        classes=tuple(
            ClassFigures(label, int(support), float(precision), float(recall), float(f1))
            for label, precision, recall, f1, support in zip(classes, *per_class, strict=True)
        ),
        notes=notes,
    )


def _number(groups: Sequence[str]) -> np.ndarray:
    """(n,) int64: equal names have one number, from 0 upward in the order in which they come."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def bootstrap_macro_f1(
    targets_N: np.ndarray, predictions_N: np.ndarray, num_classes: int, unit_N: np.ndarray | None = None
) -> tuple[float, float]:
    """Percentile interval of macro-F1 over resamples of units with replacement, from a fixed seed.

    Units are rows, or, with `unit_N`, (n,) int64 from 0 upward, rows of one number: pages of one document tend to be
    right or wrong together, so that drawing them one by one would give too narrow an interval (Davison & Hinkley,
    Bootstrap Methods and their Application, 1997, sec. 3.8).

    Drawing n rows of n with replacement is drawing the confusion matrix's cells from a multinomial with their shares
    (Efron & Tibshirani, An Introduction to the Bootstrap, ch. 6 and 13), so that the cost does not grow with n.
    """
    cells, cell_N, rows_K = np.unique(targets_N * num_classes + predictions_N, return_inverse=True, return_counts=True)
    true, predicted = np.divmod(cells, num_classes)
    count = 0 if unit_N is None else int(unit_N.max()) + 1
    draw = np.random.Generator(np.random.PCG64(0))
    scores = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        if unit_N is None:
            drawn = draw.multinomial(rows_K.sum(), rows_K / rows_K.sum())
        else:
            times_U = np.bincount(draw.integers(0, count, count), minlength=count)
            drawn = np.bincount(cell_N, times_U[unit_N], len(cells))
        in_target = np.bincount(true, drawn, num_classes)
        in_prediction = np.bincount(predicted, drawn, num_classes)
        hits = np.bincount(true[true == predicted], drawn[true == predicted], num_classes)
        present = in_target + in_prediction > 0  # as in `macro_f1`: a class that is nowhere does not count
        scores[number] = np.mean(2 * hits[present] / (in_target + in_prediction)[present])
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def render_summary(summary: Summary) -> str:
    """summary.json; the same figures give the same bytes."""
    return json.dumps(asdict(summary), indent=2, ensure_ascii=False) + "\n"


def list_scores(summary: Summary) -> list[str]:
    """The summary in lines for a log: a row a class, a row a fold, notes, and last the whole."""
    width = max(len("class"), *(len(one.label) for one in summary.classes))
    lines = [f"{'class':<{width}}  {'rows':>6}  precision  recall       f1"]
    lines += [
        f"{one.label:<{width}}  {one.num_samples:>6}  {one.precision:>9.4f}  {one.recall:>6.4f}  {one.f1:>7.4f}"
        for one in summary.classes
    ]
    lines += [
        f"fold={one.fold} macro_f1={one.macro_f1:.5f} accuracy={one.accuracy:.5f} rows={one.num_samples}"
        for one in summary.folds
    ]
    lines += [f"note: {note}" for note in summary.notes]
    interval = f"[{summary.macro_f1_low:.3f}, {summary.macro_f1_high:.3f}]"
    lines.append(
        f"all folds macro_f1={summary.macro_f1:.5f} {summary.interval_level:.0%} interval {interval} "
        f"accuracy={summary.accuracy:.5f} rows={summary.num_samples}"
    )
    return [f"[OOF] {line}" for line in lines]
