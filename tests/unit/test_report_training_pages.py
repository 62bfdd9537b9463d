"""Training pages: from the page store or the image files, and the same from both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from doccls.config import Config
from doccls.data.prepare import prepare_data
from doccls.data.store import choose_store
from doccls.report import training_pages as module
from doccls.report.training_pages import PageReader
from doccls.reporting.progress import ConsoleReporter
from tests.unit.report_runs import IDS, write_run


def make_config(folder: Path, store: str) -> Config:
    data = {"train_csv": "train.csv", "image_dir_train": "train", "store": store, "folds": 3, "num_workers": 0}
    sections = {"data": data, "train": {"img_size": 32}, "output": {"exp_dir": "experiments"}}
    return Config.model_validate(sections, context={"base": folder})


def test_missing_and_broken_images_have_no_page(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "train" / IDS[1]).unlink()
    (tmp_path / "train" / IDS[2]).write_bytes(b"no image")
    config = make_config(tmp_path, "off")
    reader = PageReader(config, [*IDS, "../up.jpg"])
    page = reader.read(0)
    assert page is not None and max(page.pixels.shape) == config.page_px and (page.height_px, page.width_px) == (60, 40)
    assert [reader.read(row) for row in (1, 2, len(IDS))] == [None] * 3


def test_store_and_files_give_the_same_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    rows = "".join(f"{name},{row % 3}\n" for row, name in enumerate(IDS))
    (tmp_path / "train.csv").write_text(f"ID,target\n{rows}")
    config = make_config(tmp_path, "auto")
    from_file = PageReader(config, IDS).read(0)
    prepare_data(config, None, choose_store(config), ConsoleReporter())
    changed = tmp_path / "train" / IDS[1]
    Image.new("RGB", (50, 50), (200, 0, 0)).save(changed)
    decoded: list[bytes] = []
    decode = module.decode_reduced
    monkeypatch.setattr(module, "decode_reduced", lambda data, *others: decoded.append(data) or decode(data, *others))
    reader = PageReader(config, IDS)
    stored = reader.read(0)
    assert decoded == [] and stored is not None and from_file is not None
    assert np.array_equal(stored.pixels, from_file.pixels)
    assert (stored.height_px, stored.width_px) == (from_file.height_px, from_file.width_px) == (60, 40)
    page = reader.read(1)
    assert decoded == [changed.read_bytes()] and page is not None and (page.height_px, page.width_px) == (50, 50)
