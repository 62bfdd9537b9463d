"""How runs of a study did, by their files."""

from pathlib import Path

import numpy as np
import pytest

from doccls.oof.predictions import FoldPredictions, PredictionsInfo, write_predictions
from doccls.oof.summary import render_summary, summarize
from doccls.run.paths import RunPaths
from launcher import standings
from launcher.standings import measure_runs
from launcher.study_file import Member, Study, locate_member

STUDY = Study("s", "resume", (Member("a", "20260102/a", "c.yaml", 42, 4, {}, 2),))
TARGETS = np.arange(20) % 2


def write_fold(paths: RunPaths, fold: int, score: float, damaged: float | None) -> None:
    info = PredictionsInfo(
        "f" * 64, fold, 4, 20, ("a", "b"), ("x",), (), 1, score, damage="none" if damaged is None else "scan",
        macro_f1_damaged=damaged,
    )  # fmt: skip
    logits = np.zeros((1, 2), np.float32)
    copies = None if damaged is None else logits
    write_predictions(
        paths.predictions(fold), FoldPredictions(info, np.array([fold]), logits, np.zeros(1, np.int64), copies)
    )


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = locate_member(tmp_path / "studies" / "s", STUDY.members[0])
    paths.predictions(0).parent.mkdir(parents=True)
    return paths


def test_run_that_is_not_merged_has_the_mean_of_its_folds(paths: RunPaths, tmp_path: Path) -> None:
    write_fold(paths, 1, 0.5, 0.25)
    write_fold(paths, 3, 0.75, 0.5)
    paths.predictions(2).write_bytes(b"damaged")
    (standing,) = measure_runs(tmp_path / "studies" / "s", STUDY, {})
    assert (standing.finished, standing.mean, standing.mean_damaged) == (2, 0.625, 0.375)
    assert standing.summary is None and standing.is_complete and standing.problem is None
    write_fold(paths, 0, 0.5, None)
    (standing,) = measure_runs(tmp_path / "studies" / "s", STUDY, {})
    assert standing.finished == 3 and standing.mean_damaged is None  # not all folds have such a score


def test_predictions_of_a_merged_run_are_not_read(
    paths: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fold in range(4):
        write_fold(paths, fold, 0.5, None)
    logits = np.eye(2, dtype=np.float32)[TARGETS]
    summary = summarize(TARGETS, logits, np.arange(20) % 4, (), ("a", "b"))
    paths.summary.write_text(render_summary(summary))
    monkeypatch.setattr(standings, "read_predictions", None)
    (standing,) = measure_runs(tmp_path / "studies" / "s", STUDY, {})
    assert (standing.finished, standing.score, standing.problem) == (4, 1.0, None)


def test_damaged_summary_is_the_problem_of_its_run(paths: RunPaths, tmp_path: Path) -> None:
    write_fold(paths, 0, 0.5, None)
    paths.summary.write_text("{")
    (standing,) = measure_runs(tmp_path / "studies" / "s", STUDY, {})
    assert standing.problem is not None and str(paths.summary) in standing.problem
    assert (standing.finished, standing.mean) == (1, 0.5)
