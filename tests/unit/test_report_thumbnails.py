"""Thumbnails: small, within their budget, from the page store or the image files."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from doccls.config import Config
from doccls.data.prepare import prepare_data
from doccls.data.store import choose_store
from doccls.report import thumbnails as module
from doccls.report.thumbnails import THUMBNAIL_PX, PageReader, collect_thumbnails, encode_thumbnail
from doccls.reporting.progress import ConsoleReporter
from tests.unit.report_runs import IDS, write_run

NOISE = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)


def decode(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_thumbnail_is_small_and_always_the_same() -> None:
    encoded = encode_thumbnail(NOISE)
    assert decode(encoded).size == (107, THUMBNAIL_PX) and encode_thumbnail(NOISE.copy()) == encoded
    assert decode(encode_thumbnail(NOISE[:20, :10])).size == (10, 20), "a smaller page is not enlarged"


def test_thumbnails_end_where_the_budget_does() -> None:
    size = len(encode_thumbnail(NOISE))
    asked = []

    def read(row: int) -> np.ndarray | None:
        asked.append(row)
        return None if row == 7 else NOISE

    found = collect_thumbnails([5, 7, 3, 1, 2], read, max_bytes=2 * size + 1)
    assert list(found.content) == [5, 3] and (found.missing, found.left_out) == (1, 2)
    assert asked == [5, 7, 3, 1], "further pages are not even read"
    assert collect_thumbnails([5, 3], read, max_bytes=2 * size).left_out == 0


def make_config(folder: Path, store: str) -> Config:
    data = {"train_csv": "train.csv", "image_dir_train": "train", "store": store, "folds": 3, "num_workers": 0}
    sections = {"data": data, "train": {"img_size": 32}, "output": {"exp_dir": "experiments"}}
    return Config.model_validate(sections, context={"base": folder})


def test_pages_come_from_files_and_missing_ones_are_none(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "train" / IDS[1]).unlink()
    (tmp_path / "train" / IDS[2]).write_bytes(b"no image")
    reader = PageReader(make_config(tmp_path, "off"), [*IDS, "../up.jpg"])
    page = reader.read(0)
    assert page is not None and page.shape == (THUMBNAIL_PX, 107, 3)
    assert [reader.read(row) for row in (1, 2, len(IDS))] == [None] * 3


def test_pages_come_from_the_store_unless_the_file_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    rows = "".join(f"{name},{row % 3}\n" for row, name in enumerate(IDS))
    (tmp_path / "train.csv").write_text(f"ID,target\n{rows}")
    config = make_config(tmp_path, "auto")
    prepare_data(config, None, choose_store(config), ConsoleReporter())
    changed = tmp_path / "train" / IDS[1]
    Image.new("RGB", (50, 50), (200, 0, 0)).save(changed)
    decoded: list[bytes] = []
    monkeypatch.setattr(module, "load_page", lambda data, *_: decoded.append(data) or np.zeros((9, 9, 3), np.uint8))
    reader = PageReader(config, IDS)
    page = reader.read(0)
    assert page is not None and max(page.shape) == config.page_px and decoded == []
    reader.read(1)
    assert decoded == [changed.read_bytes()]
