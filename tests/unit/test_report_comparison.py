"""What a comparison says, from the files of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from doccls.errors import UserError
from doccls.oof.bootstrap import bootstrap_accuracy_gap, bootstrap_gap
from doccls.report.comparison import (
    OUTCOMES,
    Comparison,
    PagePredictions,
    Pair,
    RunRecord,
    compare_scores,
    derive_comparison,
    find_differing_keys,
    order_rows,
    sort_outcomes,
)
from doccls.report.cost import Cost
from doccls.report.inputs import read_inputs
from tests.unit.report_runs import CLASSES, COUNT, IDS, TARGETS, draw_logits, write_run

NO_COST = Cost((), (), None, (), (), 0, 0)


def read_record(folder: Path, seed: int, damage_version: str | None = "1", **changes: object) -> RunRecord:
    """Write a run and read it; `changes` are those of `write_run`."""
    return RunRecord(read_inputs(write_run(folder, seed=seed, **changes)), NO_COST, damage_version)  # type: ignore[arg-type]


def change(record: RunRecord, **changes: object) -> RunRecord:
    """Return the record with other values of its merged predictions."""
    merged = replace(record.inputs.merged, **changes)  # type: ignore[arg-type]
    return replace(record, inputs=replace(record.inputs, merged=merged))


def refuse(records: Sequence[RunRecord]) -> str:
    with pytest.raises(UserError) as caught:
        derive_comparison(records)
    return str(caught.value)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    folder = tmp_path_factory.mktemp("runs")
    return [read_record(folder, seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def comparison(records: list[RunRecord]) -> Comparison:
    return derive_comparison(records)


def test_differences_are_those_computed_by_hand() -> None:
    targets = np.array([0, 0, 1, 1])
    # F1 of the first: class 0 has 2 hits of 2 pages and 3 predictions (4/5), class 1 has 1 of 2 and 1 (2/3).
    scores = compare_scores("clean", targets, np.array([0, 0, 1, 0]), targets, 2)
    assert scores.macro_f1.value == pytest.approx(1 - (4 / 5 + 2 / 3) / 2) and scores.accuracy.value == 0.25
    assert scores.num_changed == 1 and scores.accuracy.low >= 0 and scores.accuracy.high > 0.25
    reverse = compare_scores("clean", targets, targets, np.array([0, 0, 1, 0]), 2)
    assert reverse.macro_f1.value == -scores.macro_f1.value and reverse.accuracy.high <= 0


def test_equal_predictions_differ_by_exactly_nothing() -> None:
    predictions = draw_logits().argmax(axis=1)
    scores = compare_scores("clean", TARGETS, predictions, predictions.copy(), len(CLASSES))
    for difference in (scores.macro_f1, scores.accuracy):
        assert (difference.value, difference.low, difference.high) == (0, 0, 0) and not difference.excludes_0
    assert scores.num_changed == 0


def test_each_run_is_compared_with_the_first(comparison: Comparison) -> None:
    assert [run.letter for run in comparison.runs] == ["A", "B", "C"]
    first = draw_logits(1).argmax(axis=1)
    for pair, seed in zip(comparison.pairs, (2, 3), strict=True):
        other = draw_logits(seed).argmax(axis=1)
        clean, damaged = pair.differences
        assert (clean.pages, damaged.pages) == ("clean", "damaged")
        assert (clean.macro_f1.low, clean.macro_f1.high) == bootstrap_gap(TARGETS, other, first, 4)
        assert (clean.accuracy.low, clean.accuracy.high) == bootstrap_accuracy_gap(TARGETS, other, first, 4)
        summaries = [comparison.runs[number].content.summary for number in (seed - 1, 0)]
        assert clean.macro_f1.value == pytest.approx(summaries[0].macro_f1 - summaries[1].macro_f1)
        assert clean.accuracy.value == pytest.approx(summaries[0].accuracy - summaries[1].accuracy)
        assert summaries[0].damaged is not None and summaries[1].damaged is not None
        assert damaged.macro_f1.value == pytest.approx(summaries[0].damaged.macro_f1 - summaries[1].damaged.macro_f1)
        assert clean.num_changed == (first != other).sum() and pair.notes == ()


def test_groups_are_resampled(tmp_path: Path) -> None:
    groups = [f"group{row // 5}" for row in range(COUNT)]
    records = [read_record(tmp_path, seed, groups=groups) for seed in (1, 2)]
    units = np.arange(COUNT) // 5
    first, other = (draw_logits(seed).argmax(axis=1) for seed in (1, 2))
    expected = bootstrap_gap(TARGETS, other, first, 4, units)
    # A blend records no groups; those of the other run are taken.
    for given in (records, [change(records[0], groups=None), records[1]]):
        comparison = derive_comparison(given)
        difference = comparison.pairs[0].differences[0].macro_f1
        assert (difference.low, difference.high) == expected != bootstrap_gap(TARGETS, other, first, 4)
        assert comparison.interval_units == "groups"
    without = derive_comparison([change(record, groups=None) for record in records])
    assert without.interval_units == "rows" and "too narrow" in without.notes[0]
    assert "the groups differ in 30 of 30 rows" in refuse([records[0], change(records[1], groups=IDS)])


def test_outcomes_hold_each_page_once(comparison: Comparison) -> None:
    for number, pair in enumerate(comparison.pairs, 1):
        assert sorted(row for rows in pair.outcomes for row in rows) == list(range(COUNT))
        first, other = (draw_logits(seed).argmax(axis=1) for seed in (1, 1 + number))
        counts = dict(zip(OUTCOMES, map(len, pair.outcomes), strict=True))
        assert counts == {
            "only first right": ((first == TARGETS) & (other != TARGETS)).sum(),
            "only other right": ((first != TARGETS) & (other == TARGETS)).sum(),
            "both wrong, differently": ((first != TARGETS) & (other != TARGETS) & (first != other)).sum(),
            "both wrong, alike": ((first != TARGETS) & (first == other)).sum(),
            "both right": ((first == TARGETS) & (other == TARGETS)).sum(),
        }
        assert min(counts.values()) > 0


def test_pages_that_both_are_most_certain_of_come_first() -> None:
    pages = [
        PagePredictions(row, f"page{row}", 0, ((0, first), (5, 1.0), (1, other)))
        for row, (first, other) in enumerate([(0.9, 0.3), (0.5, 0.6), (0.6, 0.5), (0.4, 0.9)])
    ]
    outcomes = dict(zip(OUTCOMES, sort_outcomes(pages, 2), strict=True))
    assert outcomes["only first right"] == (1, 2, 3, 0)
    assert [rows for name, rows in outcomes.items() if name != "only first right"] == [()] * 4


def test_thumbnails_favour_disagreements_and_outcomes_take_turns() -> None:
    pairs = [Pair("B", (), (), ((7, 8), (1,), (2,), (3, 4), (5, 6))), Pair("C", (), (), ((8,), (3,), (), (7, 5), (6,)))]
    assert order_rows(pairs) == [7, 1, 2, 8, 3, 4, 5, 6]


def test_classes_come_by_their_largest_difference(comparison: Comparison) -> None:
    largest = [row.largest for row in comparison.class_rows]
    assert largest == sorted(largest, reverse=True) and largest[0] > 0
    row = next(row for row in comparison.class_rows if row.label == "dog")
    f1 = [run.content.summary.classes[1].f1 for run in comparison.runs]
    assert row.f1 == tuple(f1) and row.differences == (f1[1] - f1[0], f1[2] - f1[0])
    assert row.largest == max(abs(f1[1] - f1[0]), abs(f1[2] - f1[0]))


def test_only_differing_keys_are_listed() -> None:
    found = find_differing_keys([(("a", "1"), ("b", "2")), (("a", "1"), ("b", "3"), ("c", "4"))])
    assert [(row.key, row.values) for row in found] == [("b", ("2", "3")), ("c", (None, "4"))]


def test_provenance_is_apart_and_ids_are_left_out(records: list[RunRecord], comparison: Comparison) -> None:
    assert comparison.settings == () and comparison.provenance == () and comparison.configured == ("A", "B", "C")
    snapshot = records[1].inputs.snapshot
    assert snapshot is not None
    changed = {**snapshot, "mode": "highperf", "provenance": {**snapshot["provenance"], "device": ["H100"]}}
    found = derive_comparison([records[0], replace(records[1], inputs=replace(records[1].inputs, snapshot=changed))])
    assert [(row.key, row.values) for row in found.settings] == [("mode", ("basic", "highperf"))]
    assert [(row.key, row.values) for row in found.provenance] == [("device", (None, "H100"))]
    without = derive_comparison([records[0], replace(records[1], inputs=replace(records[1].inputs, snapshot=None))])
    assert without.configured == ("A",) and without.settings == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": (IDS[1], IDS[0], *IDS[2:])}, "the IDs differ in 2 of 30 rows (first in row 0, ID 'page00.jpg')"),
        ({"targets_N": np.roll(TARGETS, 1)}, "the labels differ in 30 of 30 rows"),
        ({"classes": CLASSES[::-1]}, "the classes are in another order: owl, fish, dog, cat"),
        ({"skipped": (3,)}, "the rows without a usable image differ in 1 of 30 rows (first in row 3"),
        ({"ids": IDS[:-1]}, "29 rows instead of 30"),
    ],
)
def test_runs_on_other_rows_are_refused(records: list[RunRecord], changes: dict[str, object], message: str) -> None:
    text = refuse([records[0], records[1], change(records[2], **changes)])
    assert f"{records[2].inputs.paths.root}: {message}" in text and str(records[1].inputs.paths.root) not in text
    assert f"compared with {records[0].inputs.paths.root}" in text


def test_a_run_that_is_named_twice_is_refused(records: list[RunRecord]) -> None:
    assert f"RUN {records[0].inputs.paths.root} is named twice" in refuse([records[0], records[1], records[0]])


def test_other_folds_are_a_note(records: list[RunRecord], comparison: Comparison) -> None:
    folds = np.roll(records[1].inputs.merged.folds_N, 4)
    found = derive_comparison([records[0], change(records[1], folds_N=folds)])
    assert "the folds of A and B differ (12 pages are in another fold" in found.pairs[0].notes[0]
    assert found.pairs[0].differences == comparison.pairs[0].differences
    assert not any("doccls blend" in command.text for command in found.commands)


def test_other_folds_are_a_note_with_groups_too(records: list[RunRecord]) -> None:
    folds = np.roll(records[1].inputs.merged.folds_N, 4)
    grouped = [change(records[0], groups=IDS), change(records[1], groups=IDS, folds_N=folds)]
    assert "the folds of A and B differ" in derive_comparison(grouped).pairs[0].notes[0]


def test_other_data_is_a_note(records: list[RunRecord]) -> None:
    snapshot = records[1].inputs.snapshot
    assert snapshot is not None
    changed = {**snapshot, "provenance": {**snapshot["provenance"], "data_digest": "other"}}
    found = derive_comparison([records[0], replace(records[1], inputs=replace(records[1].inputs, snapshot=changed))])
    assert "the data of A and B differ by config.yaml" in found.pairs[0].notes[0]
    assert not any("doccls blend" in command.text for command in found.commands)


def test_other_damage_leaves_out_its_difference(records: list[RunRecord], tmp_path: Path) -> None:
    other_version = derive_comparison([records[0], replace(records[1], damage_version="2"), records[2]])
    assert [len(pair.differences) for pair in other_version.pairs] == [1, 2]
    assert "different versions of doccls damaged" in other_version.pairs[0].notes[0]
    without = derive_comparison([records[0], read_record(tmp_path, 4, is_damaged=False)])
    assert [scores.pages for scores in without.pairs[0].differences] == ["clean"]
    assert "only some of the runs were validated on damaged copies" in without.pairs[0].notes[0]
    undamaged = derive_comparison([read_record(tmp_path, seed, is_damaged=False) for seed in (5, 6)])
    assert undamaged.pairs[0].notes == () and len(undamaged.pairs[0].differences) == 1


def test_selection_is_told_of_each_run(records: list[RunRecord], comparison: Comparison) -> None:
    assert len(comparison.notes) == 1 and "so the scores are optimistic" in comparison.notes[0]
    summary = replace(records[1].inputs.summary, selection="by chance", notes=("a caveat",))
    found = derive_comparison([records[0], replace(records[1], inputs=replace(records[1].inputs, summary=summary))])
    assert found.notes[0].startswith("A: each fold's best epoch") and found.notes[1:] == ("B: by chance", "B: a caveat")


def test_skipped_rows_are_left_out(tmp_path: Path) -> None:
    found = derive_comparison([read_record(tmp_path, seed, skipped=(4, 17)) for seed in (1, 2)])
    assert {page.row for page in found.pages} == set(range(COUNT)) - {4, 17}


def test_commands_quote_the_runs(tmp_path: Path) -> None:
    records = [read_record(tmp_path / "my runs", seed) for seed in (1, 2)]
    roots = [record.inputs.paths.root for record in records]
    texts = [command.text for command in derive_comparison(records).commands]
    assert texts == [
        f"doccls blend '{roots[0]}' '{roots[1]}'", f"doccls report '{roots[0]}'", f"doccls report '{roots[1]}'",
    ]  # fmt: skip
