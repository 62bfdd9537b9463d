"""Studies: their runs, the order of their folds, and the ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from doccls.errors import UserError
from doccls.oof.summary import DamagedCopies, Summary, summarize
from launcher.study import (
    Standing,
    Work,
    check_study_name,
    describe_study,
    list_runs,
    order_folds,
    parse_seeds,
    rank_runs,
    render_leaderboard,
)


def test_runs_are_configs_times_seeds() -> None:
    runs = list_runs("s", [Path("conf/a b.yaml"), Path("x/b.yml")], [7, 8])
    assert [(run.run_id, run.overrides) for run in runs] == [
        ("s-a-b-s7", ("project.seed=7",)),
        ("s-a-b-s8", ("project.seed=8",)),
        ("s-b-s7", ("project.seed=7",)),
        ("s-b-s8", ("project.seed=8",)),
    ]
    (run,) = list_runs("s", [Path("...yaml")], [])
    assert (run.run_id, run.overrides, run.seed) == ("s-config", (), None)
    (run,) = list_runs("s", [Path("x" * 200 + ".yaml")], [3])
    assert len(run.run_id) == 80 and run.run_id.endswith("x-s3")


def test_configs_with_one_run_id_are_refused() -> None:
    with pytest.raises(UserError, match=r"a/c.yaml and b/c.yaml would both be run s-c: rename one"):
        list_runs("s", [Path("a/c.yaml"), Path("b/c.yaml")], [])


@pytest.mark.parametrize("text", ["", "1,", "1,-2", "a", "1,1", "1;2", "٣"])
def test_malformed_seeds_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_seeds_and_names_are_parsed() -> None:
    assert parse_seeds("42, 43,0") == (42, 43, 0) and check_study_name("v1.2_x-y") == "v1.2_x-y"
    for name in ("", "../x", "-x", "a/b", "a" * 41):
        with pytest.raises(UserError, match="--study"):
            check_study_name(name)


def test_longest_folds_start_first_and_runs_stay_together() -> None:
    works = [Work(0, (0, 1), 5.0, None), Work(1, (1, 2), 9.0, None), Work(2, (0,), 5.0, None)]
    assert order_folds(works) == [(1, 1), (1, 2), (0, 0), (0, 1), (2, 0)]


def test_finished_folds_say_how_long_others_take() -> None:
    works = [Work(0, (1,), 10.0, 2.0), Work(1, (0,), 1.0, None), Work(2, (4,), 1.0, 50.0)]
    # The rates are 0.2 and 50 s per unit, so a fold of run 1 is expected to take their mean.
    assert order_folds(works) == [(2, 4), (1, 0), (0, 1)]
    assert order_folds([Work(0, (), 1.0, 1.0)]) == []


def make_summary(hits: int, damaged_hits: int | None) -> Summary:
    targets = np.arange(20) % 2

    def draw(right: int) -> np.ndarray:
        chosen = np.where(np.arange(20) < right, targets, 1 - targets)
        return np.eye(2, dtype=np.float32)[chosen]

    copies = None if damaged_hits is None else DamagedCopies("scan", draw(damaged_hits), True)
    return summarize(targets, draw(hits), np.arange(20) % 4, (), ("a", "b"), copies=copies)


def make_standing(run_id: str, summary: Summary | None) -> Standing:
    return Standing(run_id, f"/e/{run_id}", "c.yaml", 42, 3, 4, 1.5, {"train.lr": "0.1"}, summary)


def test_ranking_is_by_damaged_pages_if_all_have_them() -> None:
    first, second = make_standing("a", make_summary(18, 10)), make_standing("b", make_summary(16, 14))
    unmerged = replace(make_standing("c", None), problem="fold 2 failed")
    assert [standing.run_id for standing in rank_runs([unmerged, first, second])] == ["b", "a", "c"]
    clean = make_standing("d", make_summary(17, None))
    assert [standing.run_id for standing in rank_runs([unmerged, clean, first, second])] == ["a", "d", "b", "c"]


def test_leaderboard_and_study_file_say_how_each_run_did() -> None:
    standings = [replace(make_standing("c", None), problem="fold 2 failed"), make_standing("a", make_summary(20, 20))]
    lines = render_leaderboard(standings)
    assert lines[1].startswith(" 1  a  1.0000 [1.000, 1.000]  1.0000 [1.000, 1.000]")
    assert lines[1].endswith("1.50  train.lr=0.1")
    assert lines[2].startswith(" 2  c  3 of 4 folds") and lines[3] == "      fold 2 failed"
    described = describe_study("s", standings)
    assert described["name"] == "s"
    runs = described["runs"]
    assert isinstance(runs, list) and [run["run_id"] for run in runs] == ["a", "c"]
    assert runs[0]["clean"] == {"macro_f1": 1.0, "low": 1.0, "high": 1.0} and "clean" not in runs[1]
    assert runs[1]["problem"] == "fold 2 failed" and runs[1]["finished_folds"] == 3
