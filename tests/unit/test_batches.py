"""Time spent waiting for batches, and the advice that follows from it."""

import time
from collections.abc import Iterator

import pytest
import torch

from doccls.data.dataset import Batch
from doccls.data.sampler import BatchPlace
from doccls.training.batches import TimedBatches, advise_on_waiting

BATCH = Batch(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1), torch.zeros(1), BatchPlace("train", 0))


def test_only_time_spent_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])

    def load() -> Iterator[Batch]:
        for wait_s in (1.0, 0.0, 4.0):
            now_s[0] += wait_s
            yield BATCH
        now_s[0] += 0.5

    batches = TimedBatches(load(), 2)
    for _ in range(2):
        assert next(batches) is BATCH
        now_s[0] += 100  # a step
    assert batches.pop_wait_s() == 1.0 and batches.pop_wait_s() == 0.0
    assert list(batches) == [BATCH]
    assert batches.pop_wait_s() == 4.5


@pytest.mark.parametrize(
    ("workers", "cores", "stored", "expected"),
    [
        (8, 32, True, "data.num_workers = 13 (now 8), fewer slow"),
        (
            2,
            4,
            False,
            "data.store, which keeps decoded pages, fewer slow augmentations (shadow, noise), more cores (4",
        ),
        (0, 8, True, "data.num_workers = 1 (now 0), fewer slow"),
    ],
)
def test_advice_names_how_many_workers_would_keep_up(workers: int, cores: int, stored: bool, expected: str) -> None:
    advice = advise_on_waiting(0.345, workers, cores, stored)
    assert advice.startswith("steps waited for pages 34% of the epoch's time; consider ") and expected in advice
