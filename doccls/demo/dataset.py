"""A demo data set of document pages, drawn offline and byte-for-byte reproducible.

Classes differ by structure, never by brightness or a fixed position: a linear model on thumbnails fails, while a small
convolutional network learns them in about a minute.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from doccls.demo.canvas import Pixels
from doccls.demo.pages import CLASSES, draw_page
from doccls.system.atomic_files import write_bytes

SIZE_PX = 320
TRAIN, TEST, ORDER = 0, 1, 2  # The second number of each random stream's seed.
WEIGHTS = np.linspace(2.0, 0.5, len(CLASSES)) / np.linspace(2.0, 0.5, len(CLASSES)).sum()  # Some are rarer.


class Page(NamedTuple):
    """One page of the data set: its name without extension, its ID in the table, its class and its file's bytes."""

    name: str
    row_id: str
    target: str
    jpeg: bytes


def damage(page: Pixels, rng: np.random.Generator, strength: float = 1.0) -> Pixels:
    """Return `page` (uint8 H x W x 3) as scanned: rotated, shaded, blurred, faded and noisy.

    `strength` scales every effect but the quarter turns, which swap the page's sides.
    """
    page = np.rot90(page, rng.choice(4, p=(0.79, 0.07, 0.07, 0.07))).copy()
    height, width = page.shape[:2]
    turn_deg, zoom = rng.normal(0, 2.5) * strength, 1 - rng.uniform(-0.04, 0.22) * strength
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), turn_deg, zoom)
    matrix[:, 2] += rng.uniform(-0.065, 0.065, 2) * strength * (width, height)
    lid = (int(rng.choice([255, 235, 120, 40])),) * 3
    rotated = cv2.warpAffine(page, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=lid)
    blurred = cv2.GaussianBlur(rotated, (0, 0), rng.uniform(0.05, 0.75) * strength + 1e-3).astype(np.float32)
    slope = rng.uniform(-1, 1) * np.linspace(-1, 1, width) + rng.uniform(-1, 1) * np.linspace(-1, 1, height)[:, None]
    shadow = 1 - rng.uniform(0, 0.18) * strength * (1 + slope)
    if rng.random() < 0.3:  # The dark band that a book's spine or a fold leaves.
        shadow -= rng.uniform(0, 0.3) * strength * np.exp(-(((slope - rng.uniform(-1, 1)) / 0.12) ** 2))
    contrast, level = 1 - rng.uniform(0, 0.35) * strength, 128 + rng.uniform(-25, 15) * strength
    noise = rng.normal(0, rng.uniform(1, 7) * strength, (height, width, 1))
    worn = ((blurred - 128) * contrast + level) * shadow[..., None] + noise
    worn_page: Pixels = np.clip(np.rint(worn), 0, 255).astype(np.uint8)
    return worn_page


def make_page(seed: int, split: int, index: int) -> Page:
    """Make page `index` of the training (0) or test (1) split; it depends on these three numbers alone."""
    rng = np.random.default_rng([seed, split, index])
    kind = rng.choice(len(CLASSES), p=WEIGHTS) if rng.random() < 0.3 else index % len(CLASSES)
    name, extension = rng.bytes(6).hex(), "" if rng.random() < 0.2 else ".jpg"
    pixels = damage(draw_page(CLASSES[kind], rng, SIZE_PX), rng, 1.5 if split == TEST else 1.0)
    jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    return Page(name, name + extension, CLASSES[kind], jpeg)


def write_demo(folder: Path, *, pages: int = 480, test_pages: int = 60, seed: int = 0) -> None:
    """Write the demo set under `folder`/data/raw: `train.csv`, `sample_submission.csv`, and JPEGs in train and test.

    Both tables have the columns ID and target (the same class in every row of the sample); about one ID in five lacks
    its `.jpg`. The same arguments write the same bytes, given the same versions of Python, OpenCV and NumPy. Files are
    written atomically, tables after their images; other files in the folder stay.

    Raises:
        ValueError: `pages` or `test_pages` is under 1, or `seed` is negative.
        OSError: the folder cannot be written.
    """
    if min(pages, test_pages) < 1 or seed < 0:
        raise ValueError(f"need pages >= 1, test_pages >= 1 and seed >= 0, got {pages}, {test_pages} and {seed}")
    raw = Path(folder) / "data" / "raw"
    splits = ((TRAIN, "train", "train.csv", pages), (TEST, "test", "sample_submission.csv", test_pages))
    for split, images, table, count in splits:
        rows = []
        for index in range(count):
            page = make_page(seed, split, index)
            write_bytes(raw / images / f"{page.name}.jpg", page.jpeg)
            rows.append(f"{page.row_id},{page.target if split == TRAIN else CLASSES[0]}\n")
        order = np.random.default_rng([seed, ORDER, split]).permutation(count)
        write_bytes(raw / table, "".join(["ID,target\n", *(rows[i] for i in order)]).encode())
