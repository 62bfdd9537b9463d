"""The loader gives exactly what is asked for. (Its processes: tests/distributed.)"""

from __future__ import annotations

import torch

from doccls.data.dataset import DocClsDataset, Pages
from doccls.data.loader import loading
from doccls.data.sampler import BatchPlace, BatchRequest


def test_exactly_the_batches_in_their_order(pages: Pages) -> None:
    places = [BatchPlace("validate", 0, number=number) for number in range(3)]
    asked = [BatchRequest(place, rows) for place, rows in zip(places, ((4, 1), (4,), (0, 5, 2)), strict=True)]
    with loading(DocClsDataset(pages), asked, num_workers=0, pin_memory=False) as batches:
        given = list(batches)
    assert [batch.indices_N.tolist() for batch in given] == [[4, 1], [4], [0, 5, 2]]
    assert [batch.place for batch in given] == places
    assert [batch.targets_N.tolist() for batch in given] == [[0, 1], [0], [0, 1, 0]]


def test_the_global_generator_is_left_alone(pages: Pages) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with loading(DocClsDataset(pages), [BatchRequest(BatchPlace("predict", 0), (0,))], 0, False) as batches:
        list(batches)
    assert torch.rand(1) == expected
