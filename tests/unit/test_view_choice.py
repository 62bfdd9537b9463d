"""The choice of views: no gain where there is none, a real one found, and scores that no own row has chosen."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doccls.errors import UserError
from doccls.oof import bootstrap
from doccls.oof import views as views_module
from doccls.oof.metrics import macro_f1, probabilities
from doccls.oof.predictions import FoldPredictions, PredictionsInfo
from doccls.oof.view_logits import FoldViews, ViewsInfo
from doccls.oof.views import (
    Setting,
    ViewRows,
    choose_setting,
    describe_choice,
    select_setting,
    select_views,
    stack_folds,
    write_choice,
)
from doccls.run.paths import RunPaths

NAMES = ("id", "rot90", "rot180", "hflip", "vflip", "scale0.9", "scale1.1")
CLASSES = 4
PLAIN = Setting(("id",))


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resample 200 times: enough for an interval, in a fifth of the time."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 200)


def draw_equal_views(seed: int, count: int = 300, folds: int = 3) -> ViewRows:
    """Draw views of equal skill, alone or averaged: every view knows two thirds of the rows, and no view the others."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, count)
    logits = rng.normal(0, 1, (len(NAMES), count, CLASSES))
    is_easy = rng.random(count) < 2 / 3
    logits[:, is_easy] += 9 * np.eye(CLASSES)[targets[is_easy]]
    return make_rows(logits, targets, folds)


def draw_helpful_views(seed: int, count: int = 400, folds: int = 3) -> ViewRows:
    """Draw views of which rot180 and scale0.9 have evidence of their own, like the page itself; others have none."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, count)
    logits = rng.normal(0, 1, (len(NAMES), count, CLASSES))
    logits[[0, 2, 5]] += np.eye(CLASSES)[targets]
    return make_rows(logits, targets, folds)


def make_rows(logits_VNC: np.ndarray, targets: np.ndarray, folds: int) -> ViewRows:
    views, folds_N = NAMES[: len(logits_VNC)], np.arange(len(targets)) % folds
    return ViewRows(views, (None,), probabilities_of(logits_VNC)[None], targets, folds_N)


def probabilities_of(logits_VNC: np.ndarray) -> np.ndarray:
    return np.stack([probabilities(logits) for logits in logits_VNC])


def find_false_gains(draws: int) -> list[int]:
    """Return the draws in which more than the page itself is used; every seventh has a single fold."""
    return [
        seed
        for seed in range(draws)
        if choose_setting(draw_equal_views(seed, folds=3 if seed % 7 else 1), "clean").used != PLAIN
    ]


def leak(part_N: np.ndarray, part: int) -> np.ndarray:
    """Return all rows, those of the part as well."""
    return np.arange(len(part_N))


# --- false and real gains --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_resamples")
def test_false_gains_are_rare() -> None:
    assert len(find_false_gains(200)) <= 10


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_resamples")
def test_views_chosen_on_the_rows_that_score_them_would_give_false_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_module, "_list_other_rows", leak)
    assert len(find_false_gains(200)) > 20, "the test above must be able to fail"


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize("folds", [1, 3])
def test_real_gain_is_found(folds: int) -> None:
    choice = choose_setting(draw_helpful_views(0, folds=folds), "damaged")
    assert set(choice.used.views) == {"id", "rot180", "scale0.9"} and choice.used == choice.selected
    assert choice.gain_low > 0 and choice.gain > 0.05 and len(choice.part_selected) == (5 if folds == 1 else 3)
    assert choice.decided_by == "damaged" and choice.folds == tuple(range(folds))


@pytest.mark.usefixtures("fewer_resamples")
def test_gain_within_its_interval_is_not_used() -> None:
    """As many views as above help, but too few rows show it."""
    choice = choose_setting(draw_helpful_views(3, 36), "clean")
    assert choice.gain_low <= 0 < choice.gain < choice.gain_high
    assert choice.selected != PLAIN and choice.used == choice.plain == PLAIN


# --- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fewer_resamples")
def test_figures_are_those_of_labels_that_other_folds_chose() -> None:
    rows = draw_helpful_views(1, 150)
    choice = choose_setting(rows, "clean")
    labels = np.empty(150, dtype=np.int64)
    for fold, setting in enumerate(choice.part_selected):
        own = np.arange(150) % 3 == fold
        places = select_views(rows.targets_N[~own], rows.probs_PVNC[0][:, ~own])
        assert setting == Setting(tuple(NAMES[place] for place in places))
        labels[own] = rows.probs_PVNC[0][list(places)].mean(axis=0)[own].argmax(axis=1)
    plain = rows.probs_PVNC[0][0].argmax(axis=1)
    own_f1, plain_f1 = (macro_f1(rows.targets_N, np.eye(CLASSES)[each]) for each in (labels, plain))
    assert choice.macro_f1 == pytest.approx(plain_f1) and choice.gain == pytest.approx(own_f1 - plain_f1)
    low, high = bootstrap.bootstrap_gap(rows.targets_N, labels, plain, CLASSES, level=0.99)
    assert (choice.gain_low, choice.gain_high) == (low, high)
    for name, score, probs in zip(NAMES[1:], choice.scores, rows.probs_PVNC[0, 1:], strict=True):
        assert score.setting == Setting((name,))
        assert score.macro_f1 == pytest.approx(macro_f1(rows.targets_N, probs))
        both = macro_f1(rows.targets_N, rows.probs_PVNC[0][0] + probs)
        assert score.gain == pytest.approx(both - plain_f1)


def test_smallest_set_close_to_the_best_is_selected() -> None:
    """A copy of the page gains nothing, and a copy of the helpful view nothing more."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, CLASSES, 400)
    page, other = rng.normal(0, 1, (2, 400, CLASSES)) + np.eye(CLASSES)[targets]
    probs = probabilities_of(np.stack([page, page, other, other]))
    assert select_views(targets, probs) == (0, 2)
    assert select_views(targets, probs[:2]) == (0,)


