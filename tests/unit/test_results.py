"""predictions.csv and review.csv: every page in order, and the uncertain ones, the least certain first."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from doccls.errors import UserError
from doccls.prediction.results import (
    Predictions,
    check_folder_replacement,
    render_predictions,
    render_review,
    write_folder_record,
    write_predictions,
)
from doccls.prediction.submission import Coverage, check_replacement
from doccls.run.paths import ResultPaths

PREDICTIONS = Predictions(
    ids=("z.jpg", "bad.png", 'a,"b', "c"),
    classes=("2", "10", "x,y"),
    probs_NC=np.array([[0.25, 0.7, 0.05], [0.5, 0.25, 0.25], [0.4, 0.35, 0.25], [0.0, 0.1, 0.9]]),
    chosen_N=np.array([1, 0, 1, 2]),  # thresholds chose 10 for the third page
    has_image_N=np.array([True, False, True, True]),
)
COVERAGE = Coverage((0, 1), 4, 3)


def parse(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_each_page_has_its_label_and_the_probability_of_that_label() -> None:
    assert parse(render_predictions(PREDICTIONS, False)) == [
        ["ID", "prediction", "confidence"],
        ["z.jpg", "10", "0.700000"],
        ["bad.png", "", ""],
        ['a,"b', "10", "0.350000"],
        ["c", "x,y", "0.900000"],
    ]


def test_probabilities_have_a_column_per_class_on_request() -> None:
    rows = parse(render_predictions(PREDICTIONS, True))
    assert rows[0] == ["ID", "prediction", "confidence", "prob_2", "prob_10", "prob_x,y"]
    assert rows[1] == ["z.jpg", "10", "0.700000", "0.250000", "0.700000", "0.050000"]
    assert rows[2] == ["bad.png", "", "", "", "", ""]


def test_review_lists_bad_pages_then_the_least_certain_ones_with_an_alternative() -> None:
    assert parse(render_review(PREDICTIONS, 0.9)) == [
        ["ID", "prediction", "confidence", "alternative", "alternative_confidence"],
        ["bad.png", "", "", "", ""],
        ['a,"b', "10", "0.350000", "2", "0.400000"],
        ["z.jpg", "10", "0.700000", "2", "0.250000"],
    ]
    assert [row[0] for row in parse(render_review(PREDICTIONS, 0))[1:]] == ["bad.png"]
    assert len(parse(render_review(PREDICTIONS, 1))) == 5


def test_earlier_review_does_not_stay_beside_new_predictions(tmp_path: Path) -> None:
    paths = ResultPaths(tmp_path)
    write_predictions(paths, PREDICTIONS, True, 0.5)
    assert paths.review.exists()
    write_predictions(paths, PREDICTIONS, False, None)
    assert not paths.review.exists() and paths.predictions.read_text() == render_predictions(PREDICTIONS, False)


# --- what predictions of a folder may replace ------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> ResultPaths:
    """Return results of two folds for the images of /scans."""
    paths = ResultPaths(tmp_path / "scans")
    write_predictions(paths, PREDICTIONS, False, None)
    write_folder_record(paths, Path("/scans"), COVERAGE)
    return paths


def test_predictions_of_the_same_folder_may_be_replaced_even_by_fewer(paths: ResultPaths) -> None:
    check_folder_replacement(paths, Path("/scans"), Coverage((0, 1), 1, 1))
    check_folder_replacement(ResultPaths(paths.root / "new"), Path("/other"), COVERAGE)
    assert json.loads(paths.predictions_record.read_text())["images"] == "/scans"


@pytest.mark.parametrize(
    ("folder", "coverage", "message"),
    [
        ("/other/scans", COVERAGE, "has the predictions of /scans: choose another folder by --output"),
        ("/scans", Coverage((0,), 4, 4), "was predicted by 2 folds, not by 1"),
        ("/scans", Coverage((0, 1), 4, 0), "none of the 4 images can be used"),
    ],
)
def test_other_predictions_are_not_replaced(paths: ResultPaths, folder: str, coverage: Coverage, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_folder_replacement(paths, Path(folder), coverage)


@pytest.mark.parametrize("record", [None, "{", "[]", "{}", '{"format": "doccls-predictions-9"}'])
def test_predictions_without_readable_record_are_not_replaced(paths: ResultPaths, record: str | None) -> None:
    if record is None:
        paths.predictions_record.unlink()
    else:
        paths.predictions_record.write_text(record)
    with pytest.raises(UserError, match=r"predictions\.json doesn't say of which images"):
        check_folder_replacement(paths, Path("/scans"), COVERAGE)


def test_submission_does_not_replace_the_predictions_of_a_folder(paths: ResultPaths) -> None:
    with pytest.raises(UserError, match=r"has the predictions of a folder of images .*--output"):
        check_replacement(paths, COVERAGE, "ID", ["a"])
