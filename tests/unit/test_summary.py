"""The figures of a merged run: scikit-learn's, with an interval that resampling row by row gives too."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from doccls.oof import summary as room
from doccls.oof.summary import Summary, bootstrap_macro_f1, list_scores, render_summary, summarize

LABELS = ("cat", 'do"g', "ü", "never")
"""The last is neither a target nor, below, a prediction."""


def draw_run(count: int = 120, skill: float = 0.8, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(targets, logits, folds) of a classifier that is right in about `skill` of the rows."""
    draw = np.random.default_rng(seed)
    targets = draw.choice(3, count, p=(0.6, 0.3, 0.1))
    predictions = np.where(draw.random(count) < skill, targets, draw.integers(0, 3, count))
    logits = draw.random((count, 4)).astype(np.float32)
    logits[:, 3] = 0
    logits[np.arange(count), predictions] += 2
    return targets, logits, draw.integers(0, 3, count)


def score(targets: np.ndarray, predictions: np.ndarray) -> float:
    return float(f1_score(targets, predictions, average="macro", zero_division=0))


class Preset:
    """A generator that draws what it is told."""

    def __init__(self, draws: list[list[int]]) -> None:
        self._draws = iter(draws)

    def multinomial(self, count: int, shares: np.ndarray) -> np.ndarray:
        drawn = np.array(next(self._draws))
        assert drawn.sum() == count and drawn.shape == shares.shape and shares.sum() == pytest.approx(1)
        return drawn


# --- the figures -----------------------------------------------------------------------------------------------------


def test_the_figures_are_scikit_learns() -> None:
    targets, logits, folds = draw_run()
    predictions = logits.argmax(axis=1)
    found = summarize(targets, logits, folds, (), LABELS)
    assert (found.num_samples, found.num_skipped) == (120, 0)
    assert found.macro_f1 == score(targets, predictions)
    assert found.accuracy == accuracy_score(targets, predictions)
    assert (found.interval_level, found.interval_resamples) == (0.95, 1000)
    assert (found.macro_f1_low, found.macro_f1_high) == bootstrap_macro_f1(targets, predictions, 4)
    assert 0 < found.macro_f1_low < found.macro_f1 < found.macro_f1_high < 1


def test_each_folds_figures_are_those_of_its_rows() -> None:
    targets, logits, folds = draw_run()
    found = summarize(targets, logits, folds, (), LABELS)
    assert [one.fold for one in found.folds] == [0, 1, 2]
    for one in found.folds:
        rows = folds == one.fold
        predictions = logits[rows].argmax(axis=1)
        assert one.num_samples == rows.sum()
        assert one.macro_f1 == score(targets[rows], predictions)
        assert one.accuracy == pytest.approx(accuracy_score(targets[rows], predictions))


def test_each_classs_figures_are_scikit_learns_and_a_class_that_is_nowhere_has_zeros() -> None:
    targets, logits, folds = draw_run()
    predictions = logits.argmax(axis=1)
    found = summarize(targets, logits, folds, (), LABELS)
    assert [one.label for one in found.classes] == list(LABELS)
    options: dict[str, Any] = {"labels": range(4), "average": None, "zero_division": 0}
    assert [one.precision for one in found.classes] == precision_score(targets, predictions, **options).tolist()
    assert [one.recall for one in found.classes] == recall_score(targets, predictions, **options).tolist()
    assert [one.f1 for one in found.classes] == f1_score(targets, predictions, **options).tolist()
    assert [one.num_samples for one in found.classes] == [*np.bincount(targets).tolist(), 0]
    assert found.macro_f1 == pytest.approx(np.mean([one.f1 for one in found.classes[:3]])), "`never` does not count"


def test_skipped_rows_are_in_no_figure() -> None:
    targets, logits, folds = draw_run()
    skipped = (3, 50, 119)
    others = np.setdiff1d(np.arange(120), skipped)
    logits[list(skipped)] = np.nan
    found = summarize(targets, logits, folds, skipped, LABELS)
    expected = summarize(targets[others], logits[others], folds[others], (), LABELS)
    assert (found.num_samples, found.num_skipped) == (117, 3)
    assert asdict(found) == asdict(expected) | {"num_skipped": 3}


