"""predictions.csv and review.csv: every page in order, and the uncertain ones, the least certain first."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from doccls.errors import UserError
from doccls.prediction import results
from doccls.prediction.results import (
    Predictions,
    Source,
    check_predictions,
    render_predictions,
    render_review,
    write_predictions,
)
from doccls.prediction.submission import Coverage
from doccls.run.paths import ResultPaths
from doccls.system.atomic_files import write_text

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


def write(paths: ResultPaths, min_confidence: float | None = None, images: Path | None = Path("/scans")) -> None:
    write_predictions(paths, PREDICTIONS, Source(("run",), images), COVERAGE, False, min_confidence)


def test_earlier_review_does_not_stay_beside_new_predictions(tmp_path: Path) -> None:
    paths = ResultPaths(tmp_path)
    write(paths, 0.5)
    assert paths.review.exists()
    write(paths)
    assert not paths.review.exists() and paths.predictions.read_text() == render_predictions(PREDICTIONS, False)


# --- what new predictions may replace --------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> ResultPaths:
    """Return results of two folds for the images of /scans."""
    paths = ResultPaths(tmp_path / "scans")
    write(paths, 0.9)
    return paths


def check(paths: ResultPaths, images: str | None = "/scans", run: str = "run", coverage: Coverage = COVERAGE) -> None:
    check_predictions(paths, Source((run,), None if images is None else Path(images)), coverage)


def test_predictions_of_the_same_folder_may_be_replaced_even_by_fewer(paths: ResultPaths) -> None:
    check(paths, coverage=Coverage((0, 1), 1, 1))
    check(ResultPaths(paths.root / "new"), "/other")
    record = json.loads(paths.predictions_record.read_text())
    assert record["images"] == "/scans" and record["runs"] == ["run"] and record["num_rows"] == 4


@pytest.mark.parametrize(
    ("images", "run", "coverage", "message"),
    [
        ("/other/scans", "run", COVERAGE, "has the predictions of /scans: choose another folder by --output"),
        (None, "run", COVERAGE, "has the predictions of /scans"),
        ("/scans", "other", COVERAGE, "has the predictions of another run"),
        ("/scans", "run", Coverage((0,), 4, 4), "was predicted by 2 folds, not by 1"),
        ("/scans", "run", Coverage((0, 1), 4, 0), "none of the 4 images can be used"),
    ],
)
def test_other_predictions_are_not_replaced(
    paths: ResultPaths, images: str | None, run: str, coverage: Coverage, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(paths, images, run, coverage)


@pytest.mark.parametrize("record", [None, "{", "[]", "{}", '{"format": "doccls-predictions-9"}'])
def test_predictions_without_readable_record_are_not_replaced(paths: ResultPaths, record: str | None) -> None:
    if record is None:
        paths.predictions_record.unlink()
    else:
        paths.predictions_record.write_text(record)
    with pytest.raises(UserError, match=r"predictions\.json doesn't say that doccls wrote it"):
        check(paths)
    for path in (paths.predictions, paths.review, paths.predictions_record):
        path.unlink(missing_ok=True)
    check(paths)


@pytest.mark.parametrize("name", ["predictions.csv", "review.csv"])
def test_files_with_a_persons_notes_are_not_replaced(paths: ResultPaths, name: str) -> None:
    path = paths.root / name
    path.write_text(path.read_text().replace("10", "2"))
    with pytest.raises(UserError, match=rf"{name} has changed since doccls wrote it: rename or delete it"):
        check(paths)
    path.unlink()
    check(paths)
    path.mkdir()
    with pytest.raises(UserError, match=rf"{name} has changed"):
        check(paths)


def test_killed_process_leaves_files_that_can_be_replaced(paths: ResultPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed after each of its writes in turn."""
    changed = dataclasses.replace(PREDICTIONS, chosen_N=np.array([0, 0, 1, 2]))
    for survived in range(1, 4):
        count = itertools.count()

        def write_some(path: Path, text: str, count: Iterator[int] = count, limit: int = survived) -> None:
            if next(count) == limit:
                raise KeyboardInterrupt
            write_text(path, text)

        monkeypatch.setattr(results, "write_text", write_some)
        arguments = (Source(("run",), Path("/scans")), COVERAGE, survived % 2 == 0, 0.5)
        with contextlib.suppress(KeyboardInterrupt):
            write_predictions(paths, changed, *arguments)
        check(paths)


def test_images_are_not_predicted_into_a_folder_with_a_submission(tmp_path: Path) -> None:
    (tmp_path / "submission.csv").write_text("ID,target\n")
    with pytest.raises(UserError, match="has the submission of a run: choose another folder by --output"):
        check(ResultPaths(tmp_path))
    check(ResultPaths(tmp_path), None)


def test_page_without_a_finite_confidence_is_reviewed() -> None:
    probs_NC = PREDICTIONS.probs_NC.copy()
    probs_NC[0] = np.nan
    assert dataclasses.replace(PREDICTIONS, probs_NC=probs_NC).list_uncertain(0.1).tolist() == [1, 0]
