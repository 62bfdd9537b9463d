"""Samples and batches: pages stay uint8 until they are on the device."""

import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from doccls.data.images import ImageError, decode_image, fit_page
from doccls.data.transforms import Augmentation
from doccls.errors import OwnError
from doccls.randomness import Purpose, derive_stream


class SampleKey(NamedTuple):
    """Which sample, as seen in which epoch (0-based)."""

    epoch: int
    sample: int


class Batch(NamedTuple):
    """Samples of one forward pass on one process."""

    images_NHWC: torch.Tensor
    """(n, size, size, 3) uint8 RGB."""
    targets_N: torch.Tensor
    """(n,) int64 class indices; -1 where there is no label."""
    indices_N: torch.Tensor
    """(n,) int64 sample indices."""


class Pages(NamedTuple):
    """Where pages lie and how they are read; index i of each tuple is sample i."""

    ids: Sequence[str]
    paths: Sequence[Path | None]
    targets: Sequence[int]
    img_size: int
    max_pixels: int


class DocClsDataset(Dataset[tuple[np.ndarray, int, int]]):
    """Sample key -> (page (size, size, 3) uint8, target, index); augmented if an augmentation is given."""

    def __init__(self, pages: Pages, augmentation: Augmentation | None = None, seed: int = 0, fold: int = 0) -> None:
        self._pages = pages
        self._augmentation = augmentation
        self._seed = seed
        self._fold = fold

    def __getitem__(self, key: SampleKey) -> tuple[np.ndarray, int, int]:
        epoch, index = key
        page = self._read(index)
        if self._augmentation is not None:
            stream = derive_stream(self._seed, Purpose.AUGMENTATION, self._fold, epoch, index)
            page = self._augmentation.apply(page, stream)
        return page, self._pages.targets[index], index

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


def build_loader(
    dataset: DocClsDataset, batches: Iterable[list[SampleKey]], num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """A loader of exactly `batches`, in their order; the number of workers changes no bit of what it gives."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collate_batch,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # Forked workers share the imported stack; any other start imports it again in each.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader draws a base seed: keep its hands off the global generator
    )


def _start_worker(worker_id: int) -> None:
    """A worker computes on one thread and leaves signals to its parent, which ends it."""
    assert sys.__stdout__ is not None and sys.__stderr__ is not None
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # one process writes the log, and its end is the last line
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
