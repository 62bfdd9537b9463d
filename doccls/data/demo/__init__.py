"""A demo data set of document pages, drawn offline and the same bytes every time.

Twelve kinds of page (letters, invoices, music, ...) are drawn with varied layouts, faces, inks and papers, then worn
as a scanner wears them. Kinds differ by their structure, never by brightness or a fixed position, so that a linear
model on thumbnails fails and a small convolutional network learns them in about a minute.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from doccls.data.demo.canvas import Pixels
from doccls.data.demo.pages import CLASSES, draw_page
from doccls.run.artifacts import write_bytes

__all__ = ["CLASSES", "Page", "damage", "draw_page", "make_page", "write_demo"]

SIZE_PX = 320
JPEG_QUALITY = 85
TRAIN, TEST, ORDER = 0, 1, 2  # The middle word of a random stream's seed.
TEST_DAMAGE = 1.5
# Some classes turn up more often, as in real collections: the chance that a page's class is drawn by these weights.
UNEVEN = 0.3
WEIGHTS = np.linspace(2.0, 0.5, len(CLASSES)) / np.linspace(2.0, 0.5, len(CLASSES)).sum()


class Page(NamedTuple):
    """One page of the set: its name without an extension, the ID its table row has, its class and its file's bytes."""

    name: str
    row_id: str
    target: str
    jpeg: bytes


def damage(page: Pixels, rng: np.random.Generator, strength: float = 1.0) -> Pixels:
    """Return `page` (uint8 H x W x 3) as a scanner would deliver it: turned, shaded, blurred, faded and noisy.

    `strength` scales every effect (0 leaves only the quarter turns). The sides stay as they are,
    but for a quarter turn, which swaps them.
    """
    if rng.random() < 0.2:
        page = np.rot90(page, int(rng.integers(1, 4))).copy()
    height, width = page.shape[:2]
    turn_deg, zoom = rng.normal(0, 2.5) * strength, 1 - rng.uniform(-0.04, 0.22) * strength
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), turn_deg, zoom)
    matrix[:, 2] += rng.uniform(-0.065, 0.065, 2) * strength * np.array([width, height])
    lid = int(rng.choice([255, 235, 120, 40]))
    lying = cv2.warpAffine(page, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=(lid, lid, lid))
    blurred = cv2.GaussianBlur(lying, (0, 0), rng.uniform(0.05, 0.75) * strength + 1e-3).astype(np.float32)

    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    slope = np.cos(angle) * columns + np.sin(angle) * rows
    shadow = 1 - rng.uniform(0, 0.18) * strength * (1 + slope)
    if rng.random() < 0.3:
        # The dark band that a book's spine or a fold leaves.
        shadow -= 0.3 * strength * np.exp(-(((slope - rng.uniform(-1, 1)) / 0.12) ** 2)) * rng.random()
    contrast, level = 1 - rng.uniform(0, 0.35) * strength, rng.uniform(-25, 15) * strength
    faded = 128 + (blurred - 128) * contrast + level
    noise = rng.normal(0, 1, (height, width, 1)) * rng.uniform(1, 7) * strength
    worn = faded * shadow[..., None] + noise
    specks = rng.integers(0, (height, width), (int(rng.integers(0, 25) * strength), 2))
    worn[specks[:, 0], specks[:, 1]] = rng.choice([30, 240])
    worn_page: Pixels = np.clip(np.rint(worn), 0, 255).astype(np.uint8)
    return worn_page


def make_page(seed: int, split: int, index: int) -> Page:
    """Make page `index` of the training (0) or test (1) split; it depends on these three numbers alone."""
    rng = np.random.default_rng([seed, split, index])
    name = rng.bytes(6).hex()
    row_id = name if rng.random() < 0.2 else f"{name}.jpg"
    target = CLASSES[int(rng.choice(len(CLASSES), p=WEIGHTS)) if rng.random() < UNEVEN else index % len(CLASSES)]
    pixels = damage(draw_page(target, rng, SIZE_PX), rng, TEST_DAMAGE if split == TEST else 1.0)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return Page(name, row_id, target, jpeg.getvalue())


def _table(rows: list[tuple[str, str]], seed: int, split: int) -> bytes:
    """Return the CSV of ID and target, its rows in an order of their own."""
    order = np.random.default_rng([seed, ORDER, split]).permutation(len(rows))
    return "".join(f"{row_id},{target}\n" for row_id, target in [("ID", "target"), *(rows[i] for i in order)]).encode()


def write_demo(folder: Path, *, pages: int = 480, test_pages: int = 60, seed: int = 0) -> None:
    """Write the demo set under `folder`/data/raw: `train.csv`, `sample_submission.csv`, and JPEGs in train and test.

    Both tables have the columns ID and target (a class's name; in the sample one and the same name throughout). About
    one ID in five lacks its `.jpg`. The same arguments write the same bytes, given the same versions of OpenCV, Pillow
    and NumPy. Each file is written whole or not at all, and a table after its images, so it never names a missing one.
    Files already in the folder under other names stay. Raises ValueError where `pages` or `test_pages` is under 1 or
    `seed` is negative, and OSError where the folder cannot be written.
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
            rows.append((page.row_id, page.target if split == TRAIN else CLASSES[0]))
        write_bytes(raw / table, _table(rows, seed, split))
