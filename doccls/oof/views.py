"""The choice of views and of BatchNorm statistics from out-of-fold predictions, where its gain is real.

Averaging views of a page helps a model that was not trained to see them as one page, and harms another; statistics of
damaged pages likewise. So the setting of a fold's rows is chosen on the rows of the other folds: no score has seen its
own rows.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from doccls.errors import UserError
from doccls.oof.bootstrap import GAIN_LEVEL, bootstrap_gap, encode_groups
from doccls.oof.calibrate import assign_parts
from doccls.oof.metrics import count_macro_f1, probabilities
from doccls.oof.predictions import FoldPredictions, is_merged
from doccls.oof.view_logits import FoldViews, list_usable
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import read_text, write_text

_FORMAT = "doccls-views-2"
TOLERANCE = 0.002  # of macro-F1: each view costs a pass over the pages, so a larger set must gain more than this


@dataclass(frozen=True)
class Setting:
    """How models predict a page: the views that are averaged, and the BatchNorm statistics."""

    views: tuple[str, ...]
    prior: int | None = None  # strength of the training's statistics beside those of the pages; None: no others

    @property
    def text(self) -> str:
        """The setting in words."""
        views = f"{'views' if len(self.views) > 1 else 'view'} {','.join(self.views)}"
        return views if self.prior is None else f"{views}, BatchNorm prior {self.prior}"


PLAIN = Setting(("id",))


@dataclass(frozen=True)
class ViewRows:
    """Rows with the probabilities of each view and each kind of BatchNorm statistics, of models not trained on them."""

    views: tuple[str, ...]  # the first one is the page itself
    priors: tuple[int | None, ...]  # as in Setting
    probs_PVNC: np.ndarray  # (priors, views, n, classes)
    targets_N: np.ndarray  # (n,) int64
    folds_N: np.ndarray  # (n,) int64: of which fold a row is
    unit_N: np.ndarray | None = None  # (n,) int64 from 0: the group of a row, if there are groups

    def name(self, places: "_Places") -> Setting:
        """Return the setting at these places."""
        prior, views = places
        return Setting(tuple(self.views[place] for place in views), self.priors[prior])


_Places = tuple[int, tuple[int, ...]]  # of a prior and of views, in ViewRows


@dataclass(frozen=True)
class CandidateScore:
    """One candidate by itself, on all rows."""

    setting: Setting
    macro_f1: float
    gain: float  # of a view: of its mean with the page itself; else of the candidate; over the plain setting


@dataclass(frozen=True)
class SettingChoice:
    """The setting to use, and the figures that decided."""

    used: Setting
    plain: Setting  # which is used if nothing else gains
    selected: Setting  # on all rows; used if its gain is real
    part_selected: tuple[Setting, ...]  # for each part of the rows, on the rows of the other parts
    macro_f1: float  # of the plain setting
    gain: float  # of `part_selected` over the plain setting, with its interval by paired bootstrap
    gain_low: float
    gain_high: float
    scores: tuple[CandidateScore, ...]
    decided_by: Literal["clean", "damaged"]
    folds: tuple[int, ...]  # whose predictions decided


def stack_folds(
    folds: Sequence[tuple[FoldPredictions, Sequence[FoldViews]]], priors: tuple[int | None, ...]
) -> ViewRows:
    """Return the usable rows of all folds, in the order of train.csv; a fold has its views with each of `priors`.

    There must be a row.
    """
    indices, targets, numbers, probs, groups = [], [], [], [], []
    for predictions, by_prior in folds:
        usable = np.isin(predictions.indices_N, list_usable(predictions))
        assert all(np.array_equal(predictions.indices_N[usable], views.indices_N) for views in by_prior)
        indices.append(predictions.indices_N[usable])
        targets.append(predictions.targets_N[usable])
        numbers.append(np.full(np.count_nonzero(usable), predictions.info.fold))
        probs.append(np.stack([[probabilities(logits_NC) for logits_NC in views.logits_VNC] for views in by_prior]))
        if predictions.info.groups is not None:
            groups += [predictions.info.groups[place] for place in np.flatnonzero(usable).tolist()]
    order = np.argsort(np.concatenate(indices))
    return ViewRows(
        views=folds[0][1][0].info.views,
        priors=priors,
        probs_PVNC=np.concatenate(probs, axis=2)[:, :, order],
        targets_N=np.concatenate(targets)[order],
        folds_N=np.concatenate(numbers)[order],
        unit_N=encode_groups([groups[place] for place in order.tolist()]) if groups else None,
    )


def choose_setting(rows: ViewRows, decided_by: Literal["clean", "damaged"], keeps_views: bool = False) -> SettingChoice:
    """Choose the setting to use: the plain one if the gain of the selected one may be noise.

    The plain setting is the page itself, or all views if `keeps_views`, with the first prior. There is one test, of the
    cross-fitted gain of the whole procedure, so that many candidates are no more likely to seem better by chance than
    one.
    """
    targets_N, num_classes = rows.targets_N, rows.probs_PVNC.shape[3]
    part_N = assign_parts(rows.folds_N, rows.unit_N)
    part_selected = []
    chosen_N = np.empty(len(targets_N), dtype=np.int64)
    for part in range(int(part_N.max()) + 1):
        others, own = _list_other_rows(part_N, part), np.flatnonzero(part_N == part)
        places = select_setting(targets_N[others], rows.probs_PVNC[:, :, others], keeps_views)
        chosen_N[own] = _predict(rows.probs_PVNC[:, :, own], places)
        part_selected.append(rows.name(places))
    plain = _find_plain(rows, keeps_views)
    plain_N = _predict(rows.probs_PVNC, plain)
    macro_f1 = count_macro_f1(targets_N, plain_N, num_classes)
    gain = count_macro_f1(targets_N, chosen_N, num_classes) - macro_f1
    low, high = bootstrap_gap(targets_N, chosen_N, plain_N, num_classes, rows.unit_N, GAIN_LEVEL)
    selected = rows.name(select_setting(targets_N, rows.probs_PVNC, keeps_views))
    return SettingChoice(
        used=selected if low > 0 else rows.name(plain),
        plain=rows.name(plain),
        selected=selected,
        part_selected=tuple(part_selected),
        macro_f1=macro_f1,
        gain=gain,
        gain_low=low,
        gain_high=high,
        scores=_score_candidates(rows, plain, macro_f1),
        decided_by=decided_by,
        folds=tuple(np.unique(rows.folds_N).tolist()),
    )


def select_setting(targets_N: np.ndarray, probs_PVNC: np.ndarray, keeps_views: bool = False) -> _Places:
    """Return the places of the prior and views with a high macro-F1: views are selected for each prior, or all kept.

    Of the priors, the first within TOLERANCE of the best wins: the training's own statistics, if possible.
    """
    candidates = [
        (prior, tuple(range(len(probs_VNC))) if keeps_views else select_views(targets_N, probs_VNC))
        for prior, probs_VNC in enumerate(probs_PVNC)
    ]
    if not len(targets_N):
        return candidates[0]
    num_classes = probs_PVNC.shape[3]
    scores = [count_macro_f1(targets_N, _predict(probs_PVNC, places), num_classes) for places in candidates]
    return candidates[int(np.argmax(np.asarray(scores) >= max(scores) - TOLERANCE))]


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


def _find_plain(rows: ViewRows, keeps_views: bool) -> _Places:
    return 0, tuple(range(len(rows.views))) if keeps_views else (0,)


def _predict(probs_PVNC: np.ndarray, places: _Places) -> np.ndarray:
    """Return the most probable class (n,) by the mean over these views, summed in the order of selection."""
    prior, views = places
    total_NC = np.zeros(probs_PVNC.shape[2:])
    for place in views:
        total_NC += probs_PVNC[prior, place]
    classes_N: np.ndarray = total_NC.argmax(axis=1)
    return classes_N


def _score_candidates(rows: ViewRows, plain: _Places, macro_f1: float) -> tuple[CandidateScore, ...]:
    """Score each view, if they are selected, and each prior by itself."""

    def score(places: _Places) -> float:
        return count_macro_f1(rows.targets_N, _predict(rows.probs_PVNC, places), rows.probs_PVNC.shape[3])

    _, plain_views = plain
    views = range(1, len(rows.views)) if len(plain_views) == 1 else ()
    scores = []
    for place in views:
        alone, both = score((0, (place,))), score((0, (0, place)))
        scores.append(CandidateScore(rows.name((0, (place,))), alone, both - macro_f1))
    for prior in range(1, len(rows.priors)):
        alone = score((prior, plain_views))
        scores.append(CandidateScore(rows.name((prior, plain_views)), alone, alone - macro_f1))
    return tuple(scores)


def describe_choice(choice: SettingChoice) -> list[str]:
    """Return lines that say what each candidate gains, what is used, and why."""
    folds, plain = ", ".join(map(str, choice.folds)), choice.plain.text
    lines = [f"by the {choice.decided_by} OOF predictions of folds {folds}: macro_f1={choice.macro_f1:.5f} of {plain}"]
    for score in choice.scores:
        if score.setting.prior == choice.plain.prior:
            name, how = f"{score.setting.text} alone", f"{score.gain:+.4f} by averaging it with {plain}"
        else:
            name, how = score.setting.text, f"{score.gain:+.4f}"
        lines.append(f"{name}: macro_f1={score.macro_f1:.5f}, {how}")
    if choice.selected == choice.plain:
        return [*lines, f"nothing is selected: no candidate, nor several, raise macro_f1 by more than {TOLERANCE}"]
    gain = f"{choice.gain:+.4f}, {GAIN_LEVEL:.0%} interval [{choice.gain_low:+.3f}, {choice.gain_high:+.3f}]"
    decision = "used" if choice.gain_low > 0 else "not used: the gain may be noise, its interval is not above 0"
    return [*lines, f"{choice.selected.text}: macro_f1 changes by {gain} (cross-fitted): {decision}"]


def write_choice(paths: RunPaths, choice: SettingChoice) -> None:
    """Write views.json and, if the run is merged, the same as `views` of summary.json.

    Raises:
        UserError: summary.json is damaged, or can't be read.
    """
    values = {"format": _FORMAT, **asdict(choice), "gain_level": GAIN_LEVEL}
    write_text(paths.views_record, _render(values))
    if not is_merged(paths):
        return
    try:
        merged_ns = paths.summary.stat().st_mtime_ns
        summary = json.loads(read_text(paths.summary))
        write_text(paths.summary, _render({**summary, "views": values}))
        with suppress(OSError):  # where a file's time can't be set, the summary only looks newer
            os.utime(paths.summary, ns=(merged_ns, merged_ns))  # of the merge, which `is_merged` compares
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{paths.summary}: damaged, or can't be read: merge the run again ({error})") from error


def _render(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
