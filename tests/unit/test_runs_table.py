"""The table of runs: order, states, keys that differ, and how it is wrapped."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from itertools import permutations
from pathlib import Path

import pytest
from rich.cells import cell_len

from doccls.runs.read import FoldFacts, RunFacts, Scores
from doccls.runs.table import average_folds, derive_state, find_differences, order_runs, render_table, wrap_words

NOON = datetime(2026, 1, 1, 12)
MERGED = RunFacts(
    "20260101/first", NOON, 3 * 2**20, {"train.lr": "0.1", "data.folds": "5"}, num_folds=5,
    merged_scores=Scores(0.8, 0.55), merged_folds=5,
)  # fmt: skip


def make_folds(*folds: int, damaged: float | None = 0.25) -> tuple[FoldFacts, ...]:
    return tuple(FoldFacts(fold, 5, Scores(0.5 + fold / 10, damaged)) for fold in folds)


def unmerged(*folds: int) -> RunFacts:
    return replace(MERGED, merged_scores=None, merged_folds=0, folds=make_folds(*folds))


def test_newest_run_is_first_and_ties_are_in_order_of_names() -> None:
    runs = [
        replace(MERGED, name="20260102/a", started=NOON.replace(hour=13)),
        replace(MERGED, name="20260101/a"),
        replace(MERGED, name="20260101/b"),
        replace(MERGED, name="20260103/c", started=NOON.replace(hour=3)),
    ]
    for order in permutations(runs):
        assert order_runs(order) == runs


@pytest.mark.parametrize(
    ("run", "state"),
    [
        (MERGED, "merged"),
        (replace(MERGED, merged_folds=1), "merged 1/5 folds"),
        (replace(MERGED, num_folds=None), "merged"),
        (replace(MERGED, is_blend=True), "blend"),
        (replace(MERGED, is_blend=True, problems=("blend.json: damaged",)), "damaged"),
        (unmerged(0, 1, 2, 3, 4), "not merged"),
        (unmerged(0, 1, 2), "stopped 3/5 folds"),
        (unmerged(), "stopped 0/5 folds"),
        (replace(unmerged(), num_folds=None), "stopped"),
        (replace(unmerged(0, 1), failure="CUDA is out of memory"), "failed 2/5 folds"),
        (replace(unmerged(0, 1), is_submitted=True), "queued? 2/5 folds"),
        (replace(unmerged(3), valid_fold=3), "fold 3 only"),
        (replace(unmerged(2), valid_fold=3), "stopped 1/5 folds"),
        (replace(unmerged(2, 3), valid_fold=3), "folds 2, 3 only"),
        (replace(unmerged(0, 1), activity="training", failure="of an earlier process"), "training 2/5 folds"),
        (replace(unmerged(0, 1, 2, 3, 4), activity="merging"), "merging 5/5 folds"),
        (replace(unmerged(0, 1), activity="training", problems=("config.yaml: damaged",)), "training 2/5 folds"),
        (replace(unmerged(0, 1), problems=("config.yaml: damaged",)), "damaged"),
        (replace(unmerged(0), problems=("another version",), is_of_other_version=True), "other version"),
    ],
)
def test_state(run: RunFacts, state: str) -> None:
    assert derive_state(run) == state


def test_scores_of_finished_folds_are_averaged() -> None:
    assert average_folds(unmerged()) is None
    assert average_folds(unmerged(0, 2)) == Scores(pytest.approx(0.6), 0.25)
    run = replace(unmerged(), folds=(*make_folds(0), *make_folds(2, damaged=None)))
    assert average_folds(run) == Scores(pytest.approx(0.6), None)


def make_runs(*configs: dict[str, str] | None) -> list[RunFacts]:
    return [replace(MERGED, name=f"20260101/run{index}", settings=config) for index, config in enumerate(configs)]


def test_keys_that_differ_between_two_runs_are_shown_for_both() -> None:
    same = {"mode": "basic"}
    found = find_differences(make_runs(same | {"train.lr": "0.1"}, None, same | {"train.lr": "0.2"}))
    assert found.of_runs == (("train.lr=0.1",), (), ("train.lr=0.2",)) and found.usual == ()


def test_what_most_runs_have_is_shown_once() -> None:
    runs = make_runs(*({"train.lr": lr, "train.epochs": "8"} for lr in ("0.1", "0.1", "0.2")))
    found = find_differences(runs)
    assert found.of_runs == ((), (), ("train.lr=0.2",)) and found.usual == ("train.lr=0.1",)


def test_output_folders_and_keys_of_other_versions_do_not_differ() -> None:
    runs = make_runs({"output.exp_dir": "/a"}, {"output.exp_dir": "/b", "train.new": "1"}, {"train.new": "1"})
    assert find_differences(runs).of_runs == ((), (), ()) and find_differences(runs).usual == ()
    assert find_differences([]).of_runs == ()


def test_table_is_aligned_and_explains_what_it_has() -> None:
    runs = [
        replace(MERGED, name="20260102/long-name", settings={"train.lr": "0.2"}),
        MERGED,
        replace(unmerged(0), name="20260101/b", failure="no\x1b[31m space", settings={"train.lr": "0.1"}),
    ]
    assert render_table(Path("/exp"), runs, None) == (
        "3 runs in /exp, newest first\n"
        "run                   clean  damaged      gap  state                size\n"
        "20260102/long-name   0.8000   0.5500   0.2500  merged            3.0 MiB\n"
        "    train.lr=0.2\n"
        "20260101/first       0.8000   0.5500   0.2500  merged            3.0 MiB\n"
        "20260101/b          ~0.5000  ~0.2500  ~0.2500  failed 1/5 folds  3.0 MiB\n"
        "    ! 'no\\x1b[31m space'\n"
        "\n"
        "usual: train.lr=0.1\n"
        "clean: macro-F1 on the pages as they are; damaged: on damaged copies of them; gap: clean minus damaged\n"
        "~: mean of the finished folds, which is not comparable with a merged run\n"
        "usual: what most runs have, of the config keys that differ; below a run is what it has instead\n"
        "stopped, failed: doccls-launch status RUN says more, and how to resume\n"
    )


def test_columns_of_damaged_copies_need_a_score_on_them() -> None:
    text = render_table(Path("/exp"), [replace(MERGED, merged_scores=Scores(0.8))], None)
    assert text.splitlines()[:3] == [
        "1 run in /exp, newest first",
        "run              clean  state      size",
        "20260101/first  0.8000  merged  3.0 MiB",
    ]
    assert "gap" not in text


@pytest.mark.parametrize("width", [80, 140])
def test_lines_fit_the_terminal(width: int) -> None:
    long = {f"train.key{index}": "value" * index for index in range(30)}
    runs = [
        replace(MERGED, name=f"20260101/{'x' * 80}", settings=long, problems=("word " * 50,)),
        replace(MERGED, settings=dict.fromkeys(long, "usual")),
        replace(MERGED, name="20260101/ページ", settings=dict.fromkeys(long, "ページ " * 40)),
    ]
    lines = render_table(Path("/exp"), runs, width).splitlines()
    assert all(cell_len(line) <= width for line in lines if not line.startswith("20260101/x"))
    assert any(line.endswith("...") for line in lines)
    figures = [line for line in lines if "MiB" in line]
    assert len(figures) == 3 and len({cell_len(line) for line in figures}) == 1
    assert "..." not in render_table(Path("/exp"), runs, None)


def test_text_of_files_is_shown_escaped() -> None:
    hostile = {"train.lr": "a\nb", "key\x07 [red]": "", "data.x": "a b"}
    runs = [
        replace(MERGED, name=os.fsdecode(b"20260101/\xff\x1b"), settings=hostile, problems=("x\ny: damaged",)),
        replace(MERGED, settings={key: "other" for key in hostile}),
    ]
    text = render_table(Path("/e\nxp"), runs, 100)
    assert text.replace("\n", "").isprintable() and text.splitlines()[0] == "2 runs in '/e\\nxp', newest first"
    assert "train.lr='a\\nb' 'key\\x07 [red]'='' data.x='a b'" in text and "! 'x\\ny: damaged'" in text
    assert "'20260101/\\udcff\\x1b'" in text


def test_words_are_wrapped_but_never_split() -> None:
    assert wrap_words(("one", "two", "three"), 9) == ["one two", "    three"]
    assert wrap_words(("one", "a-very-long-word"), 9, "  ") == ["  one", "      a-very-long-word"]
    assert wrap_words(("one", "two"), None) == ["one two"]