def test_view_that_gains_less_than_it_costs_is_not_selected() -> None:
    """The page is wrong in 21 of 4000 rows; one view mends 20 of them, another one the last."""
    targets = np.arange(4000) % CLASSES
    page = 0.5 + np.eye(CLASSES)[targets]
    page[:21] = 0.5 + np.eye(CLASSES)[(targets[:21] + 1) % CLASSES]
    most, last = np.zeros((2, *page.shape))
    most[:20], last[20] = 2 * np.eye(CLASSES)[targets[:20]], 2 * np.eye(CLASSES)[targets[20]]
    assert select_views(targets, np.stack([page, last, most])) == (0, 2)
    assert select_views(targets, np.stack([page, last])) == (0,)


def test_views_that_help_only_together_are_found() -> None:
    """Each of two views turns right labels into wrong ones; their mean with the page is right."""
    targets = np.arange(90) % 3
    page, first, second = np.full((3, 90, 3), 1 / 3)
    right, wrong = np.eye(3)[targets], np.eye(3)[(targets + 1) % 3]
    # In half of the rows the page is just wrong, and both views together know it; else one of them misleads.
    is_hard = np.arange(90) % 2 == 0
    page = page + np.where(is_hard[:, None], 0.10 * wrong, 0.10 * right)
    first = first + np.where(is_hard[:, None], 0.06 * right, 0.15 * wrong)
    second = second + np.where(is_hard[:, None], 0.06 * right, 0.15 * right)
    probs = np.stack([page, first])
    assert select_views(targets, probs) == (0,)
    assert select_views(targets, np.stack([page, second, first])) == (0, 1, 2)


def test_no_other_rows_give_the_page_itself() -> None:
    rows = make_rows(np.random.default_rng(0).normal(size=(3, 1, CLASSES)), np.array([1]), 1)
    choice = choose_setting(rows, "clean")
    assert choice.used == PLAIN and set(choice.part_selected) == {PLAIN}


