"""Submissions keep the sample's columns, IDs and order, and never replace a more complete one."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from doccls.errors import UserError
from doccls.prediction.submission import Coverage, check_replacement, render_submission, write_submission
from doccls.run.paths import ResultPaths

CLASSES = ("2", "10", "x,y")
PROBS = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.0, 0.25, 0.75]])
CHOSEN = PROBS.argmax(axis=1)


def parse(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_single_column_gets_label() -> None:
    assert parse(render_submission(["ID", "target"], "ID", ["007", "NA", 'a,"b'], CLASSES, PROBS, CHOSEN)) == [
        ["ID", "target"], ["007", "10"], ["NA", "2"], ['a,"b', "x,y"]
    ]  # fmt: skip


def test_labels_are_the_chosen_classes_and_not_the_most_probable_ones() -> None:
    text = render_submission(["ID", "target"], "ID", ["a", "b", "c"], CLASSES, PROBS, np.array([2, 1, 0]))
    assert [row[1] for row in parse(text)[1:]] == ["x,y", "10", "2"]


def test_columns_and_rows_keep_order_of_sample() -> None:
    assert parse(render_submission(["label", "image"], "image", ["c", "a", "b"], CLASSES, PROBS, CHOSEN)) == [
        ["label", "image"], ["10", "c"], ["2", "a"], ["x,y", "b"]
    ]  # fmt: skip


def test_columns_per_class_get_probabilities_by_name() -> None:
    rows = parse(render_submission(["x,y", "ID", "2", "10"], "ID", ["c", "a", "b"], CLASSES, PROBS, CHOSEN))
    assert rows[0] == ["x,y", "ID", "2", "10"]
    assert [row[1] for row in rows[1:]] == ["c", "a", "b"]
    np.testing.assert_allclose([[float(row[i]) for i in (2, 3, 0)] for row in rows[1:]], PROBS, atol=1e-8)


@pytest.mark.parametrize("columns", [["ID", "a", "b"], ["ID", "2", "10"], ["ID"], ["ID", "2", "10", "x,y", "more"]])
def test_other_columns_are_rejected_naming_both_forms(columns: list[str]) -> None:
    with pytest.raises(UserError, match="one column for the label or exactly one column per class"):
        render_submission(columns, "ID", ["a", "b", "c"], CLASSES, PROBS, CHOSEN)


@pytest.fixture
def paths(tmp_path: Path) -> ResultPaths:
    """Return a run with a submission of two folds for the rows a, b and c, one of which had no image."""
    paths = ResultPaths(tmp_path)
    text = render_submission(["ID", "target"], "ID", ["a", "b", "c"], CLASSES, PROBS, CHOSEN)
    write_submission(paths, text, PROBS, Coverage((0, 1), 3, 2))
    return paths


@pytest.mark.parametrize(
    ("coverage", "ids"),
    [
        (((0, 1), 3, 2), "abc"),
        (((0, 1), 3, 3), "abc"),
        (((3, 4), 3, 2), "cab"),
        (((0, 1, 2), 4, 2), "abcd"),
        (((0,), 1, 1), "z"),  # of other test images
    ],
)
def test_as_complete_or_other_submission_may_replace(
    paths: ResultPaths, coverage: tuple[tuple[int, ...], int, int], ids: str
) -> None:
    check_replacement(paths, Coverage(*coverage), "ID", list(ids))


@pytest.mark.parametrize(
    ("coverage", "ids", "lacking"),
    [
        (((0, 1), 2, 2), ["a", "b"], "(rows: 2 instead of 3; distinct IDs: 2 instead of 3)"),
        (((0, 1), 2, 2), ["a", "new"], "(rows: 2 instead of 3; distinct IDs: 2 instead of 3)"),
        (((0, 1), 2, 2), ["a.jpg", "b.PNG"], "(rows: 2 instead of 3; distinct IDs: 2 instead of 3)"),
        (((0, 1), 1, 2), ["./a"], "(rows: 1 instead of 3"),
        (((0, 1), 1, 2), ["img/A"], "(rows: 1 instead of 3"),
        (((0, 1), 12, 12), ["a", "b"] * 6, "(distinct IDs: 2 instead of 3)"),
        (((0,), 4, 2), list("abcd"), "(folds: 1 instead of 2)"),
        (((0, 1), 3, 1), list("abc"), "(usable images: 1 instead of 2)"),
        (((4,), 1, 1), ["c"], "folds: 1 instead of 2; usable images: 1 instead of 2)"),
    ],
)
def test_less_complete_submission_is_refused(
    paths: ResultPaths, coverage: tuple[tuple[int, ...], int, int], ids: list[str], lacking: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_replacement(paths, Coverage(*coverage), "ID", ids)
    assert lacking in str(caught.value) and str(paths.submission) in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        None,
        "{",
        "[]",
        "{}",
        json.dumps({"format": "doccls-submission-9"}),
        '{"format": "doccls-submission-1", "folds": 3}',
    ],
)
def test_rows_are_compared_without_readable_record(paths: ResultPaths, record: str | None) -> None:
    if record is None:
        paths.submission_record.unlink()
    else:
        paths.submission_record.write_text(record)
    check_replacement(paths, Coverage((0,), 3, 1), "ID", ["a", "b", "c"])
    with pytest.raises(UserError, match="rows: 2 instead of 3"):
        check_replacement(paths, Coverage((0, 1), 2, 2), "ID", ["a", "b"])


def test_empty_submission_may_be_replaced(paths: ResultPaths) -> None:
    paths.submission.write_bytes(b"")
    check_replacement(paths, Coverage((0,), 1, 1), "ID", ["a"])


def test_unreadable_submission_is_not_replaced(paths: ResultPaths) -> None:
    paths.submission.write_bytes(b"ID,target\n\xff,0\n")
    with pytest.raises(UserError, match=r"line 2: byte 0xff is not UTF-8 text(.|\n)*rename or delete it"):
        check_replacement(paths, Coverage((0,), 1, 1), "ID", ["a"])
