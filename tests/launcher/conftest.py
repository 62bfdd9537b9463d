"""Fixtures of the suite `launcher`: complete launches on the CPU, from the command line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launches import kill_started
from tiny_runs import Trainer, write_pages


@pytest.fixture(scope="session", autouse=True)
def _gloo(need: Callable[[str, bool, str], None]) -> None:
    import torch.distributed as dist

    need("distributed", dist.is_available() and dist.is_gloo_available(), "torch has no gloo here")


@pytest.fixture(autouse=True)
def _kill_left_launches() -> Iterator[None]:
    yield
    kill_started()


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer on 48 drawn pages."""
    folder: Path = tmp_path_factory.mktemp("launcher")
    return Trainer(write_pages(folder / "data"), folder)
