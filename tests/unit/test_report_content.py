"""What a report says, from the files of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from doccls.oof.calibrate import OofRows, cross_fit, measure_ece
from doccls.oof.metrics import probabilities
from doccls.report.content import (
    PageResult,
    derive_content,
    find_confident_mistakes,
    order_for_thumbnails,
)
from doccls.report.inputs import read_inputs
from tests.unit.report_runs import CLASSES, COUNT, FOLD_OF, IDS, TARGETS, draw_logits, write_run


def make_page(row: int, target: int, prediction: int, confidence: float) -> PageResult:
    return PageResult(row, f"page{row}", 0, target, ((prediction, confidence), (9, 0.0)))


def test_pages_are_those_of_the_run(tmp_path: Path) -> None:
    content = derive_content(read_inputs(write_run(tmp_path)))
    predictions = draw_logits().argmax(axis=1)
    assert {(page.row, page.sample_id, page.fold, page.target, page.prediction) for page in content.pages} == {
        (row, IDS[row], FOLD_OF[row], TARGETS[row], predictions[row]) for row in range(COUNT)
    }
    for target in range(len(CLASSES)):
        for prediction in range(len(CLASSES)):
            expected = int(((target == TARGETS) & (predictions == prediction)).sum())
            assert content.confusion_CC[target][prediction] == expected
            cell = [page for page in content.pages if (page.target, page.prediction) == (target, prediction)]
            assert [page.confidence for page in cell] == sorted(page.confidence for page in cell)
    assert content.num_mistakes == (predictions != TARGETS).sum() > 3
    assert dict(content.facts)["Started"] == "2026-01-01 10:11:12"
    assert content.class_rows[3].metrics.num_samples == 0 and content.class_rows[3].mistaken_for is None


def test_probabilities_are_cross_fitted(tmp_path: Path) -> None:
    content = derive_content(read_inputs(write_run(tmp_path)))
    fit = cross_fit(OofRows(TARGETS, draw_logits(), FOLD_OF))
    assert len(set(fit.temperatures)) == 3
    for page in content.pages:
        expected = probabilities(draw_logits()[[page.row]] / fit.temperatures[FOLD_OF[page.row]])[0]
        assert [p for _, p in page.top] == pytest.approx(sorted(expected)[:0:-1])
        assert [expected[column] for column, _ in page.top] == pytest.approx([p for _, p in page.top])


def test_reliability_bins_give_the_calibration_errors(tmp_path: Path) -> None:
    content = derive_content(read_inputs(write_run(tmp_path)))
    assert [item.name for item in content.reliability] == ["clean", "damaged"]
    for item in content.reliability:
        for bins, ece in ((item.before, item.calibration.ece), (item.after, item.calibration.ece_calibrated)):
            assert bins.count_B.sum() == COUNT
            gaps = np.abs(bins.confidence_B - bins.accuracy_B)
            assert (gaps * bins.count_B).sum() / COUNT == pytest.approx(ece)
    probs = probabilities(draw_logits())
    ece = measure_ece(probs.max(axis=1), probs.argmax(axis=1) == TARGETS)
    assert content.reliability[0].calibration.ece == pytest.approx(ece)


def test_skipped_rows_and_runs_without_damaged_copies(tmp_path: Path) -> None:
    content = derive_content(read_inputs(write_run(tmp_path, skipped=(4, 17), is_damaged=False)))
    assert {page.row for page in content.pages} == set(range(COUNT)) - {4, 17}
    assert sum(map(sum, content.confusion_CC)) == COUNT - 2
    assert dict(content.facts)["Pages"] == "28 and 2 skipped"
    assert [item.name for item in content.reliability] == ["clean"]
    assert all(row.damaged is None for row in content.folds) and content.summary.damaged is None


def test_groups_are_named(tmp_path: Path) -> None:
    inputs = read_inputs(write_run(tmp_path, groups=[f"group{row // 3}" for row in range(COUNT)]))
    assert inputs.merged.groups is not None
    assert derive_content(inputs).summary.interval_units == "groups"


def test_mistakes_come_most_confident_first() -> None:
    pages = [make_page(0, 1, 1, 0.99), make_page(1, 0, 1, 0.5), make_page(2, 0, 2, 0.9), make_page(3, 1, 2, 0.9)]
    assert [page.row for page in find_confident_mistakes(pages, 2)] == [2, 3]


def test_thumbnails_favour_mistakes_and_cells_take_turns() -> None:
    pages = [
        make_page(0, 0, 0, 0.6), make_page(1, 0, 0, 0.8),
        make_page(2, 0, 1, 0.3), make_page(3, 0, 1, 0.4), make_page(4, 0, 1, 0.9),
        make_page(5, 1, 0, 0.5), make_page(6, 1, 1, 0.7),
    ]  # fmt: skip
    ordered = order_for_thumbnails(pages, find_confident_mistakes(pages, 1))
    assert [page.row for page in ordered] == [4, 2, 5, 3, 0, 6, 1]


def test_commands_quote_the_run(tmp_path: Path) -> None:
    inputs = read_inputs(write_run(tmp_path / "my runs"))
    commands = [command.text for command in derive_content(inputs).commands]
    assert commands[0] == f"doccls predict '{inputs.paths.root}'" and any("preview" in text for text in commands)
    without = derive_content(replace(inputs, snapshot=None))
    assert not any("preview" in command.text for command in without.commands) and without.settings == ()
