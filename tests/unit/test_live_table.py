"""The lines of the live view: they fit the terminal, and say the most important where not all fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from rich.cells import cell_len

from launcher.live_table import Style, render_bars, render_live
from launcher.progress import FoldProgress, Progress
from launcher.status import State

RUNNING = FoldProgress(
    run="train-s42", fold=1, state=State.RUNNING, slot="gpu 0", phase="train", epoch=12, epochs=30, step=11234,
    steps=28100, images_per_s=1203.4, best=0.87654, left_s=3900.0, restarts=1, scores=(0.5, 0.7, 0.6, 0.8),
)  # fmt: skip
DONE = FoldProgress(
    run="train-s42", fold=0, state=State.DONE, slot="gpu 0", epoch=30, epochs=30, best=0.91234, scores=(0.5, 0.9)
)
FAILED = FoldProgress(run="train-s42", fold=2, state=State.FAILED, slot="gpu 1", remark="영수증 " * 30)
WAITING = FoldProgress(run="train-s43", fold=0, state=State.WAITING, epochs=30)
STUDY = Progress("study spring", (DONE, RUNNING, FAILED, WAITING), 7400.0)


def test_wide_terminal_shows_everything() -> None:
    lines = render_live(STUDY, 140, 24)
    assert lines[0] == "study spring: 1 of 4 folds done, 1 running, 1 waiting, 1 failed, 2 h 03 min left"
    assert lines[1].split() == [
        "run", "fold", "state", "on", "epoch", "step", "img/s", "best", "F1", "left", "restarts", "macro-F1", "by",
        "epoch",
    ]  # fmt: skip
    assert lines[3].split() == [
        "train-s42", "1", "running", "gpu", "0", "12/30", "11234/28100", "1203", "0.8765", "65", "min", "1", "▁▆▃█",
    ]  # fmt: skip
    assert lines[4].endswith("~") and "영수증 영수증" in lines[4]
    assert lines[5].split() == ["train-s43", "0", "waiting", "0/30"]


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 100, 140, 300])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = render_live(STUDY, width, 24)
    assert len(lines) == 6 and max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("has_colour", [False, True])
def test_long_run_names_leave_room_for_fold_and_state(has_colour: bool) -> None:
    names = [f"train_highperf-lr{rate}-label_smoothing0.{rate}-s{seed}" for rate in (1, 2) for seed in (41, 42)]
    folds = tuple(replace(fold, run=name) for fold, name in zip(STUDY.folds, names, strict=True))
    for width in range(20, 71):
        lines = render_live(Progress("study spring", folds), width, 24, Style(has_colour=has_colour))
        if has_colour:
            assert "\x1b[32mdone\x1b[0m" in lines[2] and "\x1b[31mfailed\x1b[0m" in lines[4]
        lines = [re.sub(r"\x1b\[\d+m", "", line) for line in lines]
        assert max(map(cell_len, lines)) <= width
        for line, fold in zip(lines[2:], folds, strict=True):
            name, number, state = line.split()[:3]
            assert (number, state) == (str(fold.fold), fold.state)
            assert name.endswith(fold.run[-(len(name) // 2) :])
        shown = [header for header in ("epoch", "best F1", "left") if header in lines[1]]
        assert shown == ["epoch", "best F1", "left"][: len(shown)]
        assert (len(shown) == 3) == (width >= 51), width
        assert ("macro-F1" in lines[1]) == (width >= 61), width


def test_short_run_names_are_not_cut() -> None:
    for width in range(45, 61):
        assert all(line.startswith("train-s4") for line in render_live(STUDY, width, 24)[2:])


def test_narrow_terminal_leaves_out_the_less_important_columns() -> None:
    header = render_live(STUDY, 79, 24)[1]
    assert "step" not in header and "img/s" not in header
    assert all(word in header for word in ("run", "fold", "state", "epoch", "best F1", "left", "macro-F1"))


def test_columns_that_hold_nothing_are_left_out() -> None:
    folds = tuple(replace(fold, run="") for fold in (DONE, replace(WAITING, epochs=0)))
    assert render_live(Progress("run r", folds))[1:] == [
        "fold  state    on     epoch  best F1  macro-F1 by epoch",
        "   0  done     gpu 0  30/30   0.9123  ▁█",
        "   0  waiting",
    ]


def test_no_folds() -> None:
    assert render_live(Progress("run r", ()), 80, 24) == [
        "run r: 0 of 0 folds done", "fold  state  macro-F1 by epoch",
    ]  # fmt: skip


def test_low_terminal_shows_running_and_failed_folds_and_counts_the_others() -> None:
    folds = [FoldProgress("", fold, State.WAITING) for fold in range(60)]
    folds[3], folds[50] = (replace(folds[fold], state=State.RUNNING, phase="train") for fold in (3, 50))
    folds[7] = replace(folds[7], state=State.FAILED, remark="out of memory")
    folds[:3] = [replace(fold, state=State.DONE) for fold in folds[:3]]
    lines = render_live(Progress("run r", tuple(folds)), 80, 24)
    assert len(lines) == 24
    shown = [int(line.split()[0]) for line in lines[2:-1]]
    assert shown == [3, 50, 7, *(fold for fold in range(4, 23) if fold != 7)]
    assert lines[-1] == "... and 36 waiting, 3 done"
    assert len(render_live(Progress("run r", tuple(folds)), 80)) == 62
    for height in (1, 2, 3, 4):
        assert len(render_live(Progress("run r", tuple(folds)), 80, height)) == height


def test_colour_changes_no_character() -> None:
    plain, painted = render_live(STUDY, 80, 24), render_live(STUDY, 80, 24, Style(has_colour=True))
    assert not any("\x1b" in line for line in plain)
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in painted] == plain
    assert "\x1b[32mdone\x1b[0m" in painted[2] and "\x1b[31mfailed\x1b[0m" in painted[4]
    assert all(line.count("\x1b") % 2 == 0 for line in painted)


def test_control_characters_of_a_remark_are_escaped() -> None:
    folds = (replace(FAILED, remark="a\x1b[2Jb"),)
    assert "'a\\x1b[2Jb'" in render_live(Progress("run r", folds), 140, 24)[2]


def test_phase_is_shown_in_place_of_running() -> None:
    for phase, word in (("start", "start"), ("train", "running"), ("validate", "validate"), ("stopping", "stopping")):
        line = render_live(Progress("run r", (replace(RUNNING, run="", phase=phase),)), 140, 24)[2]
        assert line.split()[1] == word


@pytest.mark.parametrize(
    ("scores", "width", "bars"),
    [
        ((), 5, ""),
        ((0.5,), 5, "▅"),
        ((0.5, 0.5), 5, "▅▅"),
        ((0.0, 0.5, 1.0), 5, "▁▅█"),
        ((0.9, 0.0, 0.5, 1.0), 3, "▁▅█"),
        ((0.1, 0.2), 0, ""),
    ],
)
def test_bars(scores: tuple[float, ...], width: int, bars: str) -> None:
    assert render_bars(scores, width) == bars
    assert len(render_bars(scores, width, has_bars=False)) == len(bars)
    assert render_bars(scores, width, has_bars=False).isascii()
