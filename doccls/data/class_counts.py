"""Samples per class and fold, and the warnings about classes that the folds cover badly."""

from collections.abc import Sequence

import numpy as np

from doccls.data.messages import format_examples

_MAX_CLASSES_SHOWN = 200
_MAX_NAME_LENGTH = 60


def count_classes(targets_N: np.ndarray, fold_of_N: np.ndarray, num_classes: int, num_folds: int) -> np.ndarray:
    """Count the samples of each class in each fold, as a (classes, folds) int64 array."""
    counts = np.zeros((num_classes, num_folds), dtype=np.int64)
    np.add.at(counts, (targets_N, fold_of_N), 1)
    return counts


def render_counts(classes: Sequence[str], counts_CF: np.ndarray) -> list[str]:
    """Render one line per class with its sample counts in fold 0, 1, ..., for at most 200 classes."""
    names = [name if len(name) <= _MAX_NAME_LENGTH else f"{name[:_MAX_NAME_LENGTH]}..." for name in classes]
    name_width = max(len(name) for name in names[:_MAX_CLASSES_SHOWN])
    width = len(str(counts_CF.max()))
    lines = [
        f"{name:{name_width}} : {' '.join(f'{count:{width}}' for count in counts)}"
        for name, counts in zip(names[:_MAX_CLASSES_SHOWN], counts_CF.tolist(), strict=False)
    ]
    num_hidden = len(classes) - _MAX_CLASSES_SHOWN
    return [*lines, f"... and {num_hidden} more classes"] if num_hidden > 0 else lines


def find_unseen(classes: Sequence[str], counts_CF: np.ndarray) -> list[str]:
    """Return a warning if some classes have all their samples in one fold: its model never trains on them."""
    unseen = []
    for label, fold in np.argwhere((counts_CF > 0) & (counts_CF == counts_CF.sum(axis=1, keepdims=True))).tolist():
        unseen.append(f"{classes[label]}: all {counts_CF[label, fold]} samples in fold {fold}")
    return [format_examples("classes validated by a model that never trained on them", unseen)] if unseen else []


def find_scarce(
    classes: Sequence[str], targets_N: np.ndarray, group_of_N: np.ndarray, column: str, num_folds: int
) -> list[str]:
    """Return a warning if some classes occur in fewer groups than there are folds.

    `group_of_N` holds each sample's group number.
    """
    pairs = np.unique(np.stack([targets_N, group_of_N]), axis=1)
    groups, samples = (np.bincount(targets, minlength=len(classes)) for targets in (pairs[0], targets_N))
    scarce = [
        f"{name} (groups: {groups[label]}, samples: {samples[label]})"
        for label, name in enumerate(classes)
        if 0 < groups[label] < num_folds
    ]
    heading = f"classes in fewer groups of {column!r} than the {num_folds} folds (missing from some folds)"
    return [format_examples(heading, scarce)] if scarce else []
