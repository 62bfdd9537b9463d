"""The loader without workers: it yields exactly the requested batches. (Workers: tests/distributed.)"""

from __future__ import annotations

import errno
import os
import tempfile
from multiprocessing.heap import Heap

import pytest
import torch

from doccls.data.dataset import DocClsDataset, Pages
from doccls.data.loader import loading
from doccls.data.sampler import BatchPlace, BatchRequest
from doccls.errors import RankLocalError


def test_requested_batches_are_yielded_in_order(pages: Pages) -> None:
    places = [BatchPlace("validate", 0, number=number) for number in range(3)]
    requests = [BatchRequest(place, rows) for place, rows in zip(places, ((4, 1), (4,), (0, 5, 2)), strict=True)]
    with loading(DocClsDataset(pages), requests, num_workers=0, pin_memory=False) as batches:
        loaded = list(batches)
    assert [batch.indices_N.tolist() for batch in loaded] == [[4, 1], [4], [0, 5, 2]]
    assert [batch.place for batch in loaded] == places
    assert [batch.targets_N.tolist() for batch in loaded] == [[0, 1], [0], [0, 1, 0]]


def test_only_workers_need_shared_memory(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*others: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("mmap.mmap", refuse)
    monkeypatch.setattr("multiprocessing.heap.BufferWrapper._heap", Heap())  # its memory of earlier arrays is not used
    requests = [BatchRequest(BatchPlace("predict", 0), (0,))]
    with loading(DocClsDataset(pages), requests, 0, False) as batches:
        assert len(list(batches)) == 1
    with (
        pytest.raises(RankLocalError, match=r"\(No such device\): set data\.num_workers to 0"),
        loading(DocClsDataset(pages), requests, 1, False),
    ):
        pytest.fail("there are workers")


def test_temporary_folder_that_cannot_hold_the_socket_of_workers_is_named(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*others: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", refuse)
    message = rf"{tempfile.gettempdir()} \(Operation not permitted\): set the environment variable TMPDIR"
    requests = [BatchRequest(BatchPlace("predict", 0), (0,))]
    with pytest.raises(RankLocalError, match=message), loading(DocClsDataset(pages), requests, 1, False):
        pytest.fail("there are workers")


def test_global_generator_is_not_used(pages: Pages) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with loading(DocClsDataset(pages), [BatchRequest(BatchPlace("predict", 0), (0,))], 0, False) as batches:
        list(batches)
    assert torch.rand(1) == expected
