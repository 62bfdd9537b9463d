"""How long folds and queues still take, from measured epochs and steps; pure."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from doccls.run.heartbeat import Beat
from doccls.run.metrics_log import EpochMetrics

# The pace is that of the current epoch's steps and, where they took less than this, of earlier ones: a shorter time
# says little where other jobs share the machine.
_WINDOW_S = 120.0


@dataclass(frozen=True)
class Pace:
    """How long the parts of an epoch take."""

    step_s: float
    validation_s: float  # with everything else after the last step of an epoch

    def expect_s(self, steps: int, validations: float) -> float:
        """Return how long so many steps and validations take."""
        return steps * self.step_s + validations * self.validation_s


def measure_epoch(row: EpochMetrics, beat: Beat) -> Pace | None:
    """Return the pace of a finished epoch of a fold as large as the beat's; None if it was not measured."""
    if not row.images_per_s or not beat.batch_size:
        return None
    step_s = beat.batch_size / row.images_per_s
    return Pace(step_s, max(0.0, row.time_s - count_steps(row, beat) * step_s))


def count_steps(row: EpochMetrics, beat: Beat) -> int:
    """Return how many steps of the epoch were trained since the fold was started, or resumed."""
    first_step = row.resumed_step if row.resumed_step is not None else beat.steps_per_epoch * (row.epoch - 1)
    return max(0, beat.steps_per_epoch * row.epoch - first_step)


def measure_steps(beat: Beat) -> float | None:
    """Return the seconds per step since the epoch began; None before its second step, and outside the training."""
    steps = beat.step - beat.stage_step
    if beat.phase != "train" or steps < 1 or beat.time_s <= beat.stage_s:
        return None
    return (beat.time_s - beat.stage_s) / steps


def measure_pace(beat: Beat, rows: Sequence[EpochMetrics]) -> Pace | None:
    """Return the pace of a fold that is being trained. `rows` are its epochs so far, or those of another fold."""
    steps, time_s, validations_s = 0.0, 0.0, list[float]()
    step_s = measure_steps(beat)
    if step_s is not None:
        time_s = beat.time_s - beat.stage_s
        steps = time_s / step_s
    for row in reversed(rows):
        epoch = measure_epoch(row, beat)
        if epoch is None:
            continue
        if validations_s and time_s >= _WINDOW_S:
            break
        share_s = min(max(0.0, _WINDOW_S - time_s), epoch.step_s * count_steps(row, beat))
        steps, time_s = steps + share_s / epoch.step_s, time_s + share_s
        validations_s.append(epoch.validation_s)
    if not steps:
        return None
    return Pace(time_s / steps, fmean(validations_s) if validations_s else 0.0)


def estimate_left_s(beat: Beat, pace: Pace) -> float | None:
    """Return the seconds until the fold is done, by the time of its last beat; None if that can't be said."""
    if not beat.steps_per_epoch or beat.phase not in ("train", "validate"):
        return None
    steps = max(0, beat.epochs * beat.steps_per_epoch - beat.step)
    if beat.phase == "train":
        return pace.expect_s(steps, beat.epochs - beat.epoch + 1)
    validating_s = max(0.0, pace.validation_s - (beat.time_s - beat.stage_s))
    return pace.expect_s(steps, beat.epochs - beat.epoch) + validating_s


def estimate_fold_s(beat: Beat, pace: Pace) -> float:
    """Return the seconds that a fold like the beat's takes from its first step to its last validation."""
    return pace.expect_s(beat.epochs * beat.steps_per_epoch, beat.epochs)


def estimate_queue_s(running_s: Sequence[float | None], waiting_s: Sequence[float | None]) -> float | None:
    """Return the seconds until the last fold is done, if waiting folds start in this order in slots that become free.

    There are as many slots as running folds. None if none runs, or the time of a fold is unknown.
    """
    slots = [time_s for time_s in running_s if time_s is not None]
    if not slots or len(slots) < len(running_s):
        return None
    heapq.heapify(slots)
    for time_s in waiting_s:
        if time_s is None:
            return None
        heapq.heapreplace(slots, slots[0] + time_s)
    return max(slots)
