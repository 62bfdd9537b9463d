"""Samples and batches. Pages stay uint8 until they are on the device."""

from collections.abc import MutableSequence, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from doccls.config.paths import read_regular_file
from doccls.config.schema import Config
from doccls.data.damage import STRENGTHS, damage_page
from doccls.data.formats import ImageError
from doccls.data.images import load_page, pad_page, shrink_page
from doccls.data.manifest import Manifest
from doccls.data.sampler import BatchPlace, BatchRequest
from doccls.data.shared_memory import describe_shared_memory
from doccls.data.store import StoredPages
from doccls.data.transforms import Augmentation
from doccls.errors import RankLocalError
from doccls.randomness import Purpose, derive_stream

# Of the damage, in every run: the damaged copy of a sample must not depend on project.seed, so that scores can be
# compared, and logits blended, between runs.
_DAMAGE_SEED = 0


class AugmentationKey(NamedTuple):
    """The fold and epoch that, with the seed and the sample, determine a sample's augmentation."""

    fold: int
    epoch: int  # 0-based


class SampleKey(NamedTuple):
    """The index of a sample and its augmentation key; without a key it is not augmented, but may be damaged."""

    sample: int
    augmentation: AugmentationKey | None = None
    is_damaged: bool = False


class Batch(NamedTuple):
    """The samples of one forward pass on one process."""

    images_NHWC: torch.Tensor  # (n, size, size, 3) uint8 RGB
    targets_N: torch.Tensor  # (n,) int64 class indices; -1 where there is no label
    indices_N: torch.Tensor  # (n,) int64 sample indices
    place: BatchPlace


class Pages(NamedTuple):
    """The image files of all samples and how to read them; index i of each sequence is sample i."""

    ids: Sequence[str]
    paths: Sequence[Path | None]
    targets_N: np.ndarray  # (n,) int64 class indices; -1 where there is no label
    img_size: int  # side of the network's square input, px
    page_px: int  # longest side of the pages as they are stored and augmented
    max_pixels: int
    stored: StoredPages | None = None  # the same pages, decoded; missing ones are read from their files


class DocClsDataset(Dataset[tuple[np.ndarray, int, int]]):
    """A map from `SampleKey` to (page (size, size, 3) uint8, target, index), augmented or damaged if the key says so.

    A page's augmentation depends on `seed` and the entire key, its damage only on the sample and `damage_strength`.
    """

    def __init__(
        self,
        pages: Pages,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        damage_strength: float | None = None,
    ) -> None:
        self._pages = pages
        self._augmentation = augmentation
        self._seed = seed
        self._damage_strength = damage_strength

    def __getitem__(self, key: SampleKey) -> tuple[np.ndarray, int, int]:
        index, augmentation, is_damaged = key
        page, pages = self._read(index), self._pages
        if is_damaged:
            assert self._damage_strength is not None and augmentation is None
            stream = derive_stream(_DAMAGE_SEED, Purpose.DAMAGE, index)
            page = damage_page(page, pages.img_size, self._damage_strength, stream)
        elif augmentation is None:
            page = pad_page(shrink_page(page, pages.img_size), pages.img_size)
        else:
            assert self._augmentation is not None
            stream = derive_stream(self._seed, Purpose.AUGMENTATION, augmentation.fold, augmentation.epoch, index)
            page = self._augmentation.apply(page, stream)
        return page, int(pages.targets_N[index]), index

    def __getitems__(self, request: BatchRequest) -> "LoadedSamples":
        """Return all samples of a batch, as its phase requires. Called by torch's DataLoader."""
        return LoadedSamples(request.place, [self[key] for key in list_keys(request)])

    @property
    def page_bytes(self) -> int:
        """The bytes of one page of the network's input size."""
        return 3 * self._pages.img_size**2

    def describe(self, sample: int) -> str:
        """Return the sample's ID and path, for messages."""
        return f"ID {self._pages.ids[sample]!r} ({self._pages.paths[sample]})"

    def _read(self, index: int) -> np.ndarray:
        """Return the page as (h, w, 3) uint8, longest side page_px."""
        path = self._pages.paths[index]
        assert path is not None, f"sample {index} has no image and must not be requested"
        page = None if self._pages.stored is None else self._pages.stored.read(index)
        if page is not None:
            return page
        try:
            return load_page(read_regular_file(path)[1], self._pages.max_pixels, self._pages.page_px)
        except (OSError, ImageError) as error:
            raise RankLocalError(
                f"image of ID {self._pages.ids[index]!r} can no longer be read: {path}: {error}"
            ) from error


def build_dataset(config: Config, manifest: Manifest, stored: StoredPages | None = None) -> DocClsDataset:
    """Build the dataset of a run's training and validation pages; `doccls preview` shows the same."""
    pages = Pages(
        manifest.ids,
        manifest.paths,
        manifest.targets_N,
        config.train.img_size,
        config.page_px,
        config.data.max_image_pixels,
        stored,
    )
    augmentation = Augmentation(config.augment, config.train.img_size)
    return DocClsDataset(pages, augmentation, config.project.seed, STRENGTHS.get(config.valid.damage))


class TrackedDataset(Dataset["LoadedSamples"]):
    """A dataset whose loader workers record the sample in progress, so that a crash can be attributed to it."""

    def __init__(self, dataset: DocClsDataset, in_progress: MutableSequence[int]) -> None:
        """Wrap `dataset`; `in_progress` is in shared memory: a sample index per worker, -1 for none."""
        self._dataset = dataset
        self._in_progress = in_progress

    def __getitems__(self, request: BatchRequest) -> "LoadedSamples":
        """Return all samples of a batch."""
        worker = get_worker_info()
        assert worker is not None
        samples = []
        for key in list_keys(request):
            self._in_progress[worker.id] = key.sample
            samples.append(self._dataset[key])
        self._in_progress[worker.id] = -1
        return LoadedSamples(request.place, samples)


class LoadedSamples(NamedTuple):
    """The samples of a batch before they are collated."""

    place: BatchPlace
    samples: list[tuple[np.ndarray, int, int]]  # (page, target, index)


def list_keys(request: BatchRequest) -> list[SampleKey]:
    """Return the keys of a batch's samples; its phase decides whether they are augmented or damaged."""
    place = request.place
    augmentation = AugmentationKey(place.fold, place.epoch) if place.phase == "train" else None
    return [SampleKey(index, augmentation, place.phase == "validate_damaged") for index in request.indices]


def collate_batch(loaded: LoadedSamples) -> Batch:
    """Collate samples into a Batch on the CPU; a loader worker puts it into shared memory."""
    images, targets, indices = zip(*loaded.samples, strict=True)
    batch = Batch(torch.from_numpy(np.stack(images)), torch.tensor(targets), torch.tensor(indices), loaded.place)
    if get_worker_info() is not None:
        _move_to_shared_memory(batch)
    return batch


def _move_to_shared_memory(batch: Batch) -> None:
    """Move the batch to shared memory.

    Were this left to the queue's feeder thread, a lack of memory would only be printed and the batch dropped.
    """
    try:
        for tensor in (batch.images_NHWC, batch.targets_N, batch.indices_N):
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise RankLocalError(
            f"no shared memory for a batch of {len(batch.indices_N)} pages: {describe_shared_memory()}"
        ) from error