def test_a_fold_of_skipped_rows_alone_has_no_line() -> None:
    targets, logits, folds = draw_run(8)
    folds[:] = [0, 0, 0, 0, 0, 0, 1, 1]
    found = summarize(targets, logits, folds, (6, 7), LABELS)
    assert [(one.fold, one.num_samples) for one in found.folds] == [(0, 6)]


# --- the interval ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("count", "skill"), [(60, 0.6), (300, 0.8), (300, 0.97)])
def test_the_interval_is_that_of_resampling_row_by_row(count: int, skill: float) -> None:
    targets, logits, _ = draw_run(count, skill)
    predictions, draw = logits.argmax(axis=1), np.random.default_rng(1)
    scores = []
    for _ in range(2000):
        rows = draw.integers(0, count, count)
        scores.append(score(targets[rows], predictions[rows]))
    low, high = np.quantile(scores, [0.025, 0.975])
    found_low, found_high = bootstrap_macro_f1(targets, predictions, 4)
    # A 2.5 % quantile of 1000 (and 2000) draws errs by about a tenth (and less) of their standard deviation.
    tolerance = 0.4 * np.std(scores)
    assert found_low == pytest.approx(low, abs=tolerance)
    assert found_high == pytest.approx(high, abs=tolerance)
    assert found_high - found_low == pytest.approx(high - low, rel=0.2)


CELLS = [[5, 2, 0], [1, 7, 3], [0, 0, 4]]


@pytest.mark.parametrize(
    "drawn",
    [
        [5, 2, 1, 7, 3, 4], [22, 0, 0, 0, 0, 0], [0, 22, 0, 0, 0, 0], [0, 11, 11, 0, 0, 0], [0, 0, 0, 0, 22, 0],
        [1, 1, 1, 1, 9, 9], [0, 3, 3, 0, 16, 0],
    ],
)  # fmt: skip
def test_a_resamples_score_is_scikit_learns_also_where_classes_are_absent(
    monkeypatch: pytest.MonkeyPatch, drawn: list[int]
) -> None:
    true, predicted = np.nonzero(CELLS)
    targets, predictions = (np.repeat(axis, np.array(CELLS)[true, predicted]) for axis in (true, predicted))
    monkeypatch.setattr(room, "RESAMPLES", 1)
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "Generator", lambda _: Preset([drawn]))
        low, high = bootstrap_macro_f1(targets, predictions, 3)
    expected = score(np.repeat(true, drawn), np.repeat(predicted, drawn))
    assert low == high == pytest.approx(expected, rel=1e-12)


def test_the_interval_holds_the_middle_95_of_100_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = list(range(1, 101))
    monkeypatch.setattr(room, "RESAMPLES", len(hits))
    targets, predictions = np.array([0] * 200), np.array([0, 1] * 100)  # macro-F1 rises with the hits drawn
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "Generator", lambda _: Preset([[hit, 200 - hit] for hit in reversed(hits)]))
        found = bootstrap_macro_f1(targets, predictions, 2)
    scores = [score(np.zeros(200), np.arange(200) >= hit) for hit in hits]
    assert found == pytest.approx(np.quantile(scores, [0.025, 0.975]).tolist())


@pytest.mark.slow
def test_with_groups_the_interval_is_that_of_resampling_groups_and_wider() -> None:
    """Pages of a document are right or wrong together."""
    draw = np.random.default_rng(0)
    group_N = np.repeat(np.arange(60), draw.integers(1, 9, 60))
    targets = draw.integers(0, 3, 60)[group_N]
    predictions = np.where((draw.random(60) < 0.7)[group_N], targets, (targets + 1) % 3)
    scores = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(group_N == group) for group in draw.integers(0, 60, 60)])
        scores.append(score(targets[rows], predictions[rows]))
    low, high = bootstrap_macro_f1(targets, predictions, 3, group_N)
    assert [low, high] == pytest.approx(np.quantile(scores, [0.025, 0.975]).tolist(), abs=0.4 * float(np.std(scores)))
    by_row = bootstrap_macro_f1(targets, predictions, 3)
    assert high - low > 1.5 * (by_row[1] - by_row[0])


