"""How many samples of each class are in which fold, and what a user should know about that."""

from collections.abc import Sequence

import numpy as np

from doccls.data.manifest import format_examples

_MOST_CLASSES = 200


def count_classes(targets_N: np.ndarray, fold_of_N: np.ndarray, num_classes: int, num_folds: int) -> np.ndarray:
    """Samples of each class in each fold: (classes, folds) int64."""
    counts = np.zeros((num_classes, num_folds), dtype=np.int64)
    np.add.at(counts, (targets_N, fold_of_N), 1)
    return counts


def render_counts(classes: Sequence[str], counts_CF: np.ndarray) -> list[str]:
    """A line for each class with its samples in fold 0, 1, ...; of very many classes the first."""
    name_width = max(len(name) for name in classes[:_MOST_CLASSES])
    width = len(str(counts_CF.max()))
    lines = [
        f"{name:{name_width}} : {' '.join(f'{count:{width}}' for count in counts)}"
        for name, counts in zip(classes[:_MOST_CLASSES], counts_CF.tolist(), strict=False)
    ]
    beyond = len(classes) - _MOST_CLASSES
    return [*lines, f"... and {beyond} more classes"] if beyond > 0 else lines


def find_unseen(classes: Sequence[str], counts_CF: np.ndarray) -> list[str]:
    """What to warn of: classes all of whose samples lie in one fold, whose model has then never seen them."""
    unseen = []
    for number, fold in np.argwhere((counts_CF > 0) & (counts_CF == counts_CF.sum(axis=1, keepdims=True))).tolist():
        unseen.append(f"{classes[number]}: all {counts_CF[number, fold]} samples in fold {fold}")
    return [format_examples("classes that are validated by a model that never saw them", unseen)] if unseen else []


def find_scarce(
    classes: Sequence[str], targets_N: np.ndarray, group_of_N: np.ndarray, column: str, num_folds: int
) -> list[str]:
    """What to warn of: classes in fewer groups than there are folds; `group_of_N` numbers each sample's group."""
    pairs = np.unique(np.stack([targets_N, group_of_N]), axis=1)
    groups, samples = (np.bincount(found, minlength=len(classes)) for found in (pairs[0], targets_N))
    scarce = [
        f"{name} (groups: {groups[number]}, samples: {samples[number]})"
        for number, name in enumerate(classes)
        if 0 < groups[number] < num_folds
    ]
    what = f"classes in fewer groups of {column!r} than the {num_folds} folds, which some folds will lack"
    return [format_examples(what, scarce)] if scarce else []
