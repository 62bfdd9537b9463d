"""A fold's best weights, with the logits they gave, in one file that is whole and says what it belongs to."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from doccls.config.schema import Config
from doccls.errors import UserError
from doccls.model.weights import UNREADABLE
from doccls.run.artifacts import replacing

_FORMAT = "doccls-best-2"


class CheckpointError(UserError):
    """A checkpoint is missing, torn or foreign; the message names the file and the reason."""


@dataclass(frozen=True)
class BestCheckpoint:
    """What `ckpt/best_fold{n}.pth` holds."""

    state_dict: dict[str, torch.Tensor]
    """Weights, on the CPU; the key is timm's, so that `timm.models.load_checkpoint` reads the file."""
    oof: dict[str, torch.Tensor]
    """`indices` (n,) int64, `logits` (n, classes) float32: this very epoch's validation logits."""
    identity: str
    fold: int
    epoch: int
    macro_f1: float
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    """In which it was validated: no (float32), fp16 or bf16."""
    config: Mapping[str, Any]
    """The resolved config, so that predicting needs this file alone."""


def write_best(path: Path, best: BestCheckpoint) -> None:
    """Write the checkpoint, whole, with the digest of its tensors and words. The main process calls.

    Raises:
        OSError: no room, no right, ...; what stood there before still does.
    """
    meta = {
        "format": _FORMAT, "identity": best.identity, "fold": best.fold, "epoch": best.epoch,
        "macro_f1": best.macro_f1, "classes": best.classes, "mean": best.mean, "std": best.std,
        "precision": best.precision, "config": best.config,
    }  # fmt: skip
    text = json.dumps(meta)
    digest = _digest(best.state_dict, best.oof, text)
    content = io.BytesIO()  # torch's own words for a disk that is full name neither the file nor the reason
    torch.save({"state_dict": best.state_dict, "oof": best.oof, "meta": text, "digest": digest}, content)
    with replacing(path) as file:
        file.write(content.getbuffer())


def read_best(path: Path) -> BestCheckpoint:
    """Read and verify a checkpoint; nothing in it is run.

    Raises:
        CheckpointError: no such file, torn, or not one of doccls.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state_dict, oof, text, digest = (content[name] for name in ("state_dict", "oof", "meta", "digest"))
        meta = json.loads(text)
        if not all(isinstance(value, dict) for value in (state_dict, oof, meta)):
            raise TypeError("not mappings")
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}") from error
    except UNREADABLE as error:
        raise CheckpointError(f"checkpoint {path}: torn, or not one of doccls ({type(error).__name__})") from error
    if meta.pop("format", None) != _FORMAT:
        raise CheckpointError(f"checkpoint {path}: another format than {_FORMAT}")
    if digest != _digest(state_dict, oof, text):
        raise CheckpointError(f"checkpoint {path}: its content does not match its digest: the file is damaged")
    for name in ("classes", "mean", "std"):
        meta[name] = tuple(meta[name])
    return BestCheckpoint(state_dict=state_dict, oof=oof, **meta)


def parse_config(best: BestCheckpoint) -> Config:
    """The config that the checkpoint was trained with."""
    return Config.model_validate(dict(best.config))


def _digest(state_dict: Mapping[str, torch.Tensor], oof: Mapping[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in [*sorted(state_dict.items()), *sorted(oof.items())]:
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
