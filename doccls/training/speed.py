"""Which kernels compute: reproducible ones, or the fastest; what `train.speed` turns on, and how the log says so."""

import os

import torch
from timm.layers import use_fused_attn

from doccls.config.schema import TrainConfig
from doccls.model.optim import has_fused_kernel


def choose_kernels(train: TrainConfig) -> None:
    """Set torch's switches as the config says; before the process touches a GPU."""
    torch.use_deterministic_algorithms(train.is_deterministic)
    if train.is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        # Nothing here reads memory that it has not written: no need to fill each new tensor, thousands of times a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not train.is_deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = _allows_tf32(train)


def wants_compile(train: TrainConfig, device: torch.device) -> bool:
    """Whether the model is compiled: as `train.compile` says; where it says nothing, for speed on GPUs."""
    return device.type == "cuda" and train.speed == "fast" if train.compile is None else train.compile


def describe_kernels(train: TrainConfig, device: torch.device) -> str:
    """What is on and off, for the log."""
    switches = {
        "deterministic": train.is_deterministic,
        "compile": wants_compile(train, device),
        "fused_attention": use_fused_attn(),
        "channels_last": True,
    }
    if device.type == "cuda":
        switches |= {
            "fused_optimizer": has_fused_kernel(train.optimizer),
            "cudnn_benchmark": not train.is_deterministic,
            "tf32": _allows_tf32(train),
        }
    return " ".join(f"{name}={'on' if on else 'off'}" for name, on in switches.items())


def _allows_tf32(train: TrainConfig) -> bool:
    return train.amp is not False or train.speed == "fast"
