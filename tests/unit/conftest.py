"""Fixtures shared by unit tests: a small data set on disk, and a config for it."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from doccls.config import Config
from doccls.data.dataset import Pages
from doccls.reporting.log import RunLog
from doccls.system.signals import STOP_SIGNALS

MakeConfig = Callable[..., Config]
MakeData = Callable[..., Path]


class KeptLog(RunLog):
    """A log that records all lines, details included."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def detail(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True, scope="session")
def compute_on_one_thread() -> None:
    """Use one thread: the models here are tiny, and synchronization would cost more than it gains."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    """Restore the handlers after each test, since a command that fails ignores signals until its process exits."""
    earlier = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def reset_accelerate() -> Iterator[None]:
    """Reset Accelerate, which keeps the first precision of a process for all later ones."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Return `make_config(train={"epochs": 2})`: a config with paths in tmp_path, without modes and files."""

    def make(**sections: Any) -> Config:
        data = {"train_csv": "train.csv", "image_dir_train": "train", **sections.pop("data", {})}
        return Config.model_validate({"data": data, **sections}, context={"base": tmp_path})

    return make


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """Return `make_data(ids, targets)`: it writes tmp_path/train.csv and an image in tmp_path/train for each file."""

    def make(
        ids: Sequence[str],
        targets: Sequence[str],
        files: Sequence[str] | None = None,
        extra: Mapping[str, Sequence[str]] | None = None,
        table: str = "train.csv",
        folder: str = "train",
    ) -> Path:
        columns = {"ID": ids, "target": targets, **(extra or {})}
        with (tmp_path / table).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        (tmp_path / folder).mkdir(exist_ok=True)
        for number, name in enumerate([f"{sample_id}.jpg" for sample_id in ids] if files is None else files):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            page = np.full((12, 8, 3), 255, np.uint8)
            page[2:6, 1:6] = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
            Image.fromarray(page).save(path)
        return tmp_path

    return make


@pytest.fixture
def pages(make_data: MakeData) -> Pages:
    """Return six pages of two classes."""
    ids = [f"i{number}" for number in range(6)]
    folder = make_data(ids, ["0", "1"] * 3, files=[f"{sample_id}.png" for sample_id in ids])
    return Pages(ids, [folder / "train" / f"{sample_id}.png" for sample_id in ids], np.array([0, 1] * 3), 16, 16, 10**6)
