"""The choice of views from out-of-fold predictions, made only where its cross-fitted gain is real; pure.

Averaging views of a page helps a model that was not trained to see them as one page, and harms another. So the views
of a fold's rows are chosen on the rows of the other folds: no score has seen its own rows.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from doccls.oof.bootstrap import GAIN_LEVEL, bootstrap_gap, encode_groups
from doccls.oof.calibrate import assign_parts
from doccls.oof.metrics import count_macro_f1, probabilities
from doccls.oof.predictions import FoldPredictions
from doccls.oof.view_logits import FoldViews, list_usable

_FORMAT = "doccls-views-1"
TOLERANCE = 0.002  # of macro-F1: each view costs a pass over the pages, so a larger set must gain more than this


@dataclass(frozen=True)
class ViewRows:
    """Rows with the probabilities of each view, of models that were not trained on them."""

    views: tuple[str, ...]  # the first one is the page itself
    probs_VNC: np.ndarray  # (views, n, classes)
    targets_N: np.ndarray  # (n,) int64
    folds_N: np.ndarray  # (n,) int64: of which fold a row is
    unit_N: np.ndarray | None = None  # (n,) int64 from 0: the group of a row, if there are groups


@dataclass(frozen=True)
class ViewScore:
    """One view by itself, on all rows."""

    view: str
    macro_f1: float  # of its probabilities alone
    gain: float  # of their mean with those of the page itself, over the page itself


@dataclass(frozen=True)
class ViewChoice:
    """The views to use, and the figures that decided."""

    views: tuple[str, ...]  # to use
    selected: tuple[str, ...]  # on all rows; used if their gain is real
    part_views: tuple[tuple[str, ...], ...]  # selected for each part of the rows, on the rows of the other parts
    macro_f1: float  # of the page itself
    gain: float  # of `part_views` over the page itself, with its interval by paired bootstrap
    gain_low: float
    gain_high: float
    scores: tuple[ViewScore, ...]  # of each candidate
    decided_by: Literal["clean", "damaged"]
    folds: tuple[int, ...]  # whose predictions decided


def gather_rows(folds: Sequence[tuple[FoldPredictions, FoldViews]]) -> ViewRows:
    """Return the usable rows of all folds, in the order of train.csv, of the pages or copies that selected the epochs.

    There must be a row.
    """
    indices, targets, numbers, probs, groups = [], [], [], [], []
    for predictions, views in folds:
        usable = np.isin(predictions.indices_N, list_usable(predictions))
        assert np.array_equal(predictions.indices_N[usable], views.indices_N)
        logits_VNC = views.logits_VNC if predictions.info.selected_by == "clean" else views.damaged_logits_VNC
        assert logits_VNC is not None
        indices.append(views.indices_N)
        targets.append(predictions.targets_N[usable])
        numbers.append(np.full(len(views.indices_N), predictions.info.fold))
        probs.append(np.stack([probabilities(logits_NC) for logits_NC in logits_VNC]))
        if predictions.info.groups is not None:
            groups += [predictions.info.groups[place] for place in np.flatnonzero(usable).tolist()]
    order = np.argsort(np.concatenate(indices))
    return ViewRows(
        views=folds[0][1].info.views,
        probs_VNC=np.concatenate(probs, axis=1)[:, order],
        targets_N=np.concatenate(targets)[order],
        folds_N=np.concatenate(numbers)[order],
        unit_N=encode_groups([groups[place] for place in order.tolist()]) if groups else None,
    )


def choose_views(rows: ViewRows, decided_by: Literal["clean", "damaged"]) -> ViewChoice:
    """Choose the views to average: the page itself and others, or the page alone if the others' gain may be noise.

    There is one test, of the cross-fitted gain of the whole procedure, so that many candidates are no more likely to
    seem better by chance than one.
    """
    targets_N, num_classes = rows.targets_N, rows.probs_VNC.shape[2]
    part_N = assign_parts(rows.folds_N, rows.unit_N)
    part_places = []
    chosen_N = np.empty(len(targets_N), dtype=np.int64)
    for part in range(int(part_N.max()) + 1):
        others, own = _list_other_rows(part_N, part), np.flatnonzero(part_N == part)
        places = select_views(targets_N[others], rows.probs_VNC[:, others])
        chosen_N[own] = _predict(rows.probs_VNC[:, own], places)
        part_places.append(places)
    plain_N = rows.probs_VNC[0].argmax(axis=1)
    macro_f1 = count_macro_f1(targets_N, plain_N, num_classes)
    gain = count_macro_f1(targets_N, chosen_N, num_classes) - macro_f1
    low, high = bootstrap_gap(targets_N, chosen_N, plain_N, num_classes, rows.unit_N, GAIN_LEVEL)
    selected = _name(rows.views, select_views(targets_N, rows.probs_VNC))
    return ViewChoice(
        views=selected if low > 0 else rows.views[:1],
        selected=selected,
        part_views=tuple(_name(rows.views, places) for places in part_places),
        macro_f1=macro_f1,
        gain=gain,
        gain_low=low,
        gain_high=high,
        scores=_score_views(rows, macro_f1),
        decided_by=decided_by,
        folds=tuple(np.unique(rows.folds_N).tolist()),
    )


def select_views(targets_N: np.ndarray, probs_VNC: np.ndarray) -> tuple[int, ...]:
    """Return the places of a small set of views whose mean of probabilities has a high macro-F1; 0 is always in it.

    Greedy forward selection (Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004, without
    replacement): starting from view 0, the view that makes macro-F1 highest is added, until all are in, since two may
    help only together. Of these sets, the smallest within TOLERANCE of the best counts. Of equals, the first view wins.
    """
    if not len(targets_N):
        return (0,)
    num_classes = probs_VNC.shape[2]
    places, total_NC = [0], probs_VNC[0].astype(np.float64)
    scores = [count_macro_f1(targets_N, total_NC.argmax(axis=1), num_classes)]
    while len(places) < len(probs_VNC):
        left = [place for place in range(len(probs_VNC)) if place not in places]
        left_scores = [
            count_macro_f1(targets_N, (total_NC + probs_VNC[place]).argmax(axis=1), num_classes) for place in left
        ]
        best = int(np.argmax(left_scores))
        places.append(left[best])
        scores.append(left_scores[best])
        total_NC += probs_VNC[left[best]]
    size = 1 + int(np.argmax(np.asarray(scores) >= max(scores) - TOLERANCE))
    return tuple(places[:size])


def _list_other_rows(part_N: np.ndarray, part: int) -> np.ndarray:
    return np.flatnonzero(part_N != part)


def _predict(probs_VNC: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Return the most probable class (n,) by the mean over these views, summed in the order of selection."""
    total_NC = np.zeros(probs_VNC.shape[1:])
    for place in places:
        total_NC += probs_VNC[place]
    classes_N: np.ndarray = total_NC.argmax(axis=1)
    return classes_N


