"""The stream of batches that a fold reads: how long it waits for them, and what is said of that."""

import time
from collections.abc import Iterator

import pytest
import torch

from doccls.config.schema import DataConfig
from doccls.data.dataset import Batch
from doccls.training.batches import WaitingBatches, advise_on_waiting

BATCH = Batch(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1), torch.zeros(1))


def test_only_the_time_within_the_asking_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])

    def load() -> Iterator[Batch]:
        for wait_s in (1.0, 0.0, 4.0):
            now_s[0] += wait_s
            yield BATCH
        now_s[0] += 0.5

    batches = WaitingBatches(load())
    for _ in range(2):
        assert next(batches) is BATCH
        now_s[0] += 100  # a step
    assert batches.take_s() == 1.0 and batches.take_s() == 0.0
    assert list(batches) == [BATCH]
    assert batches.take_s() == 4.5


@pytest.mark.parametrize(
    ("workers", "stored", "told"),
    [
        (2, True, "a larger data.num_workers (now 2), less of"),
        ("auto", False, "a larger data.num_workers, data.store, which keeps decoded pages, less of"),
    ],
)
def test_advice_names_what_can_be_raised(workers: int | str, stored: bool, told: str) -> None:
    data = DataConfig.model_validate({"train_csv": "x", "image_dir_train": "y", "num_workers": workers})
    advice = advise_on_waiting(0.345, data, stored)
    assert advice.startswith("steps waited for pages 34% of the epoch's time; what helps: ") and told in advice
