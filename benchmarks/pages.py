"""Pages for the benchmarks: drawn like the demo's, A4 at 150 dpi, in the layouts of doccls and timm."""

import csv
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from doccls.demo.dataset import damage
from doccls.demo.pages import CLASSES, draw_page

A4_PX = (1240, 1754)  # width and height at 150 dpi
_PROCESSES = 2


def draw_pages(folder: Path, count: int) -> None:
    """Write `folder`/train.csv (ID, target) and `folder`/train/*.jpg, unless they exist."""
    table = folder / "train.csv"
    if table.exists():
        return
    (folder / "train").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(_PROCESSES) as pool:
        list(pool.map(_draw, [folder / "train"] * count, range(count)))
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "target"])
        writer.writerows([f"{number:05d}.jpg", CLASSES[number % len(CLASSES)]] for number in range(count))


def link_for_timm(folder: Path, train: list[str], valid: list[str]) -> Path:
    """Link the training and validation files in the layout of timm's ImageFolder; return its root."""
    with (folder / "train.csv").open(newline="") as file:
        label_of = {row["ID"]: row["target"] for row in csv.DictReader(file)}
    root = folder / "timm"
    for split, names in (("train", train), ("validation", valid)):
        for name in names:
            link = root / split / label_of[name] / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(folder / "train" / name)
    return root


def _draw(folder: Path, number: int) -> None:
    rng = np.random.default_rng([7, number])
    page = damage(draw_page(CLASSES[number % len(CLASSES)], rng, A4_PX[1]), rng)
    page = cv2.resize(page, A4_PX, interpolation=cv2.INTER_AREA) if page.shape[1::-1] != A4_PX else page
    Image.fromarray(page).save(folder / f"{number:05d}.jpg", quality=85)