def _score_views(rows: ViewRows, macro_f1: float) -> tuple[ViewScore, ...]:
    num_classes = rows.probs_VNC.shape[2]
    scores = []
    for place, view in enumerate(rows.views):
        alone, both = (
            count_macro_f1(rows.targets_N, _predict(rows.probs_VNC, places), num_classes)
            for places in ((place,), (0, place))
        )
        scores.append(ViewScore(view, alone, both - macro_f1))
    return tuple(scores)


def _name(views: Sequence[str], places: Sequence[int]) -> tuple[str, ...]:
    return tuple(views[place] for place in places)


def describe_choice(choice: ViewChoice) -> list[str]:
    """Return lines that say what each view gains, what is used, and why."""
    folds = ", ".join(map(str, choice.folds))
    lines = [f"views by the {choice.decided_by} OOF predictions of folds {folds}: macro_f1={choice.macro_f1:.5f} of id"]
    lines += [
        f"view {score.view}: macro_f1={score.macro_f1:.5f} alone, {score.gain:+.4f} by averaging it with id"
        for score in choice.scores[1:]
    ]
    if choice.selected == choice.views[:1]:
        return [*lines, f"no view is selected: none, nor several together, raise macro_f1 by more than {TOLERANCE}"]
    gain = f"{choice.gain:+.4f}, {GAIN_LEVEL:.0%} interval [{choice.gain_low:+.3f}, {choice.gain_high:+.3f}]"
    decision = "used" if choice.gain_low > 0 else "not used: the gain may be noise, its interval is not above 0"
    selected = ",".join(choice.selected)
    return [*lines, f"views {selected}: macro_f1 changes by {gain} (cross-fitted): {decision}"]


def render_choice(choice: ViewChoice) -> str:
    """Render views.json."""
    return json.dumps({"format": _FORMAT, **asdict(choice), "gain_level": GAIN_LEVEL}, indent=2) + "\n"
