"""What a merged run is worth: macro-F1 with an interval, accuracy and each class's figures; pure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from doccls.oof.metrics import macro_f1

RESAMPLES = 1000
LEVEL = 0.95


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
    accuracy: float
    folds: tuple[FoldFigures, ...]
    classes: tuple[ClassFigures, ...]
    notes: tuple[str, ...] = ()
    """What to know when folds are compared."""


def summarize(
    targets_N: np.ndarray,
    logits_NC: np.ndarray,
    folds_N: np.ndarray,
    skipped: Sequence[int],
    classes: Sequence[str],
    notes: tuple[str, ...] = (),
) -> Summary:
    """The figures of out-of-fold logits (n, classes), their targets (n,) and the fold of each row (n,)."""
    used = np.setdiff1d(np.arange(len(targets_N)), skipped)
    targets, logits, folds = targets_N[used], logits_NC[used], folds_N[used]
    hits = logits.argmax(axis=1) == targets
    low, high = bootstrap_macro_f1(targets, logits.argmax(axis=1), len(classes))
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


def bootstrap_macro_f1(targets_N: np.ndarray, predictions_N: np.ndarray, num_classes: int) -> tuple[float, float]:
    """Percentile interval of macro-F1 over resamples of rows with replacement, from a fixed seed.

    Drawing n rows of n with replacement is drawing the confusion matrix's cells from a multinomial with their shares
    (Efron & Tibshirani, An Introduction to the Bootstrap, ch. 6 and 13), so that the cost does not grow with n.
    Rows are drawn one by one: where pages come in groups, the true interval is wider.
    """
    cells = confusion_matrix(targets_N, predictions_N, labels=np.arange(num_classes))
    true, predicted = np.nonzero(cells)
    counts = cells[true, predicted]
    draw = np.random.Generator(np.random.PCG64(0))
    scores = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = draw.multinomial(counts.sum(), counts / counts.sum())
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
