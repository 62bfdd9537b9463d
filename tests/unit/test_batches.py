"""The stream of batches that a fold reads: how long it waits for them, and what is said of that."""

import time
from collections.abc import Iterator

import pytest
import torch

from doccls.data.dataset import Batch
from doccls.data.sampler import BatchPlace
from doccls.training.batches import WaitingBatches, advise_on_waiting

BATCH = Batch(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1), torch.zeros(1), BatchPlace("train", 0))


def test_only_the_time_within_the_asking_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])

    def load() -> Iterator[Batch]:
        for wait_s in (1.0, 0.0, 4.0):
            now_s[0] += wait_s
            yield BATCH
        now_s[0] += 0.5

    batches = WaitingBatches(load(), 2)
    for _ in range(2):
        assert next(batches) is BATCH
        now_s[0] += 100  # a step
    assert batches.take_s() == 1.0 and batches.take_s() == 0.0
    assert list(batches) == [BATCH]
    assert batches.take_s() == 4.5


@pytest.mark.parametrize(
    ("workers", "cores", "stored", "told"),
    [
        (8, 32, True, "data.num_workers = 13 (now 8), less of"),
        (
            2,
            4,
            False,
            "data.store, which keeps decoded pages, less of augment's slow ones (shadow, noise), more cores (4",
        ),
        (0, 8, True, "data.num_workers = 1 (now 0), less of"),
    ],
)
def test_advice_names_how_many_workers_would_keep_up(workers: int, cores: int, stored: bool, told: str) -> None:
    advice = advise_on_waiting(0.345, workers, cores, stored)
    assert advice.startswith("steps waited for pages 34% of the epoch's time; what helps: ") and told in advice
