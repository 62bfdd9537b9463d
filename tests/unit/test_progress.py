"""What a live view shows of each fold, and the events that a watcher without a terminal prints."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from doccls.run.heartbeat import Beat
from doccls.run.metrics_log import EpochMetrics
from doccls.system.holder import Holder
from launcher.ledger import Attempt
from launcher.progress import FoldProgress, Progress, RunEvidence, derive_progress, describe_totals, list_events
from launcher.status import FoldStatus, RunStatus, State

SINCE = "2026-01-02T03:04:05.000+00:00"
SINCE_S = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
BEAT = Beat(
    "h", 5, "train", fold=1, epoch=2, step=15, time_s=SINCE_S + 40, epochs=4, steps_per_epoch=10, batch_size=8,
    stage_s=SINCE_S + 32, stage_step=11,
)  # fmt: skip
RUNNING = FoldStatus(1, State.RUNNING, slot="gpu 0", attempts=2, since=SINCE)


def make_row(fold: int, epoch: int, macro_f1: float, selection_f1: float | None = None) -> EpochMetrics:
    return EpochMetrics(
        fold, epoch, 0.1, 0.1, macro_f1, 1e-3, 25.0, 1.0, images_per_s=4.0, selection_f1=selection_f1
    )  # fmt: skip


def make_run(
    *folds: FoldStatus, run_id: str = "r", launchers: tuple[Holder, ...] = (), **evidence: object
) -> RunEvidence:
    status = RunStatus(f"/exp/20260102/{run_id}", launchers, folds, merged=False, resume_command=None)
    return RunEvidence(run_id, status, **evidence)  # type: ignore[arg-type]


def test_running_fold() -> None:
    run = make_run(RUNNING, beats=(BEAT,), epochs={1: [make_row(1, 1, 0.5)]}, num_epochs=4)
    (fold,) = derive_progress("run r", [run]).folds
    assert fold == FoldProgress(
        run="", fold=1, state=State.RUNNING, slot="gpu 0", phase="train", epoch=2, epochs=4, step=15, steps=40,
        images_per_s=4.0, best=0.5, left_s=pytest.approx(25 * 2.0 + 3 * 5.0), restarts=1, scores=(0.5,),
    )  # fmt: skip


def test_beats_of_an_earlier_attempt_and_of_faster_ranks_do_not_count() -> None:
    old = replace(BEAT, time_s=SINCE_S - 60, step=3)
    (fold,) = derive_progress("", [make_run(RUNNING, beats=(old, replace(BEAT, step=16), BEAT))]).folds
    assert fold.step == 15
    (fold,) = derive_progress("", [make_run(RUNNING, beats=(old,))]).folds
    assert (fold.step, fold.phase, fold.left_s) == (0, "start", None)
    (fold,) = derive_progress("", [make_run(replace(RUNNING, state=State.LOST), beats=(BEAT,))]).folds
    assert (fold.step, fold.phase) == (0, "")


def test_best_epoch_is_the_selected_one() -> None:
    rows = [make_row(1, 1, 0.9, 0.2), make_row(1, 2, 0.7, 0.8), make_row(1, 3, 0.6, 0.3)]
    (fold,) = derive_progress("", [make_run(FoldStatus(1, State.FAILED, remark="a\nb"), epochs={1: rows})]).folds
    assert (fold.best, fold.scores, fold.epoch, fold.remark) == (0.7, (0.9, 0.7, 0.6), 3, "a")
    (fold,) = derive_progress("", [make_run(FoldStatus(1, State.DONE, macro_f1=0.75), epochs={1: rows})]).folds
    assert fold.best == 0.75


def test_waiting_folds_count_for_the_queue() -> None:
    waiting = [FoldStatus(fold, State.WAITING) for fold in (2, 3)]
    run = make_run(RUNNING, *waiting, beats=(BEAT,), epochs={1: [make_row(1, 1, 0.5)]}, num_epochs=4)
    fold_s, left_s = 40 * 2.0 + 4 * 5.0, 65.0
    assert derive_progress("", [run]).left_s == pytest.approx(left_s + 2 * fold_s)
    # A fold that has trained half of its epochs before takes half of the time.
    resumed = replace(run, epochs={**run.epochs, 2: [make_row(2, epoch, 0.5) for epoch in (1, 2)]})
    assert derive_progress("", [resumed]).left_s == pytest.approx(left_s + 1.5 * fold_s)
    # Folds that are done say how long one takes, with its start and end; restarted ones do not.
    done = Attempt(0, 1, "gpu 0", ("GPU-a",), 8, SINCE, ended="2026-01-02T03:05:05.000+00:00", outcome="done")
    measured = replace(run, attempts=(done, replace(done, number=2, ended="2026-01-02T04:05:05.000+00:00")))
    assert derive_progress("", [measured]).left_s == pytest.approx(left_s + 2 * 60.0)


def test_runs_without_an_estimate_count_like_the_others() -> None:
    """So does a fold that has just started, whose beats say nothing yet."""
    row = make_row(1, 1, 0.5)
    known = make_run(RUNNING, beats=(BEAT,), epochs={1: [row]}, num_epochs=4)
    fold_s, left_s = 100.0, 65.0
    waiting = make_run(FoldStatus(0, State.WAITING))
    assert derive_progress("", [known, waiting]).left_s == pytest.approx(left_s + fold_s)
    starting = make_run(replace(RUNNING, fold=2))
    assert derive_progress("", [known, starting]).left_s == pytest.approx(fold_s)
    assert derive_progress("", [starting, waiting]).left_s is None


@pytest.mark.parametrize(
    ("run_ids", "names"),
    [
        (["spring-a-s1"], [""]),
        (["spring-a-s1", "spring-b-s1"], ["a-s1", "b-s1"]),
        (["spring-a", "spring-a-s1"], ["a", "a-s1"]),
        (["s1", "s2"], ["s1", "s2"]),
        (["spring-train", "spring-trail"], ["train", "trail"]),
    ],
)
def test_names_of_runs_lack_what_all_begin_with(run_ids: list[str], names: list[str]) -> None:
    runs = [make_run(FoldStatus(0, State.WAITING), run_id=run_id) for run_id in run_ids]
    assert [fold.run for fold in derive_progress("", runs).folds] == names


@pytest.mark.parametrize(
    ("states", "is_launched", "is_active"),
    [
        ([State.DONE, State.FAILED, State.STOPPED, State.LOST, State.MISSING], False, False),
        ([State.DONE], True, True),  # the launcher merges
        ([State.DONE, State.WAITING], False, True),
        ([State.RUNNING], False, True),
        ([State.UNKNOWN], False, True),
    ],
)
def test_active(states: list[State], is_launched: bool, is_active: bool) -> None:
    run = make_run(*(FoldStatus(fold, state) for fold, state in enumerate(states)))
    assert derive_progress("", [run], is_launched).is_active == is_active
    holder = Holder("run r is being launched", 1, "h", "", "", "", "", "")
    assert derive_progress("", [make_run(FoldStatus(0, State.DONE), launchers=(holder,))]).is_active


def test_events_are_changes_of_state_and_finished_epochs() -> None:
    first = Progress("run r", (FoldProgress("", 0, State.RUNNING, slot="cpu 0"), FoldProgress("", 1, State.WAITING)))
    assert list_events(None, first) == ["fold 0: running on cpu 0", "fold 1: waiting"]
    assert list_events(first, first) == []
    epoch = FoldProgress("", 0, State.RUNNING, slot="cpu 0", epochs=3, scores=(0.5,), left_s=90.0, step=9)
    second = Progress("run r", (epoch, FoldProgress("", 1, State.FAILED, remark="out of memory")))
    assert list_events(first, second) == [
        "fold 0: epoch 1/3 macro_f1=0.50000, 90 s left", "fold 1: failed: out of memory",
    ]  # fmt: skip
    third = Progress("run r", (replace(epoch, restarts=1), FoldProgress("a-s1", 1, State.DONE, best=0.25)))
    assert list_events(second, third) == ["fold 0: running on cpu 0, restart 1", "a-s1 fold 1: done macro_f1=0.25000"]


def test_totals() -> None:
    states = [State.RUNNING, State.DONE, State.WAITING, State.WAITING]
    folds = tuple(FoldProgress("", fold, state) for fold, state in enumerate(states))
    assert describe_totals(Progress("study s", folds, 7200.0)) == (
        "study s: 1 of 4 folds done, 1 running, 2 waiting, 2 h 00 min left"
    )
    assert describe_totals(Progress("run r", ())) == "run r: 0 of 0 folds done"
