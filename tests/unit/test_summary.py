"""Metrics of a merged run match scikit-learn, and are reported in full."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from doccls.errors import UserError
from doccls.oof import summary as summary_module
from doccls.oof.bootstrap import bootstrap_macro_f1
from doccls.oof.calibrate import Calibration, OofRows, cross_fit, measure_calibration
from doccls.oof.summary import (
    DamagedCopies,
    Summary,
    list_scores,
    read_summary,
    render_summary,
    summarize,
)
from doccls.oof.thresholds import Thresholds, find_thresholds
from tests.unit.test_bootstrap import damage, draw_run, score

LABELS = ("cat", 'do"g', "ü", "never")  # the last is never a target or a prediction below


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


def test_groups_are_resampled_if_given_whatever_their_names() -> None:
    targets, logits, folds = draw_run()
    names = [f"g{row // 6}" for row in range(120)]
    plain, grouped = (summarize(targets, logits, folds, (3,), LABELS, groups) for groups in (None, names))
    assert (plain.interval_units, grouped.interval_units) == ("rows", "groups")
    assert (plain.macro_f1_low, plain.macro_f1_high) != (grouped.macro_f1_low, grouped.macro_f1_high)
    renamed = summarize(targets, logits, folds, (3,), LABELS, [f"{row // 6:03d}" for row in range(120)])
    assert (renamed.macro_f1_low, renamed.macro_f1_high) == (grouped.macro_f1_low, grouped.macro_f1_high)
    assert "selected by its score on these same rows" in plain.selection


# --- damaged copies --------------------------------------------------------------------------------------------------


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
        assert summary.calibration == plain.calibration | {"damaged": expected.calibration["clean"]}
        assert summary.thresholds == expected.thresholds != plain.thresholds, "of the score that selected the epochs"
        own = {"selection": plain.selection, "calibration": plain.calibration, "thresholds": plain.thresholds}
        assert replace(summary, damaged=None, **own) == plain
        assert "damaged copies of these same rows" in summary.selection


def test_scores_on_damaged_pages_follow_those_of_pages() -> None:
    targets, logits, folds = draw_run()
    plain = summarize(targets, logits, folds, (), LABELS)
    summary = summarize(
        targets, logits, folds, (), LABELS, copies=DamagedCopies("scan", damage(logits), has_selected=False)
    )
    damaged, lines = summary.damaged, list_scores(summary)
    assert damaged is not None and summary.selection == plain.selection
    assert summary.thresholds == plain.thresholds
    assert [line for line in lines if "damaged" not in line] == list_scores(plain)
    own = [line for line in lines if "damaged" in line]
    assert own.pop(3) == (
        f"[OOF] temperature={summary.calibration['damaged'].temperature:.3f} "
        + format_calibration(summary.calibration["damaged"])
        + " (damaged pages; cross-fitted)"
    )
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


# --- calibration -----------------------------------------------------------------------------------------------------


def format_calibration(calibration: Calibration) -> str:
    return (
        f"nll {calibration.nll:.3f} -> {calibration.nll_calibrated:.3f}, "
        f"ece {calibration.ece:.3f} -> {calibration.ece_calibrated:.3f}, "
        f"brier {calibration.brier:.3f} -> {calibration.brier_calibrated:.3f}"
    )


def test_calibration_and_thresholds_are_those_of_the_used_rows_and_their_groups() -> None:
    targets, logits, folds = draw_run()
    logits[[3, 50]] = np.nan
    used = np.setdiff1d(np.arange(120), [3, 50])
    names = [f"g{row // 6}" for row in range(120)]
    for groups in (None, names):
        summary = summarize(targets, logits, folds, (3, 50), LABELS, groups)
        rows = OofRows(targets[used], logits[used], folds[used], None if groups is None else used // 6)
        fit = cross_fit(rows)
        assert summary.calibration == {"clean": measure_calibration(rows, fit)}
        assert summary.thresholds == find_thresholds(rows, fit)


def test_given_thresholds_are_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Thresholds(None, None, None, None, "given")
    monkeypatch.delattr(summary_module, "find_thresholds")
    targets, logits, folds = draw_run()
    copies = DamagedCopies("scan", damage(logits), has_selected=True)
    assert summarize(targets, logits, folds, (), LABELS, copies=copies, thresholds=given).thresholds == given


def test_calibration_is_a_line_of_its_own_before_the_scores() -> None:
    summary = make_summary()
    calibration = Calibration(1.2345, 1.71, 1.52, 0.12, 0.03, 0.55, 0.51)
    thresholds = Thresholds(None, -0.00321, -0.012, 0.004, "the gain may be noise: its interval is not above 0")
    lines = list_scores(replace(summary, calibration={"clean": calibration}, thresholds=thresholds, notes=("a note",)))
    assert lines[-4:-1] == [
        "[OOF] temperature=1.234 nll 1.710 -> 1.520, ece 0.120 -> 0.030, brier 0.550 -> 0.510 "
        "(clean pages; cross-fitted)",
        "[OOF] per-class thresholds: macro_f1 changes by -0.0032, 99% interval [-0.012, +0.004] "
        "(cross-fitted): not used",
        "[OOF] note: a note",
    ]
    used = Thresholds((0.5, -0.25, 0.0), 0.01234, 0.002, 0.021)
    assert list_scores(replace(summary, thresholds=used))[-2] == (
        "[OOF] per-class thresholds: macro_f1 changes by +0.0123, 99% interval [+0.002, +0.021] "
        "(cross-fitted): used by predict"
    )
    untried = Thresholds(None, None, None, None, "not tried: 9 rows of 8 classes take too long")
    assert list_scores(replace(summary, thresholds=untried))[-2] == (
        "[OOF] per-class thresholds: not tried: 9 rows of 8 classes take too long"
    )
    parsed = json.loads(render_summary(replace(summary, thresholds=used)))
    assert parsed["thresholds"]["offsets"] == [0.5, -0.25, 0.0] and parsed["thresholds"]["reason"] is None
    assert (parsed["thresholds"]["gain_level"], parsed["interval_level"]) == (0.99, 0.95)


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


@pytest.mark.parametrize("offsets", [None, (0.5, 0.0, -0.25, 0.0)])
def test_summary_is_read_as_it_was_written(tmp_path: Path, offsets: tuple[float, ...] | None) -> None:
    targets, logits, folds = draw_run()
    thresholds = Thresholds(offsets, 0.01, -0.02, 0.03, "a reason")
    copies = DamagedCopies("scan", damage(logits), has_selected=True)
    for summary in (
        make_summary(),
        summarize(targets, logits, folds, (2,), LABELS, notes=("a", "b"), copies=copies, thresholds=thresholds),
    ):
        file = tmp_path / "summary.json"
        file.write_text(render_summary(summary), encoding="utf-8")
        assert read_summary(file) == summary
        file.write_text(json.dumps(json.loads(render_summary(summary)) | {"views": {"used": {}}}), encoding="utf-8")
        assert read_summary(file) == summary, "what predict adds is ignored"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"folds": []}', "\0"])
def test_damaged_summary_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary\.json: damaged, or another version of doccls wrote it"):
        read_summary(tmp_path / "summary.json")
    with pytest.raises(UserError, match="nowhere"):
        read_summary(tmp_path / "nowhere" / "summary.json")


def test_log_lines_are_a_table_of_classes_a_line_per_fold_and_overall_scores() -> None:
    summary = make_summary()
    lines = list_scores(summary)
    assert all(line.startswith("[OOF] ") for line in lines)
    class_lines, fold_lines, overall = lines[1:5], lines[5 : 5 + len(summary.folds)], lines[-1]
    assert len(lines) == 5 + len(summary.folds) + 3, "then calibration, thresholds and the overall scores"
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
