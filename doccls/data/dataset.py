"""Samples and batches: pages stay uint8 until they are on the device."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from doccls.data.images import ImageError, decode_image, fit_page
from doccls.data.transforms import Augmentation
from doccls.errors import OwnError
from doccls.randomness import Purpose, derive_stream


class Drawing(NamedTuple):
    """What a sample's augmentation is drawn by, beside the seed and the sample."""

    fold: int
    epoch: int
    """0-based."""


class SampleKey(NamedTuple):
    """Which sample, and how it is augmented; as it is without a drawing."""

    sample: int
    drawing: Drawing | None = None


class Batch(NamedTuple):
    """Samples of one forward pass on one process."""

    images_NHWC: torch.Tensor
    """(n, size, size, 3) uint8 RGB."""
    targets_N: torch.Tensor
    """(n,) int64 class indices; -1 where there is no label."""
    indices_N: torch.Tensor
    """(n,) int64 sample indices."""


class Pages(NamedTuple):
    """Where pages lie and how they are read; place i of each is sample i."""

    ids: Sequence[str]
    paths: Sequence[Path | None]
    targets_N: np.ndarray
    """(n,) int64 class indices; -1 where there is no label."""
    img_size: int
    max_pixels: int


class DocClsDataset(Dataset[tuple[np.ndarray, int, int]]):
    """Sample key -> (page (size, size, 3) uint8, target, index); augmented if the key has a drawing."""

    def __init__(self, pages: Pages, augmentation: Augmentation | None = None, seed: int = 0) -> None:
        self._pages = pages
        self._augmentation = augmentation
        self._seed = seed

    def __getitem__(self, key: SampleKey) -> tuple[np.ndarray, int, int]:
        index, drawing = key
        page = self._read(index)
        if drawing is not None:
            assert self._augmentation is not None
            stream = derive_stream(self._seed, Purpose.AUGMENTATION, drawing.fold, drawing.epoch, index)
            page = self._augmentation.apply(page, stream)
        return page, int(self._pages.targets_N[index]), index

    def _read(self, index: int) -> np.ndarray:
        path = self._pages.paths[index]
        assert path is not None, f"sample {index} has no image and must not be asked for"
        try:
            return fit_page(decode_image(path.read_bytes(), self._pages.max_pixels), self._pages.img_size)
        except (OSError, ImageError) as error:
            raise OwnError(f"image of ID {self._pages.ids[index]!r} turned bad: {path}: {error}") from error


def collate_batch(samples: list[tuple[np.ndarray, int, int]]) -> Batch:
    """Samples -> Batch, on the CPU."""
    images, targets, indices = zip(*samples, strict=True)
    return Batch(torch.from_numpy(np.stack(images)), torch.tensor(targets), torch.tensor(indices))
