"""`ckpt/last_fold{n}_{0,1}.safetensors`: all that a fold needs to go on in mid-epoch, and nothing that is derived.

Order, augmentation, dropout and the learning rate are functions of the step, so no generator's state is kept.
Tensors lie in safetensors, everything else in its metadata as JSON: nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from doccls.errors import UserError
from doccls.run.artifacts import replacing
from doccls.run.history import EpochMetrics

_FORMAT = "doccls-last-1"


class StateError(UserError):
    """A saved state is torn, foreign or not what it says; the message names the file and the reason."""


@dataclass(frozen=True)
class BestSoFar:
    """The best epoch's validation."""

    epoch: int
    """1-based."""
    macro_f1: float
    indices_N: np.ndarray
    logits_NC: np.ndarray


@dataclass(frozen=True)
class Progress:
    """How far a fold is."""

    step: int = 0
    """Optimizer steps done, over all epochs."""
    losses: tuple[float, ...] = ()
    """Of the steps of the epoch that `step` lies in, or has just ended."""
    skipped_steps: int = 0
    """Of that epoch, in fp16."""
    best: BestSoFar | None = None
    rows: tuple[EpochMetrics, ...] = ()
    """Of the epochs that are validated."""


@dataclass(frozen=True)
class SavedState:
    """What the file holds."""

    identity: str
    fold: int
    world_size: int
    precision: str
    saved_s: float
    """Seconds since 1970."""
    progress: Progress
    model: dict[str, torch.Tensor]
    """The state dict of the bare model, and of the EMA's under `ema.`; buffers as the main process has them."""
    buffers_RB: torch.Tensor
    """Each rank's own floating buffers (BatchNorm's, of model and EMA), one after the other: (ranks, n) float64."""
    optimizer: dict[str, Any]
    """`state_dict()` of the optimizer."""
    scaler: dict[str, Any]
    """`state_dict()` of fp16's gradient scaler; empty in other precisions."""


def write_state(path: Path, state: SavedState) -> None:
    """Write the state, whole, with its digest. The tensors must be on the CPU.

    Raises:
        OSError: no room, no right, ...; what stood there before still does.
    """
    tensors = {f"model.{name}": tensor for name, tensor in state.model.items()} | {"buffers": state.buffers_RB}
    best = state.progress.best
    if best is not None:
        tensors |= {"best.indices": torch.from_numpy(best.indices_N), "best.logits": torch.from_numpy(best.logits_NC)}
    words = {
        "format": _FORMAT, "identity": state.identity, "fold": state.fold, "world_size": state.world_size,
        "precision": state.precision, "saved_s": state.saved_s,
        "progress": asdict(replace(state.progress, best=None)),
        "best": None if best is None else {"epoch": best.epoch, "macro_f1": best.macro_f1},
        "optimizer": _take_out(state.optimizer, "optimizer", tensors), "scaler": state.scaler,
    }  # fmt: skip
    text = json.dumps(words)
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.write(save(packed, {"doccls": json.dumps({"words": text, "digest": _digest(packed, text)})}))


def read_state(path: Path) -> SavedState:
    """Read and verify a state.

    Raises:
        StateError: missing, torn, of another format, or its content does not match its digest.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stated = json.loads((file.metadata() or {}).get("doccls", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        words = json.loads(stated["words"])
        if words["format"] != _FORMAT:
            raise StateError(f"{path}: another format than {_FORMAT}")
        if stated["digest"] != _digest(tensors, stated["words"]):
            raise StateError(f"{path}: its content does not match its digest: the file is damaged")
        return _parse(words, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path}: can't be read ({type(error).__name__}: {error})") from error


def _parse(words: dict[str, Any], tensors: dict[str, torch.Tensor]) -> SavedState:
    told, best = words["progress"], words["best"]
    progress = Progress(
        step=told["step"],
        losses=tuple(told["losses"]),
        skipped_steps=told["skipped_steps"],
        best=None if best is None
        else BestSoFar(**best, indices_N=tensors["best.indices"].numpy(), logits_NC=tensors["best.logits"].numpy()),
        rows=tuple(EpochMetrics(**row) for row in told["rows"]),
    )  # fmt: skip
    return SavedState(
        identity=words["identity"],
        fold=words["fold"],
        world_size=words["world_size"],
        precision=words["precision"],
        saved_s=words["saved_s"],
        progress=progress,
        model={name.removeprefix("model."): one for name, one in tensors.items() if name.startswith("model.")},
        buffers_RB=tensors["buffers"],
        optimizer=_put_back(words["optimizer"], tensors),
        scaler=words["scaler"],
    )


_TENSOR, _DTYPE, _KEYED = "tensor", "dtype", "keyed"


def _take_out(tree: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`tree` as JSON values: its tensors go to `tensors`, by their place; keys that are numbers stay numbers."""
    if isinstance(tree, torch.Tensor):
        tensors[place] = tree
        return {_TENSOR: place}
    if isinstance(tree, Mapping):
        return {_KEYED: [[key, _take_out(value, f"{place}.{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_take_out(value, f"{place}.{number}", tensors) for number, value in enumerate(tree)]
    if isinstance(tree, torch.dtype):
        return {_DTYPE: str(tree).removeprefix("torch.")}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{place} is a {type(tree).__name__}, which can't be saved")


def _put_back(told: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(told, list):
        return [_put_back(value, tensors) for value in told]
    if isinstance(told, dict):
        if _TENSOR in told:
            return tensors[told[_TENSOR]]
        if _DTYPE in told:
            return getattr(torch, told[_DTYPE])
        return {key: _put_back(value, tensors) for key, value in told[_KEYED]}
    return told


def _digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
