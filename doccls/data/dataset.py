"""Samples and batches: pages stay uint8 until they are on the device."""

from collections.abc import MutableSequence, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from doccls.data.images import ImageError, load_page, pad_page, shrink_page
from doccls.data.sampler import BatchPlace, BatchRequest
from doccls.data.shared_memory import describe_shared_memory
from doccls.data.store import StoredPages
from doccls.data.transforms import Augmentation
from doccls.errors import RankLocalError
from doccls.randomness import Purpose, derive_stream


class AugmentationKey(NamedTuple):
    """What a sample's augmentation is drawn by, beside the seed and the sample."""

    fold: int
    epoch: int
    """0-based."""


class SampleKey(NamedTuple):
    """Which sample, and how it is augmented; not at all without a key."""

    sample: int
    augmentation: AugmentationKey | None = None


class Batch(NamedTuple):
    """Samples of one forward pass on one process."""

    images_NHWC: torch.Tensor
    """(n, size, size, 3) uint8 RGB."""
    targets_N: torch.Tensor
    """(n,) int64 class indices; -1 where there is no label."""
    indices_N: torch.Tensor
    """(n,) int64 sample indices."""
    place: BatchPlace
    """What it is for."""


class Pages(NamedTuple):
    """Where pages lie and how they are read; place i of each is sample i."""

    ids: Sequence[str]
    paths: Sequence[Path | None]
    targets_N: np.ndarray
    """(n,) int64 class indices; -1 where there is no label."""
    img_size: int
    """Side of the square that the network takes."""
    page_px: int
    """Longest side of the pages as they are kept, and augmented."""
    max_pixels: int
    stored: StoredPages | None = None
    """The same pages, decoded; those that it lacks are read from their files."""


class DocClsDataset(Dataset[tuple[np.ndarray, int, int]]):
    """Sample key -> (page (size, size, 3) uint8, target, index); augmented if the key says how."""

    def __init__(self, pages: Pages, augmentation: Augmentation | None = None, seed: int = 0) -> None:
        self._pages = pages
        self._augmentation = augmentation
        self._seed = seed

    def __getitem__(self, key: SampleKey) -> tuple[np.ndarray, int, int]:
        index, augmentation = key
        page, pages = self._read(index), self._pages
        if augmentation is None:
            page = pad_page(shrink_page(page, pages.img_size), pages.img_size)
        else:
            assert self._augmentation is not None
            stream = derive_stream(self._seed, Purpose.AUGMENTATION, augmentation.fold, augmentation.epoch, index)
            page = self._augmentation.apply(pad_page(page, pages.page_px), stream)
        return page, int(pages.targets_N[index]), index

    def __getitems__(self, request: BatchRequest) -> "LoadedSamples":
        """All samples of a batch; those of training steps are augmented. torch's loader calls it."""
        return LoadedSamples(request.place, [self[key] for key in list_keys(request)])

    @property
    def page_bytes(self) -> int:
        """Of one page on its way to the device."""
        return 3 * self._pages.img_size**2

    def describe(self, sample: int) -> str:
        """The sample in a user's words."""
        return f"ID {self._pages.ids[sample]!r} ({self._pages.paths[sample]})"

    def _read(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8 with its longest side page_px."""
        path = self._pages.paths[index]
        assert path is not None, f"sample {index} has no image and must not be asked for"
        page = None if self._pages.stored is None else self._pages.stored.read(index)
        if page is not None:
            return page
        try:
            return load_page(path.read_bytes(), self._pages.max_pixels, self._pages.page_px)
        except (OSError, ImageError) as error:
            raise RankLocalError(f"image of ID {self._pages.ids[index]!r} turned bad: {path}: {error}") from error


class NotedDataset(Dataset["LoadedSamples"]):
    """The same samples; each loader worker writes down the one that it holds, for whoever finds it dead."""

    def __init__(self, dataset: DocClsDataset, held: MutableSequence[int]) -> None:
        """`held` is in shared memory: a place for each worker, -1 while it holds none."""
        self._dataset = dataset
        self._held = held

    def __getitems__(self, request: BatchRequest) -> "LoadedSamples":
        """All samples of a batch."""
        worker = get_worker_info()
        assert worker is not None
        samples = []
        for key in list_keys(request):
            self._held[worker.id] = key.sample
            samples.append(self._dataset[key])
        self._held[worker.id] = -1
        return LoadedSamples(request.place, samples)


class LoadedSamples(NamedTuple):
    """What a batch is made of."""

    place: BatchPlace
    samples: list[tuple[np.ndarray, int, int]]
    """Page, target and index of each."""


def list_keys(request: BatchRequest) -> list[SampleKey]:
    """The keys of a batch's samples: training augments them by fold and epoch."""
    place = request.place
    augmentation = AugmentationKey(place.fold, place.epoch) if place.phase == "train" else None
    return [SampleKey(index, augmentation) for index in request.indices]


def collate_batch(loaded: LoadedSamples) -> Batch:
    """Samples -> Batch, on the CPU; in a loader worker in shared memory, where the other process finds it."""
    images, targets, indices = zip(*loaded.samples, strict=True)
    batch = Batch(torch.from_numpy(np.stack(images)), torch.tensor(targets), torch.tensor(indices), loaded.place)
    if get_worker_info() is not None:
        _share(batch)
    return batch


def _share(batch: Batch) -> None:
    """Move the batch. Left to the thread that sends it, a want of room would be printed and the batch forgotten."""
    try:
        for tensor in (batch.images_NHWC, batch.targets_N, batch.indices_N):
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise RankLocalError(
            f"no shared memory for a batch of {len(batch.indices_N)} pages: {describe_shared_memory()}"
        ) from error