def test_groups_are_resampled_where_there_are_groups_whatever_they_are_called() -> None:
    targets, logits, folds = draw_run()
    names = [f"g{row // 6}" for row in range(120)]
    plain, grouped = (summarize(targets, logits, folds, (3,), LABELS, groups) for groups in (None, names))
    assert (plain.interval_units, grouped.interval_units) == ("rows", "groups")
    assert (plain.macro_f1_low, plain.macro_f1_high) != (grouped.macro_f1_low, grouped.macro_f1_high)
    renamed = summarize(targets, logits, folds, (3,), LABELS, [f"{row // 6:03d}" for row in range(120)])
    assert (renamed.macro_f1_low, renamed.macro_f1_high) == (grouped.macro_f1_low, grouped.macro_f1_high)
    assert "selected by its score on these very rows" in plain.selection


@pytest.mark.parametrize("right", [True, False])
def test_where_every_row_is_alike_the_interval_is_a_point(right: bool) -> None:
    targets = np.zeros(9, dtype=np.int64)
    assert bootstrap_macro_f1(targets, targets if right else targets + 1, 3) == ((1.0, 1.0) if right else (0.0, 0.0))


def test_one_row_has_an_interval_too() -> None:
    assert bootstrap_macro_f1(np.array([1]), np.array([1]), 3) == (1.0, 1.0)


def test_the_interval_is_the_same_each_time_whatever_was_drawn_before() -> None:
    targets, logits, _ = draw_run()
    first = bootstrap_macro_f1(targets, logits.argmax(axis=1), 4)
    np.random.default_rng().random(3)
    np.random.seed(5)  # noqa: NPY002 (the generator that all share)
    assert bootstrap_macro_f1(targets, logits.argmax(axis=1), 4) == first
    order = np.random.default_rng(1).permutation(len(targets))
    assert bootstrap_macro_f1(targets[order], logits.argmax(axis=1)[order], 4) == first


# --- as a file and as lines ------------------------------------------------------------------------------------------


def make_summary() -> Summary:
    targets, logits, folds = draw_run()
    return summarize(targets, logits, folds, (2,), LABELS)


def test_the_same_predictions_give_the_same_bytes() -> None:
    text = render_summary(make_summary())
    assert render_summary(make_summary()) == text
    assert text.endswith("}\n") and "ü" in text and "NaN" not in text
    targets, logits, folds = draw_run(seed=1)
    assert render_summary(summarize(targets, logits, folds, (2,), LABELS)) != text


def test_the_file_is_json_that_holds_every_figure() -> None:
    summary = make_summary()
    told = json.loads(render_summary(summary))
    assert told == json.loads(json.dumps(asdict(summary)))
    assert told["classes"][1]["label"] == 'do"g' and told["num_skipped"] == 1
    assert {type(value) for value in told["folds"][0].values()} == {int, float}


def test_the_lines_for_a_log_are_a_table_of_the_classes_a_line_a_fold_and_one_for_all() -> None:
    summary = make_summary()
    lines = list_scores(summary)
    assert all(line.startswith("[OOF] ") for line in lines)
    classes, folds, whole = lines[1 : -len(summary.folds) - 1], lines[-len(summary.folds) - 1 : -1], lines[-1]
    assert lines[0].split() == ["[OOF]", "class", "rows", "precision", "recall", "f1"]
    for one, line in zip(summary.classes, classes, strict=True):
        assert line.split()[-4:] == [
            str(one.num_samples), f"{one.precision:.4f}", f"{one.recall:.4f}", f"{one.f1:.4f}"
        ]  # fmt: skip
        assert line.startswith(f"[OOF] {one.label} ")
    for one, line in zip(summary.folds, folds, strict=True):
        assert line == (
            f"[OOF] fold={one.fold} macro_f1={one.macro_f1:.5f} accuracy={one.accuracy:.5f} rows={one.num_samples}"
        )
    assert whole.startswith(f"[OOF] all folds macro_f1={summary.macro_f1:.5f} 95% interval [0.")
    assert f"[{summary.macro_f1_low:.3f}, {summary.macro_f1_high:.3f}]" in whole
    assert whole.endswith(f"accuracy={summary.accuracy:.5f} rows=119")
    noted = list_scores(replace(summary, notes=("look here",)))
    assert noted == [*lines[:-1], "[OOF] note: look here", whole]
