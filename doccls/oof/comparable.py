"""Whether the out-of-fold predictions of several runs are of the same rows and damaged copies; pure."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from doccls.oof.merge import MergedOof

_COLUMNS: dict[str, Callable[[MergedOof], Sequence[object]]] = {
    "the IDs": lambda merged: merged.ids,
    "the labels": lambda merged: merged.targets_N.tolist(),
    "the folds": lambda merged: merged.folds_N.tolist(),
    "the rows without a usable image": lambda merged: np.isin(range(len(merged.ids)), merged.skipped).tolist(),
    "the groups": lambda merged: merged.groups or [None] * len(merged.ids),
}
FOLDS, GROUPS = "the folds", "the groups"  # in which runs may differ that are compared, not blended


@dataclass(frozen=True)
class Damage:
    """How the damaged copies were made on which a run was also validated."""

    run_id: str
    level: str | None  # `light` or `scan`; None without damaged copies
    version: str | None  # of the damage; None if it isn't recorded


def find_differences(first: MergedOof, other: MergedOof, ignored: Collection[str] = ()) -> list[str]:
    """Return in which of its classes and rows a run differs from the first one; `ignored` may have FOLDS and GROUPS."""
    if other.classes != first.classes:
        is_order = sorted(other.classes) == sorted(first.classes)
        return [f"the classes are {'in another order' if is_order else 'others'}: {', '.join(other.classes)}"]
    if len(other.ids) != len(first.ids):
        return [f"{len(other.ids)} rows instead of {len(first.ids)}"]
    problems = []
    for what, read in _COLUMNS.items():
        if what in ignored:
            continue
        ours, theirs = read(first), read(other)
        differing = [row for row in range(len(first.ids)) if ours[row] != theirs[row]]
        if differing:
            example = f"first in row {differing[0]}, ID {first.ids[differing[0]]!r}"
            problems.append(f"{what} differ in {len(differing)} of {len(first.ids)} rows ({example})")
    return problems


def find_damage_problem(runs: Sequence[Damage]) -> str | None:
    """Return why the runs' damaged copies are not the same; None if they are, or no run has any.

    Versions of the damage are compared where they are known.
    """
    levels = {run.level for run in runs}
    if levels == {None}:
        return None
    if len(levels) > 1:
        listed = ", ".join(f"{run.run_id}: {run.level or 'none'}" for run in runs)
        if None in levels:
            return f"only some of the runs were validated on damaged copies of their pages (valid.damage: {listed})"
        return f"the runs were validated on differently damaged copies of their pages (valid.damage: {listed})"
    known = [run for run in runs if run.version is not None]
    if len({run.version for run in known}) > 1:
        listed = ", ".join(f"{run.run_id}: {run.version}" for run in known)
        return (
            "the runs were validated on copies that different versions of doccls damaged (damage_version in "
            f"config.yaml: {listed})"
        )
    return None
