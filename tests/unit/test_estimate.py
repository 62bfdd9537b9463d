"""Time left: within a fifth after the first epoch of a steady fold, and a queue of folds over slots."""

from __future__ import annotations

from dataclasses import replace

import pytest

from doccls.run.heartbeat import Beat
from doccls.run.metrics_log import EpochMetrics
from launcher.estimate import (
    Pace,
    estimate_fold_s,
    estimate_left_s,
    estimate_queue_s,
    measure_epoch,
    measure_pace,
    measure_steps,
)

STEPS, EPOCHS, BATCH, STEP_S, VALIDATION_S = 40, 10, 8, 0.5, 6.0
EPOCH_S = STEPS * STEP_S + VALIDATION_S
BEAT = Beat("h", 1, "train", fold=0, epochs=EPOCHS, steps_per_epoch=STEPS, batch_size=BATCH)


def make_row(epoch: int, resumed_step: int | None = None) -> EpochMetrics:
    """Return the metrics of an epoch of the steady fold."""
    steps = STEPS * epoch - (STEPS * (epoch - 1) if resumed_step is None else resumed_step)
    return EpochMetrics(
        0, epoch, 0.1, 0.1, 0.5, 1e-3, steps * STEP_S + VALIDATION_S, 1.0, images_per_s=BATCH / STEP_S,
        resumed_step=resumed_step,
    )  # fmt: skip


def make_beat(at_s: float) -> Beat:
    """Return the beat of the steady fold at so many seconds after its begin."""
    epoch, within_s = divmod(at_s, EPOCH_S)
    start_s, first = epoch * EPOCH_S, int(epoch) * STEPS
    if within_s >= STEPS * STEP_S:
        end_s, end = start_s + STEPS * STEP_S, first + STEPS
        return replace(
            BEAT, phase="validate", epoch=int(epoch) + 1, step=end, time_s=at_s, stage_s=end_s, stage_step=end
        )
    step = first + max(1, int(within_s / STEP_S))
    return replace(
        BEAT, epoch=int(epoch) + 1, step=step, time_s=at_s, stage_s=start_s + STEP_S, stage_step=first + 1
    )  # fmt: skip


@pytest.mark.parametrize("at_s", [27.0, 33.5, 45.9, 48.0, 51.9, 130.2, 200.0, 245.0])
def test_time_left_of_a_steady_fold_is_right_from_its_second_epoch_on(at_s: float) -> None:
    beat, rows = make_beat(at_s), [make_row(epoch) for epoch in range(1, int(at_s / EPOCH_S) + 1)]
    pace = measure_pace(beat, rows)
    assert pace is not None
    left_s = estimate_left_s(beat, pace)
    assert left_s == pytest.approx(EPOCHS * EPOCH_S - at_s, rel=0.05, abs=1.0)


def test_pace_of_an_epoch_that_was_resumed_counts_the_remaining_steps() -> None:
    for row in (make_row(3), make_row(3, resumed_step=110)):
        pace = measure_epoch(row, BEAT)
        assert pace is not None and (pace.step_s, pace.validation_s) == pytest.approx((STEP_S, VALIDATION_S))
    assert measure_epoch(replace(make_row(1), images_per_s=None), BEAT) is None
    assert measure_epoch(make_row(1), replace(BEAT, batch_size=0)) is None


def test_pace_is_that_of_two_minutes_or_the_current_epoch() -> None:
    slower = replace(BEAT, epoch=4, step=3 * STEPS + 3, stage_s=0.0, stage_step=3 * STEPS + 1, time_s=4.0)
    assert measure_steps(slower) == 2.0 and measure_pace(slower, []) == Pace(2.0, 0.0)
    fast, long = make_row(1), replace(make_row(2), images_per_s=1.0, time_s=STEPS * 8 + 20.0)
    # 4 s at 2 s per step, and the 20 s of an epoch at 0.5 s.
    assert measure_pace(slower, [fast]) == pytest.approx(Pace(24 / (2 + 40), VALIDATION_S))
    # An epoch of 320 s fills the two minutes.
    assert measure_pace(slower, [fast, long]) == pytest.approx(Pace(120 / (2 + 116 / 8), 20.0))
    assert measure_pace(slower, [long, fast]) == pytest.approx(Pace(120 / (2 + 40 + 96 / 8), (VALIDATION_S + 20.0) / 2))
    # Two steps of a resumed epoch are not a whole one: 4 s, 16 s and the 20 s of the epoch before.
    resumed = replace(make_row(3, resumed_step=3 * STEPS - 2), images_per_s=1.0, time_s=16.0 + VALIDATION_S)
    assert measure_pace(slower, [fast, resumed]) == pytest.approx(Pace(40 / (2 + 2 + 40), VALIDATION_S))
    # Steps of the current epoch fill them alone; the last validation counts all the same.
    assert measure_pace(replace(slower, time_s=130.0), [fast, long]) == pytest.approx(Pace(65.0, 20.0))


def test_no_pace_before_the_second_step() -> None:
    first = replace(BEAT, epoch=1, step=1, stage_step=1, stage_s=3.0, time_s=3.0)
    assert measure_steps(first) is None and measure_pace(first, []) is None
    assert measure_steps(replace(first, phase="validate", step=9, time_s=9.0)) is None


def test_no_time_left_outside_the_training() -> None:
    pace = Pace(1.0, 1.0)
    assert estimate_left_s(replace(BEAT, phase="start"), pace) is None
    assert estimate_left_s(replace(BEAT, phase="stopping", step=3), pace) is None
    assert estimate_left_s(replace(BEAT, steps_per_epoch=0), pace) is None
    assert estimate_fold_s(BEAT, pace) == EPOCHS * STEPS + EPOCHS


@pytest.mark.parametrize(
    ("running_s", "waiting_s", "left_s"),
    [
        ([10.0, 30.0], [20.0, 20.0], 50.0),  # 10 + 20 in one slot, then 30 + 20 in either
        ([10.0], [20.0, 20.0], 50.0),
        ([10.0, 12.0], [], 12.0),
        ([None, 10.0], [20.0], None),
        ([4.0], [6.0, None], None),
        ([None], [], None),
        ([], [20.0], None),
        ([], [], None),
    ],
)
def test_queue(running_s: list[float | None], waiting_s: list[float | None], left_s: float | None) -> None:
    assert estimate_queue_s(running_s, waiting_s) == left_s