def test_groups_are_resampled_together() -> None:
    rows = draw_helpful_views(2, 200)
    apart = choose_setting(rows, "clean")
    # Pages of one document are copies: a tenth of the rows, ten times each, give a wider interval.
    copies = np.repeat(np.arange(20), 10)
    grouped = ViewRows(NAMES, (None,), rows.probs_PVNC[:, :, copies], rows.targets_N[copies], copies % 2, copies)
    together = choose_setting(grouped, "clean")
    assert together.gain_high - together.gain_low > 2 * (apart.gain_high - apart.gain_low)


def test_choice_is_described_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose_setting(draw_helpful_views(0), "damaged")
    lines = describe_choice(choice)
    assert lines[0] == f"by the damaged OOF predictions of folds 0, 1, 2: macro_f1={choice.macro_f1:.5f} of view id"
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"view {name} alone" for name in NAMES[1:]]
    assert lines[-1].startswith(f"views {','.join(choice.used.views)}: macro_f1 changes by +")
    assert "99% interval" in lines[-1] and lines[-1].endswith("used")
    unused = dataclasses.replace(choice, used=PLAIN, gain_low=-0.01)
    assert describe_choice(unused)[-1].endswith("not used: the gain may be noise, its interval is not above 0")
    plain = dataclasses.replace(choice, used=PLAIN, selected=PLAIN, gain_low=-0.01)
    assert describe_choice(plain) == [
        *lines[:-1], "nothing is selected: no candidate, nor several, raise macro_f1 by more than 0.002"
    ]  # fmt: skip
    paths = RunPaths(tmp_path)
    write_choice(paths, choice)
    assert not paths.summary.exists()
    paths.summary.write_text('{"macro_f1": 0.5, "views": "of an earlier prediction"}')
    merged = paths.summary.stat().st_mtime_ns
    write_choice(paths, choice)
    record = json.loads(paths.views_record.read_text())
    assert json.loads(paths.summary.read_text()) == {"macro_f1": 0.5, "views": record}
    assert paths.summary.stat().st_mtime_ns == merged

    def forbid(*others: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", forbid)
        write_choice(paths, choice)
        assert paths.summary.stat().st_mtime_ns > merged, "it still counts as merged"
    paths.summary.write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: damaged, or can't be read: merge the run again"):
        write_choice(paths, choice)
    assert record["gain_level"] == 0.99
    assert record["format"] == "doccls-views-2"
    assert record["used"] == {"views": list(choice.used.views), "prior": None}
    assert (
        record["scores"][1]["setting"]["views"] == ["rot180"] and record["scores"][1]["gain"] == choice.scores[1].gain
    )


# --- BatchNorm statistics --------------------------------------------------------------------------------------------


def draw_helpful_statistics(seed: int, count: int = 400, gain: float = 1.0) -> ViewRows:
    """Draw logits of three views; those with prior 64 have `gain` more evidence."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, count)
    logits = rng.normal(0, 1, (3, 3, count, CLASSES)) + np.eye(CLASSES)[targets]
    logits[1] += gain * np.eye(CLASSES)[targets]
    probs = np.stack([probabilities_of(logits_VNC) for logits_VNC in logits])
    return ViewRows(NAMES[:3], (None, 64, 256), probs, targets, np.arange(count) % 3)


@pytest.mark.usefixtures("fewer_resamples")
def test_statistics_and_views_are_chosen_together() -> None:
    rows = draw_helpful_statistics(0)
    choice = choose_setting(rows, "damaged")
    assert choice.used == choice.selected and choice.used.prior == 64 and len(choice.used.views) > 1
    assert choice.plain == PLAIN and choice.macro_f1 == pytest.approx(macro_f1(rows.targets_N, rows.probs_PVNC[0, 0]))
    scores = {score.setting: score for score in choice.scores}
    assert set(scores) == {Setting((name,)) for name in NAMES[1:3]} | {Setting(("id",), prior) for prior in (64, 256)}
    adapted = scores[Setting(("id",), 64)]
    assert adapted.macro_f1 == pytest.approx(macro_f1(rows.targets_N, rows.probs_PVNC[1, 0]))
    assert adapted.gain == pytest.approx(adapted.macro_f1 - choice.macro_f1)
    lines = describe_choice(choice)
    assert lines[3].startswith("view id, BatchNorm prior 64: macro_f1=0.")
    assert lines[-1].startswith(f"views {','.join(choice.used.views)}, BatchNorm prior 64: macro_f1 ")


@pytest.mark.usefixtures("fewer_resamples")
def test_views_that_are_given_are_kept_whatever_the_statistics() -> None:
    rows = draw_helpful_statistics(1)
    choice = choose_setting(rows, "damaged", keeps_views=True)
    assert choice.plain == Setting(NAMES[:3]) and choice.used == Setting(NAMES[:3], 64)
    assert [score.setting.prior for score in choice.scores] == [64, 256]
    mean = rows.probs_PVNC[0].mean(axis=0)
    assert choice.macro_f1 == pytest.approx(macro_f1(rows.targets_N, mean))


def test_statistics_of_the_training_win_if_others_hardly_gain() -> None:
    rows = draw_helpful_statistics(2)
    same = np.stack([rows.probs_PVNC[1], rows.probs_PVNC[1], rows.probs_PVNC[0]])
    assert select_setting(rows.targets_N, same)[0] == 0
    assert select_setting(rows.targets_N, same[::-1])[0] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_resamples")
def test_false_gains_of_statistics_are_rare() -> None:
    """Three kinds of statistics of equal skill: none is to be preferred."""
    used = [choose_setting(draw_helpful_statistics(seed, 300, 0.0), "damaged", True).used.prior for seed in range(200)]
    assert sum(prior is not None for prior in used) <= 10


# --- the rows --------------------------------------------------------------------------------------------------------


def test_rows_of_all_folds_are_in_the_order_of_the_table() -> None:
    rng = np.random.default_rng(0)
    logits, damaged = rng.normal(size=(2, 2, 9, CLASSES)).astype(np.float32)
    targets, fold_of = rng.integers(0, CLASSES, 9), np.array([0, 1, 0, 0, 1, 1, 0, 1, 0])
    groups = tuple("aabbccdde")

    def make_fold(fold: int, **changes: Any) -> tuple[FoldPredictions, list[FoldViews]]:
        indices = np.flatnonzero(fold_of == fold)
        skipped = (4,) if fold == 1 else ()
        info = PredictionsInfo(
            "print", fold, 2, 9, tuple("wxyz"), tuple(map(str, indices)), skipped, 1, 0.5,
            groups=tuple(groups[index] for index in indices),
            damage="scan", macro_f1_damaged=0.1, **changes,
        )  # fmt: skip
        usable = indices[~np.isin(indices, skipped)]
        shown = logits if info.selected_by == "clean" else damaged
        views = FoldViews(ViewsInfo("print", fold, "c", info.selected_by, None, NAMES[:2]), usable, shown[:, usable])
        adapted = dataclasses.replace(views, logits_VNC=-views.logits_VNC)
        predictions = FoldPredictions(info, indices, logits[0, indices], targets[indices], damaged[0, indices])
        return predictions, [views, adapted]

    usable = np.delete(np.arange(9), 4)
    for selected_by, expected in (("clean", logits), ("damaged", damaged)):
        rows = stack_folds([make_fold(fold, selected_by=selected_by) for fold in (1, 0)], (None, 64))
        assert rows.views == NAMES[:2] and rows.priors == (None, 64)
        for probs_VNC, sign in zip(rows.probs_PVNC, (1, -1), strict=True):
            np.testing.assert_allclose(probs_VNC, probabilities_of(sign * expected[:, usable]))
        assert np.array_equal(rows.targets_N, targets[usable]) and np.array_equal(rows.folds_N, fold_of[usable])
        assert rows.unit_N is not None and rows.unit_N.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
