"""Fixtures of the `distributed` suite: gloo ranks on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import PLAIN, RICH, Run, Trainer, write_pages


@pytest.fixture(scope="session", autouse=True)
def _gloo(need: Callable[[str, bool, str], None]) -> None:
    import torch.distributed as dist  # takes two seconds, so only if a test of this folder runs

    need("distributed", dist.is_available() and dist.is_gloo_available(), "torch has no gloo here")


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Return a trainer for the 48 drawn pages."""
    workspace: Path = tmp_path_factory.mktemp("distributed")
    return Trainer(write_pages(workspace / "data"), workspace)


@pytest.fixture(scope="session")
def plain_runs(trainer: Trainer) -> dict[int, Run]:
    """Train all folds by the plain recipe at world sizes 1, 2 and 3."""
    return {size: trainer.train(*PLAIN, world_size=size) for size in (1, 2, 3)}


@pytest.fixture(scope="session")
def rich_run(trainer: Trainer) -> Run:
    """Train all folds in one process by the recipe that draws the most random numbers."""
    return trainer.train(*RICH)
