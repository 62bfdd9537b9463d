"""The choice of kernels, reproducible or fast, that `train.speed` makes, and its description in the log."""

import os

import torch
from timm.layers import use_fused_attn

from doccls.config.schema import TrainConfig
from doccls.model.optim import has_fused_kernel


def choose_kernels(train: TrainConfig) -> None:
    """Set torch's global switches by the config; call it before the process uses a GPU."""
    torch.use_deterministic_algorithms(train.is_deterministic)
    if train.is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        # Nothing here reads uninitialized memory, so don't pay for filling new tensors, thousands of times per step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not train.is_deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = _allows_tf32(train)


def wants_compile(train: TrainConfig, device: torch.device) -> bool:
    """Return whether to compile the model: `train.compile`, or by default on GPUs if `train.speed` is fast."""
    return device.type == "cuda" and train.speed == "fast" if train.compile is None else train.compile


def describe_kernels(train: TrainConfig, device: torch.device) -> str:
    """Return which switches are on and off, for the log."""
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
