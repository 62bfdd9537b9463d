"""How much disk a fold will need, and what the log says of what is free."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from doccls.system.disk import measure_free
from doccls.training.checkpoint import DiskNeed, describe_disk, estimate_disk

MIB = 2**20


@pytest.mark.parametrize(("ema", "states"), [(False, 2 * (400 + 800)), (True, 2 * (800 + 800))])
def test_it_is_weights_the_average_and_two_moments_twice(ema: bool, states: int) -> None:
    model = nn.Linear(10, 10, bias=False)
    assert estimate_disk(model.state_dict().values(), model.parameters(), ema) == DiskNeed(400, states)


def test_what_adam_saves_is_what_was_said() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(200, 200), b=nn.BatchNorm1d(200)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 200)).sum().backward()
    optimizer.step()
    kept = [one for state in optimizer.state_dict()["state"].values() for one in state.values()]
    saved = sum(one.numel() * one.element_size() for one in [*kept, *model.state_dict().values()])
    need = estimate_disk(model.state_dict().values(), model.parameters(), False)
    assert need.resume / 2 == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize(("free_mib", "warned"), [(20, False), (19.9, True), (0, True)])
def test_less_than_twice_is_a_warning(tmp_path: Path, free_mib: float, warned: bool) -> None:
    lines = describe_disk(DiskNeed(2 * MIB, 8 * MIB), int(free_mib * MIB), 3, tmp_path)
    assert lines[0] == (
        "[DISK] fold=3 writes about 10.0 MiB (best weights 2.0 MiB, two resume checkpoints 8.0 MiB); "
        f"{free_mib:.1f} MiB are free"
    )
    assert [
        line.startswith(f"[WARNING] {tmp_path}: {free_mib:.1f} MiB are free, less than twice") for line in lines[1:]
    ] == ([True] if warned else [])


def test_free_is_of_the_disk_that_holds_the_folder(small_disk: Path) -> None:
    assert 2 * MIB < measure_free(small_disk) <= 3 * MIB < measure_free(Path("/"))
