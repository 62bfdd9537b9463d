"""Fixtures of the suite `gpu`: runs on the machine's GPUs, or the same test bodies on the CPU (`--device cpu`)."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import Trainer, write_pages


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest, need: Callable[[str, bool, str], None]) -> str:
    """`cuda`, or `cpu` if that is asked for."""
    import torch

    chosen: str = request.config.getoption("--device")
    need("gpu", chosen == "cpu" or torch.cuda.is_available(), "torch finds no CUDA here (on the CPU: --device cpu)")
    return chosen


@pytest.fixture(scope="session", autouse=True)
def _device(device: str) -> None:
    """Also for a test that does not ask which."""


@pytest.fixture(scope="session")
def trainer(device: str, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Runs on 48 drawn pages, on the device."""
    workplace: Path = tmp_path_factory.mktemp("gpu")
    return Trainer(write_pages(workplace / "data"), workplace, show_gpus() if device == "cuda" else {})


def show_gpus() -> dict[str, str]:
    """The environment in which a rank sees what this process sees."""
    import torch

    all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", all_gpus)}
