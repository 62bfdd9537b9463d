"""Kernels follow the preset unless a key overrides it, and are described in one log line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn

from doccls.config.schema import TrainConfig
from doccls.training.speed import choose_kernels, describe_kernels, wants_compile

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore torch's global switches after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cuda = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cuda
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    ("train", "deterministic", "tf32"),
    [
        ({}, True, True),
        ({"amp": False}, True, False),
        ({"speed": "fast"}, False, True),
        ({"speed": "fast", "amp": False}, False, True),
        ({"speed": "fast", "deterministic": True}, True, True),
        ({"deterministic": False, "amp": False}, False, False),
    ],
)
def test_preset_sets_torch_switches(train: dict[str, Any], deterministic: bool, tf32: bool) -> None:
    choose_kernels(TrainConfig(**train))
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_fast_compiles_on_gpus_unless_overridden() -> None:
    fast = TrainConfig(speed="fast")
    assert wants_compile(fast, GPU) and not wants_compile(fast, CPU)
    assert not wants_compile(TrainConfig(), GPU) and wants_compile(TrainConfig(compile=True), CPU)
    assert not wants_compile(TrainConfig(speed="fast", compile=False), GPU)


def test_kernels_are_described_in_one_line() -> None:
    set_fused_attn(True, experimental=True)
    assert describe_kernels(TrainConfig(), CPU) == "deterministic=on compile=off fused_attention=on channels_last=on"
    assert describe_kernels(TrainConfig(speed="fast", optimizer="lamb"), GPU) == (
        "deterministic=off compile=on fused_attention=on channels_last=on "
        "fused_optimizer=off cudnn_benchmark=on tf32=on"
    )
