"""Fixtures of the `faults` suite: runs with injected faults, on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_cases import Reference, train_reference
from tiny_runs import Trainer, write_pages


@pytest.fixture(scope="session", autouse=True)
def _gloo(need: Callable[[str, bool, str], None]) -> None:
    import torch.distributed as dist

    need("distributed", dist.is_available() and dist.is_gloo_available(), "torch has no gloo here")


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Return a trainer for the 48 drawn pages."""
    workspace: Path = tmp_path_factory.mktemp("faults")
    return Trainer(write_pages(workspace / "data"), workspace)


@pytest.fixture(scope="session")
def reference(trainer: Trainer) -> Reference:
    """Train the uninterrupted run."""
    return train_reference(trainer)
