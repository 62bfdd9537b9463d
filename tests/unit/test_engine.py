"""Keys without effect on the devices, with the processes or with the model of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from doccls.config.schema import TrainConfig
from doccls.training.engine import _list_idle_here

SYNCHRONIZED, PLAIN = nn.Sequential(nn.SyncBatchNorm(3)), nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("keys", "model", "processes", "device", "idle"),
    [
        ({"sync_bn": True}, SYNCHRONIZED, 1, "cuda", "train.sync_bn has no effect, since a single process"),
        ({"sync_bn": True}, PLAIN, 2, "cuda", "train.sync_bn has no effect, since the model has no BatchNorm"),
        ({"sync_bn": True}, SYNCHRONIZED, 2, "cuda", None),
        ({"speed": "fast"}, PLAIN, 1, "cpu", "train.speed = fast"),
        ({"speed": "fast"}, PLAIN, 1, "cuda", None),
        ({}, PLAIN, 1, "cpu", None),
    ],
)
def test_keys_without_effect_here_are_reported(
    keys: dict[str, Any], model: nn.Module, processes: int, device: str, idle: str | None
) -> None:
    accelerator: Any = SimpleNamespace(num_processes=processes, device=torch.device(device))
    lines = _list_idle_here(TrainConfig(**keys), model, accelerator)
    assert len(lines) == (idle is not None) and all(line.startswith(str(idle)) for line in lines)
