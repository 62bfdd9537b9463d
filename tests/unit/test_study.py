"""Studies: their runs, the order of their folds, the ranking, and study.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from doccls.errors import UserError
from doccls.oof.summary import DamagedCopies, Summary, summarize
from launcher.leaderboard import Standing, rank_runs, render_leaderboard
from launcher.standings import measure_runs
from launcher.study import Work, check_study_name, list_runs, naming_study, order_folds, parse_grid, parse_seeds
from launcher.study_file import Member, Study, find_study, locate_member, read_study, write_study


def test_runs_are_configs_times_seeds() -> None:
    runs = list_runs("s", [Path("conf/a b.yaml"), Path("x/b.yml")], [7, 8])
    assert [(run.run_id, run.list_overrides(7)) for run in runs] == [
        ("s-a-b-s7", ["project.seed=7"]),
        ("s-a-b-s8", ["project.seed=8", "data.fold_seed=7"]),
        ("s-b-s7", ["project.seed=7"]),
        ("s-b-s8", ["project.seed=8", "data.fold_seed=7"]),
    ]
    (run,) = list_runs("s", [Path("...yaml")], [])
    assert (run.run_id, run.list_overrides(None), run.seed) == ("s-config", [], None)
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
    return Standing(run_id, 3, 4, 1.5, {"train.lr": "0.1"}, summary, 4)


def test_ranking_is_by_damaged_pages_if_all_have_them() -> None:
    first, second = make_standing("a", make_summary(18, 10)), make_standing("b", make_summary(16, 14))
    unmerged = replace(make_standing("c", None), problem="fold 2 failed")
    assert [standing.run_id for standing in rank_runs([unmerged, first, second])] == ["b", "a", "c"]
    clean = make_standing("d", make_summary(17, None))
    assert [standing.run_id for standing in rank_runs([unmerged, clean, first, second])] == ["a", "d", "b", "c"]


def test_runs_of_single_folds_are_ranked_by_them() -> None:
    one = replace(make_standing("a", None), finished=1, wanted=1, mean=0.5, mean_damaged=0.25)
    better = replace(one, run_id="b", mean=0.75, mean_damaged=0.5)
    unfinished = replace(one, run_id="c", finished=0, mean=None, mean_damaged=None)
    assert [standing.is_complete for standing in (one, better, unfinished, make_standing("d", None))] == [
        True, True, False, False,
    ]  # fmt: skip
    lines = render_leaderboard([unfinished, one, better])
    assert lines[1].startswith(" 1  b  0.7500 (1 of 4 folds)  0.5000") and lines[2].startswith(" 2  a  0.5000")
    assert lines[3].startswith("    c  0 of 4 folds")


def test_leaderboard_and_study_file_say_how_each_run_did(tmp_path: Path) -> None:
    standings = [replace(make_standing("c", None), problem="fold 2 failed"), make_standing("a", make_summary(20, 20))]
    lines = render_leaderboard(standings)
    assert lines[1].startswith(" 1  a  1.0000 [1.000, 1.000]  1.0000 [1.000, 1.000]")
    assert lines[1].endswith("1.50  train.lr=0.1")
    assert lines[2].startswith("    c  3 of 4 folds") and lines[3] == "      fold 2 failed"  # no place without a score
    study = Study("s", "doccls-launch run --study s", (make_member("a"), make_member("c")))
    write_study(tmp_path, study, standings)
    runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert [run["run_id"] for run in runs] == ["a", "c"]
    assert runs[0]["clean"] == {"macro_f1": 1.0, "low": 1.0, "high": 1.0} and "clean" not in runs[1]
    assert runs[1]["problem"] == "fold 2 failed" and runs[1]["finished_folds"] == 3
    assert read_study(tmp_path) == study


def make_member(run_id: str) -> Member:
    return Member(run_id, f"20260102/{run_id}", "c.yaml", 42, 4, {"train.lr": "0.1"}, 4)


def test_study_keeps_the_runs_of_earlier_commands() -> None:
    before = Study("s", "first", (make_member("a"), make_member("b")))
    after = Study("s", "second", (make_member("c"), replace(make_member("a"), seed=7)))
    assert after.join(None) == after
    assert after.join(before) == Study("s", "second", (*after.members, make_member("b")))


def test_runs_are_found_from_the_study(tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "s"
    assert locate_member(folder, make_member("a")).root == tmp_path / "20260102" / "a"
    (standing,) = measure_runs(folder, Study("s", "x", (make_member("a"),)), {"a": "no space left"})
    assert standing == replace(make_standing("a", None), finished=0, device_hours=None, problem="no space left")
    assert read_study(folder) is None and find_study(folder) is None
    folder.mkdir(parents=True)
    write_study(folder, Study("s", "x", ()), [])
    assert find_study(folder) == find_study(folder / "study.json") == folder


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "doccls-study-1"}', '{"format": "doccls-study-9"}', "FOREIGN"]
)
def test_damaged_study_is_refused(content: str, tmp_path: Path) -> None:
    write_study(tmp_path, Study("s", "x", (make_member("a"),)), [make_standing("a", None)])
    text = (tmp_path / "study.json").read_text()
    (tmp_path / "study.json").write_text(text.replace("20260102/a", "../../a") if content == "FOREIGN" else content)
    with pytest.raises(UserError, match=r"study.json: damaged \(.*Delete it to continue"):
        read_study(tmp_path)


def test_grid_has_every_combination() -> None:
    assert parse_grid([]) == ((),)
    assert parse_grid(["train.lr=1e-4, 3e-4", "train.epochs=2,4"]) == (
        ("train.lr=1e-4", "train.epochs=2"),
        ("train.lr=1e-4", "train.epochs=4"),
        ("train.lr=3e-4", "train.epochs=2"),
        ("train.lr=3e-4", "train.epochs=4"),
    )
    runs = list_runs("s", [Path("c.yaml")], [7], parse_grid(["train.lr=1e-4,3e-4", "model.name=a/b"]))
    assert [run.list_overrides(None) for run in runs] == [
        ["train.lr=1e-4", "model.name=a/b", "project.seed=7"],
        ["train.lr=3e-4", "model.name=a/b", "project.seed=7"],
    ]
    ids = [run.run_id for run in runs]
    assert len(set(ids)) == 2 and all(run_id.startswith("s-c-x") and run_id.endswith("-s7") for run_id in ids)
    (run,) = list_runs("s", [Path("c.yaml")], [], parse_grid(["train.lr=1e-4"]))
    assert run.run_id == "s-c-lr1e-4"


def test_errors_about_a_run_advise_what_a_study_takes() -> None:
    with pytest.raises(UserError, match=r"^fingerprint 1: choose another --study$"), naming_study():
        raise UserError("fingerprint 1: choose another --run-id")
    with pytest.raises(UserError, match=r"^no space$"), naming_study():
        raise UserError("no space")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train.lr"], "write key=value,value"),
        (["=1"], "write key=value,value"),
        (["train.lr=1,"], "write key=value,value"),
        (["a=[1,2]"], "a list or mapping"),
        (["a=1", "a=2"], "a is there twice"),
        (["a=1,1"], "a value is there twice"),
        (["train.lr=1e-4,0.0001"], "a value is there twice"),
    ],
)
def test_malformed_grids_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"--set-each .*{message}"):
        parse_grid(texts)
