"""Fixtures of the `gpu` suite: runs on the machine's GPUs, or on the CPU with `--device cpu`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import Trainer, write_pages


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest, need: Callable[[str, bool, str], None]) -> str:
    """Return `cuda`, or `cpu` if `--device cpu` was given."""
    import torch

    choice: str = request.config.getoption("--device")
    need("gpu", choice == "cpu" or torch.cuda.is_available(), "torch finds no CUDA here (on the CPU: --device cpu)")
    return choice


@pytest.fixture(scope="session", autouse=True)
def _device(device: str) -> None:
    """Apply the check of `device` to tests that do not use it."""


@pytest.fixture(scope="session")
def trainer(device: str, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Return a trainer for the 48 drawn pages on the device."""
    workspace: Path = tmp_path_factory.mktemp("gpu")
    return Trainer(write_pages(workspace / "data"), workspace, expose_gpus() if device == "cuda" else {})


def expose_gpus() -> dict[str, str]:
    """Return the environment that shows a rank the GPUs of this process."""
    import torch

    all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", all_gpus)}
