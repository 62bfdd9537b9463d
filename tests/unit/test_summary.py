"""Metrics of a merged run match scikit-learn, and their interval matches resampling row by row."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from doccls.oof import summary as summary_module
from doccls.oof.summary import (
    DamagedCopies,
    Summary,
    bootstrap_gap,
    bootstrap_macro_f1,
    list_scores,
    render_summary,
    summarize,
)

LABELS = ("cat", 'do"g', "ü", "never")  # the last is never a target or a prediction below


def draw_run(count: int = 120, skill: float = 0.8, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw (targets, logits, folds) of a classifier that is right in about `skill` of the rows."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(3, count, p=(0.6, 0.3, 0.1))
    predictions = np.where(rng.random(count) < skill, targets, rng.integers(0, 3, count))
    logits = rng.random((count, 4)).astype(np.float32)
    logits[:, 3] = 0
    logits[np.arange(count), predictions] += 2
    return targets, logits, rng.integers(0, 3, count)


def score(targets: np.ndarray, predictions: np.ndarray) -> float:
    return float(f1_score(targets, predictions, average="macro", zero_division=0))


class FixedGenerator:
    """A random generator that returns given draws."""

    def __init__(self, draws: list[list[int]]) -> None:
        self._draws = iter(draws)

    def multinomial(self, count: int, shares: np.ndarray) -> np.ndarray:
        drawn = np.array(next(self._draws))
        assert drawn.sum() == count and drawn.shape == shares.shape and shares.sum() == pytest.approx(1)
        return drawn


# --- the metrics -----------------------------------------------------------------------------------------------------


def test_metrics_match_scikit_learn() -> None:
    targets, logits, folds = draw_run()
    predictions = logits.argmax(axis=1)
    summary = summarize(targets, logits, folds, (), LABELS)
    assert (summary.num_samples, summary.num_skipped) == (120, 0)
    assert summary.macro_f1 == score(targets, predictions)
    assert summary.accuracy == accuracy_score(targets, predictions)
    assert (summary.interval_level, summary.interval_resamples) == (0.95, 1000)
    assert (summary.macro_f1_low, summary.macro_f1_high) == bootstrap_macro_f1(targets, predictions, 4)
    assert 0 < summary.macro_f1_low < summary.macro_f1 < summary.macro_f1_high < 1


def test_fold_metrics_cover_the_rows_of_that_fold() -> None:
    targets, logits, folds = draw_run()
    summary = summarize(targets, logits, folds, (), LABELS)
    assert [row.fold for row in summary.folds] == [0, 1, 2]
    for row in summary.folds:
        rows = folds == row.fold
        predictions = logits[rows].argmax(axis=1)
        assert row.num_samples == rows.sum()
        assert row.macro_f1 == score(targets[rows], predictions)
        assert row.accuracy == pytest.approx(accuracy_score(targets[rows], predictions))


def test_class_metrics_match_scikit_learn_and_absent_class_has_zeros() -> None:
    targets, logits, folds = draw_run()
    predictions = logits.argmax(axis=1)
    summary = summarize(targets, logits, folds, (), LABELS)
    assert [row.label for row in summary.classes] == list(LABELS)
    options: dict[str, Any] = {"labels": range(4), "average": None, "zero_division": 0}
    assert [row.precision for row in summary.classes] == precision_score(targets, predictions, **options).tolist()
    assert [row.recall for row in summary.classes] == recall_score(targets, predictions, **options).tolist()
    assert [row.f1 for row in summary.classes] == f1_score(targets, predictions, **options).tolist()
    assert [row.num_samples for row in summary.classes] == [*np.bincount(targets).tolist(), 0]
    assert summary.macro_f1 == pytest.approx(np.mean([row.f1 for row in summary.classes[:3]])), "`never` does not count"


def test_skipped_rows_are_excluded_from_every_metric() -> None:
    targets, logits, folds = draw_run()
    skipped = (3, 50, 119)
    others = np.setdiff1d(np.arange(120), skipped)
    logits[list(skipped)] = np.nan
    summary = summarize(targets, logits, folds, skipped, LABELS)
    expected = summarize(targets[others], logits[others], folds[others], (), LABELS)
    assert (summary.num_samples, summary.num_skipped) == (117, 3)
    assert asdict(summary) == asdict(expected) | {"num_skipped": 3}


def test_fold_with_only_skipped_rows_is_left_out() -> None:
    targets, logits, folds = draw_run(8)
    folds[:] = [0, 0, 0, 0, 0, 0, 1, 1]
    summary = summarize(targets, logits, folds, (6, 7), LABELS)
    assert [(row.fold, row.num_samples) for row in summary.folds] == [(0, 6)]


# --- the interval ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("count", "skill"), [(60, 0.6), (300, 0.8), (300, 0.97)])
def test_interval_matches_resampling_row_by_row(count: int, skill: float) -> None:
    targets, logits, _ = draw_run(count, skill)
    predictions, rng = logits.argmax(axis=1), np.random.default_rng(1)
    scores = []
    for _ in range(2000):
        rows = rng.integers(0, count, count)
        scores.append(score(targets[rows], predictions[rows]))
    low, high = np.quantile(scores, [0.025, 0.975])
    interval_low, interval_high = bootstrap_macro_f1(targets, predictions, 4)
    # A 2.5 % quantile of 1000 (and 2000) draws errs by about a tenth (and less) of their standard deviation.
    tolerance = 0.4 * np.std(scores)
    assert interval_low == pytest.approx(low, abs=tolerance)
    assert interval_high == pytest.approx(high, abs=tolerance)
    assert interval_high - interval_low == pytest.approx(high - low, rel=0.2)


CELLS = [[5, 2, 0], [1, 7, 3], [0, 0, 4]]


@pytest.mark.parametrize(
    "drawn",
    [
        [5, 2, 1, 7, 3, 4], [22, 0, 0, 0, 0, 0], [0, 22, 0, 0, 0, 0], [0, 11, 11, 0, 0, 0], [0, 0, 0, 0, 22, 0],
        [1, 1, 1, 1, 9, 9], [0, 3, 3, 0, 16, 0],
    ],
)  # fmt: skip
def test_resample_score_matches_scikit_learn_even_with_absent_classes(
    monkeypatch: pytest.MonkeyPatch, drawn: list[int]
) -> None:
    true, predicted = np.nonzero(CELLS)
    targets, predictions = (np.repeat(axis, np.array(CELLS)[true, predicted]) for axis in (true, predicted))
    monkeypatch.setattr(summary_module, "RESAMPLES", 1)
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "Generator", lambda _: FixedGenerator([drawn]))
        low, high = bootstrap_macro_f1(targets, predictions, 3)
    expected = score(np.repeat(true, drawn), np.repeat(predicted, drawn))
    assert low == high == pytest.approx(expected, rel=1e-12)


def test_interval_holds_the_middle_95_of_100_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = list(range(1, 101))
    monkeypatch.setattr(summary_module, "RESAMPLES", len(hits))
    targets, predictions = np.array([0] * 200), np.array([0, 1] * 100)  # macro-F1 rises with the hits drawn
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "Generator", lambda _: FixedGenerator([[hit, 200 - hit] for hit in reversed(hits)]))
        interval = bootstrap_macro_f1(targets, predictions, 2)
    scores = [score(np.zeros(200), np.arange(200) >= hit) for hit in hits]
    assert interval == pytest.approx(np.quantile(scores, [0.025, 0.975]).tolist())


@pytest.mark.slow
def test_group_interval_matches_resampling_groups_and_is_wider() -> None:
    """Pages of a document are right or wrong together."""
    rng = np.random.default_rng(0)
    group_N = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    targets = rng.integers(0, 3, 60)[group_N]
    predictions = np.where((rng.random(60) < 0.7)[group_N], targets, (targets + 1) % 3)
    scores = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(group_N == group) for group in rng.integers(0, 60, 60)])
        scores.append(score(targets[rows], predictions[rows]))
    low, high = bootstrap_macro_f1(targets, predictions, 3, group_N)
    assert [low, high] == pytest.approx(np.quantile(scores, [0.025, 0.975]).tolist(), abs=0.4 * float(np.std(scores)))
    by_row = bootstrap_macro_f1(targets, predictions, 3)
    assert high - low > 1.5 * (by_row[1] - by_row[0])


def test_groups_are_resampled_if_given_whatever_their_names() -> None:
    targets, logits, folds = draw_run()
    names = [f"g{row // 6}" for row in range(120)]
    plain, grouped = (summarize(targets, logits, folds, (3,), LABELS, groups) for groups in (None, names))
    assert (plain.interval_units, grouped.interval_units) == ("rows", "groups")
    assert (plain.macro_f1_low, plain.macro_f1_high) != (grouped.macro_f1_low, grouped.macro_f1_high)
    renamed = summarize(targets, logits, folds, (3,), LABELS, [f"{row // 6:03d}" for row in range(120)])
    assert (renamed.macro_f1_low, renamed.macro_f1_high) == (grouped.macro_f1_low, grouped.macro_f1_high)
    assert "selected by its score on these same rows" in plain.selection


@pytest.mark.parametrize("right", [True, False])
def test_interval_of_identical_rows_is_a_point(right: bool) -> None:
    targets = np.zeros(9, dtype=np.int64)
    assert bootstrap_macro_f1(targets, targets if right else targets + 1, 3) == ((1.0, 1.0) if right else (0.0, 0.0))


def test_single_row_has_an_interval() -> None:
    assert bootstrap_macro_f1(np.array([1]), np.array([1]), 3) == (1.0, 1.0)


def test_interval_does_not_depend_on_global_random_state_or_row_order() -> None:
    targets, logits, _ = draw_run()
    first = bootstrap_macro_f1(targets, logits.argmax(axis=1), 4)
    np.random.default_rng().random(3)
    np.random.seed(5)  # noqa: NPY002 (the global generator)
    assert bootstrap_macro_f1(targets, logits.argmax(axis=1), 4) == first
    order = np.random.default_rng(1).permutation(len(targets))
    assert bootstrap_macro_f1(targets[order], logits.argmax(axis=1)[order], 4) == first


# --- damaged copies --------------------------------------------------------------------------------------------------


def damage(logits: np.ndarray, share: float = 0.4) -> np.ndarray:
    """Return logits that predict another class in some of the rows."""
    is_wrong = np.random.default_rng(2).random(len(logits)) < share
    damaged = logits.copy()
    damaged[is_wrong] = np.roll(damaged[is_wrong][:, :3], 1, axis=1)[:, [0, 1, 2, 2]] * [1, 1, 1, 0]
    return damaged


def test_damaged_metrics_match_those_of_a_run_with_these_logits() -> None:
    targets, logits, folds = draw_run()
    damaged_logits = damage(logits)
    names = [f"g{row // 6}" for row in range(120)]
    for groups in (None, names):
        summary = summarize(
            targets, logits, folds, (3,), LABELS, groups, (), DamagedCopies("light", damaged_logits, True)
        )
        damaged, expected = summary.damaged, summarize(targets, damaged_logits, folds, (3,), LABELS, groups)
        assert damaged is not None and damaged.level == "light"
        for name in ("macro_f1", "macro_f1_low", "macro_f1_high", "accuracy", "folds"):
            assert getattr(damaged, name) == getattr(expected, name)
        plain = summarize(targets, logits, folds, (3,), LABELS, groups)
        assert damaged.gap == plain.macro_f1 - expected.macro_f1 > 0.1
        assert damaged.gap_low < damaged.gap < damaged.gap_high
        assert replace(summary, damaged=None, selection=plain.selection) == plain
        assert "damaged copies of these same rows" in summary.selection


@pytest.mark.slow
def test_gap_interval_matches_resampling_pairs_row_by_row() -> None:
    targets, logits, _ = draw_run(300)
    predictions, damaged = logits.argmax(axis=1), damage(logits, 0.1).argmax(axis=1)
    rng, gaps = np.random.default_rng(1), []
    for _ in range(2000):
        rows = rng.integers(0, 300, 300)
        gaps.append(score(targets[rows], predictions[rows]) - score(targets[rows], damaged[rows]))
    interval = bootstrap_gap(targets, predictions, damaged, 4)
    assert interval == pytest.approx(np.quantile(gaps, [0.025, 0.975]).tolist(), abs=0.4 * float(np.std(gaps)))
    clean_low, clean_high = bootstrap_macro_f1(targets, predictions, 4)
    assert interval[1] - interval[0] < clean_high - clean_low, "paired: rows that are hard in both cancel"


@pytest.mark.parametrize("grouped", [False, True])
def test_gap_of_equal_predictions_is_zero_in_every_resample(grouped: bool) -> None:
    targets, logits, _ = draw_run()
    unit_N = np.arange(120) // 6 if grouped else None
    predictions = logits.argmax(axis=1)
    assert bootstrap_gap(targets, predictions, predictions, 4, unit_N) == (0.0, 0.0)


def test_scores_on_damaged_pages_follow_those_of_pages() -> None:
    targets, logits, folds = draw_run()
    plain = summarize(targets, logits, folds, (), LABELS)
    summary = summarize(
        targets, logits, folds, (), LABELS, copies=DamagedCopies("scan", damage(logits), has_selected=False)
    )
    damaged, lines = summary.damaged, list_scores(summary)
    assert damaged is not None and summary.selection == plain.selection
    assert [line for line in lines if "damaged" not in line] == list_scores(plain)
    own = [line for line in lines if "damaged" in line]
    assert own[:3] == [
        f"[OOF] fold={row.fold}, damaged pages macro_f1={row.macro_f1:.5f} accuracy={row.accuracy:.5f} "
        f"rows={row.num_samples}"
        for row in damaged.folds
    ]
    assert (
        own[3:]
        == lines[-2:]
        == [
            f"[OOF] all folds, damaged pages macro_f1={damaged.macro_f1:.5f} 95% interval "
            f"[{damaged.macro_f1_low:.3f}, {damaged.macro_f1_high:.3f}] accuracy={damaged.accuracy:.5f} rows=120",
            f"[OOF] clean minus damaged macro_f1={damaged.gap:.5f} 95% interval "
            f"[{damaged.gap_low:.3f}, {damaged.gap_high:.3f}]",
        ]
    )


# --- file and log lines ----------------------------------------------------------------------------------------------


def make_summary() -> Summary:
    targets, logits, folds = draw_run()
    return summarize(targets, logits, folds, (2,), LABELS)


def test_same_predictions_give_the_same_bytes() -> None:
    text = render_summary(make_summary())
    assert render_summary(make_summary()) == text
    assert text.endswith("}\n") and "ü" in text and "NaN" not in text
    targets, logits, folds = draw_run(seed=1)
    assert render_summary(summarize(targets, logits, folds, (2,), LABELS)) != text


def test_json_holds_every_metric() -> None:
    summary = make_summary()
    parsed = json.loads(render_summary(summary))
    expected = asdict(summary)
    assert expected.pop("damaged") is None, "without damaged copies, there is no key"
    assert parsed == json.loads(json.dumps(expected))
    assert parsed["classes"][1]["label"] == 'do"g' and parsed["num_skipped"] == 1
    assert {type(value) for value in parsed["folds"][0].values()} == {int, float}


def test_log_lines_are_a_table_of_classes_a_line_per_fold_and_overall_scores() -> None:
    summary = make_summary()
    lines = list_scores(summary)
    assert all(line.startswith("[OOF] ") for line in lines)
    class_lines, fold_lines, overall = (
        lines[1 : -len(summary.folds) - 1],
        lines[-len(summary.folds) - 1 : -1],
        lines[-1],
    )
    assert lines[0].split() == ["[OOF]", "class", "rows", "precision", "recall", "f1"]
    for row, line in zip(summary.classes, class_lines, strict=True):
        assert line.split()[-4:] == [
            str(row.num_samples), f"{row.precision:.4f}", f"{row.recall:.4f}", f"{row.f1:.4f}"
        ]  # fmt: skip
        assert line.startswith(f"[OOF] {row.label} ")
    for row, line in zip(summary.folds, fold_lines, strict=True):
        assert line == (
            f"[OOF] fold={row.fold} macro_f1={row.macro_f1:.5f} accuracy={row.accuracy:.5f} rows={row.num_samples}"
        )
    assert overall.startswith(f"[OOF] all folds macro_f1={summary.macro_f1:.5f} 95% interval [0.")
    assert f"[{summary.macro_f1_low:.3f}, {summary.macro_f1_high:.3f}]" in overall
    assert overall.endswith(f"accuracy={summary.accuracy:.5f} rows=119")
    noted = list_scores(replace(summary, notes=("a caveat",)))
    assert noted == [*lines[:-1], "[OOF] note: a caveat", overall]
