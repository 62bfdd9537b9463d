"""Load batches of augmented A4 pages at 224 px without a model: `python -m benchmarks.loader_alone ours|timm FOLDER`.

Prints images per CPU-second of one process without workers, after a first epoch that fills caches.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SIZE_PX, BATCH, EPOCHS = 224, 32, 3


def load_ours(folder: Path) -> Iterator[Any]:
    """Load as `doccls.train` does with `data.num_workers=0`, the basic mode and pages in the store."""
    import cv2

    from doccls.config.load import Override, load_config
    from doccls.data.dataset import DocClsDataset, Pages
    from doccls.data.loader import loading
    from doccls.data.prepare import prepare_data
    from doccls.data.sampler import BatchPlace, BatchRequest
    from doccls.data.store import StoreChoice
    from doccls.data.transforms import Augmentation

    cv2.setNumThreads(0)
    path = folder / "loader.yaml"
    path.write_text("data:\n  train_csv: train.csv\n  image_dir_train: train\n")
    config = load_config(path, overrides=[Override("train.img_size", SIZE_PX, "benchmark")])
    data = prepare_data(config, None, StoreChoice(folder / "loader_store", required=True))
    manifest = data.manifest
    pages = Pages(manifest.ids, manifest.paths, manifest.targets_N, SIZE_PX, config.page_px, 10**8, data.stored)
    count = len(manifest) // BATCH * BATCH
    requests = (
        BatchRequest(BatchPlace("train", 0, epoch), tuple(range(first, first + BATCH)))
        for epoch in range(1 + EPOCHS)
        for first in range(0, count, BATCH)
    )
    with loading(DocClsDataset(pages, Augmentation(config.augment, SIZE_PX), 42), requests, 0, False) as batches:
        yield from batches


def load_timm(folder: Path) -> Iterator[Any]:
    """Load with timm's training loader and its lightest usual augmentation: crop, resize, colour."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(folder / "timm"), split="train", is_training=True)
    loader = create_loader(
        dataset, (3, SIZE_PX, SIZE_PX), BATCH, is_training=True, scale=(0.9, 1.0), ratio=(0.9, 1.1), hflip=0.0,
        color_jitter=0.15, interpolation="bilinear", num_workers=0, use_prefetcher=False, persistent_workers=False,
    )  # fmt: skip
    for _ in range(1 + EPOCHS):
        yield from loader


def main() -> None:
    """Measure the loader named on the command line."""
    torch.set_num_threads(1)
    batches = {"ours": load_ours, "timm": load_timm}[sys.argv[1]](Path(sys.argv[2]))
    sizes = [len(next(batches)[0])]
    started_s = time.process_time()
    for number, batch in enumerate(batches):
        sizes.append(len(batch[0]))
        if number == 0:
            started_s, sizes = time.process_time(), []
    print(f"images_per_cpu_s={sum(sizes) / (time.process_time() - started_s):.1f}")


if __name__ == "__main__":
    main()
