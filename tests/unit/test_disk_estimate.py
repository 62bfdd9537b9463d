"""The disk space that a fold will need, and its report in the log."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from doccls.system.disk import measure_free
from doccls.training.checkpoint import DiskNeed, describe_disk, estimate_disk

MIB = 2**20


@pytest.mark.parametrize(("ema", "resume"), [(False, 2 * (400 + 800)), (True, 2 * (800 + 800))])
def test_estimate_covers_weights_ema_and_moments_of_two_checkpoints(ema: bool, resume: int) -> None:
    model = nn.Linear(10, 10, bias=False)
    assert estimate_disk(model.state_dict().values(), model.parameters(), ema) == DiskNeed(400, resume)


def test_estimate_matches_what_adam_saves() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(200, 200), b=nn.BatchNorm1d(200)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 200)).sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    saved = sum(tensor.numel() * tensor.element_size() for tensor in [*moments, *model.state_dict().values()])
    need = estimate_disk(model.state_dict().values(), model.parameters(), False)
    assert need.resume / 2 == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize(("free_mib", "warned"), [(20, False), (19.9, True), (0, True)])
def test_less_than_twice_the_estimate_is_a_warning(tmp_path: Path, free_mib: float, warned: bool) -> None:
    lines = describe_disk(DiskNeed(2 * MIB, 8 * MIB), int(free_mib * MIB), 3, tmp_path)
    assert lines[0] == (
        "[DISK] fold=3 writes about 10.0 MiB (best weights 2.0 MiB, two resume checkpoints 8.0 MiB); "
        f"{free_mib:.1f} MiB are free"
    )
    assert [
        line.startswith(f"[WARNING] {tmp_path}: {free_mib:.1f} MiB are free, less than twice") for line in lines[1:]
    ] == ([True] if warned else [])


def test_free_space_is_that_of_the_disk_that_holds_the_folder(small_disk: Path) -> None:
    assert 2 * MIB < measure_free(small_disk) <= 3 * MIB < measure_free(Path("/"))
