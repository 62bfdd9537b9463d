"""The files that a fold saves while it trains: `ckpt/best_fold{n}.pth` and `ckpt/last_fold{n}_{0,1}.safetensors`.

The first holds the weights of the best epoch, for `torch.load`, timm and `doccls predict`. The others hold all that a
fold needs to resume in mid-epoch, and nothing that can be derived: sample order, augmentation, dropout and the learning
rate are functions of the step, so no generator's state is stored. Reading them runs no code.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from doccls.config.schema import Config
from doccls.errors import UserError
from doccls.model.weights import UNREADABLE
from doccls.reporting.log import RunLog
from doccls.run.metrics_log import EpochMetrics
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import replacing
from doccls.system.disk import format_size
from doccls.system.tensor_file import (
    OtherVersionError,
    TensorFileError,
    digest_arrays,
    read_tensor_file,
    refuse_format,
    write_tensor_file,
)

_BEST_FORMAT = "doccls-best-4"
_RESUME_FORMAT = "doccls-resume-4"
_MOMENTS = 2  # per trained weight, with most optimizers; the actual number shows only at the first step
_DISK_MARGIN = 2
# The dtypes that NumPy lacks, and those as which their bytes are stored.
_STORED_DTYPES = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


# --- best weights ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestWeights:
    """The content of `ckpt/best_fold{n}.pth`."""

    state_dict: dict[str, torch.Tensor]  # on the CPU; stored under timm's key, for `timm.models.load_checkpoint`
    fingerprint: str
    fold: int
    epoch: int
    macro_f1: float
    weights: str  # `raw`, or `ema` (the exponential moving average)
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str  # in which the weights were validated: no (float32), fp16 or bf16
    config: Mapping[str, Any]  # resolved, so that prediction needs this file alone


def write_best(path: Path, best: BestWeights) -> None:
    """Write the weights atomically, with a digest. Other Python threads can run meanwhile.

    Raises:
        OSError: the disk is full, access is denied, ...; an earlier file is unchanged.
    """
    meta = {name: value for name, value in vars(best).items() if name != "state_dict"}
    text = json.dumps({"format": _BEST_FORMAT} | meta)
    content = {"state_dict": best.state_dict, "meta": text, "digest": _digest_weights(best.state_dict, text)}
    with replacing(path, _count_bytes(best.state_dict.values()) + len(text)) as file:
        sink = _Sink(file)
        try:
            torch.save(content, sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise sink.error or error from error


def read_best(path: Path) -> BestWeights:
    """Read and verify the weights; no code in the file is run.

    Raises:
        TensorFileError: the file is missing, truncated, damaged or not a doccls checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state_dict, text, digest = (content[name] for name in ("state_dict", "meta", "digest"))
        meta = json.loads(text)
        if not (isinstance(state_dict, dict) and isinstance(meta, dict)):
            raise TypeError("not mappings")
        refuse_format(path, meta.pop("format", None), _BEST_FORMAT)
        if digest != _digest_weights(state_dict, text):
            raise TensorFileError(f"checkpoint {path} is damaged: its content does not match its digest")
        for name in ("classes", "mean", "std"):
            meta[name] = tuple(meta[name])
        return BestWeights(state_dict=state_dict, **meta)
    except TensorFileError:
        raise
    except FileNotFoundError as error:
        raise TensorFileError(f"no checkpoint {path}") from error
    except UNREADABLE as error:
        raise TensorFileError(
            f"checkpoint {path} is truncated or not a doccls checkpoint ({type(error).__name__})"
        ) from error


def parse_config(best: BestWeights) -> Config:
    """Return the config with which the weights were trained."""
    return Config.model_validate(dict(best.config))


def _digest_weights(state_dict: Mapping[str, torch.Tensor], text: str) -> str:
    return digest_arrays({name: _to_array(tensor) for name, tensor in state_dict.items()}, text)


class _Sink:
    """The file to which torch.save writes; torch's error for a full disk names neither the file nor the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


# --- resume checkpoints ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestEpoch:
    """The validation result of the best epoch."""

    epoch: int  # 1-based
    macro_f1: float
    selection_f1: float  # the score by which epochs are compared: `doccls.oof.metrics.selection_f1`
    weights: str  # `raw`, or `ema` (the exponential moving average)
    indices_N: np.ndarray
    logits_NC: np.ndarray
    # None without damaged copies (valid.damage):
    macro_f1_damaged: float | None = None
    damaged_logits_NC: np.ndarray | None = None  # rows as in `logits_NC`


@dataclass(frozen=True)
class ResumeCheckpoint:
    """The content of `ckpt/last_fold{n}_{0,1}.safetensors`.

    `model` has the state dict of the trained module (`raw`) and of the EMA (`ema`), with the main process's buffers.
    `buffers_RB`, (ranks, n) float64, has each rank's own floating buffers (BatchNorm's, of both modules), concatenated.
    """

    fingerprint: str
    fold: int
    world_size: int
    precision: str
    saved_s: float  # since 1970
    step: int  # optimizer steps done, over all epochs
    losses: tuple[float, ...]  # of the epoch that `step` is in or has just ended
    skipped_steps: int  # of that epoch, in fp16
    rows: tuple[EpochMetrics, ...]  # of the validated epochs
    best: BestEpoch | None
    model: dict[str, dict[str, torch.Tensor]]
    buffers_RB: torch.Tensor
    optimizer: dict[str, Any]  # its `state_dict()`
    scaler: dict[str, Any]  # the `state_dict()` of fp16's gradient scaler; empty in other precisions


def write_resume(path: Path, checkpoint: ResumeCheckpoint) -> None:
    """Write the checkpoint atomically; its tensors must be on the CPU. Other Python threads can run meanwhile.

    Raises:
        OSError: the disk is full, access is denied, ...; an earlier file is unchanged.
        TypeError: the optimizer's state contains a value that can't be stored.
    """
    arrays: dict[str, np.ndarray] = {}
    fields = {name: value for name, value in vars(checkpoint).items() if name not in ("best", "rows")}
    best = checkpoint.best
    fields |= {"rows": [asdict(row) for row in checkpoint.rows], "best": None if best is None else dict(vars(best))}
    description = {name: _extract_arrays(value, name, arrays) for name, value in fields.items()}
    write_tensor_file(path, _RESUME_FORMAT, description, arrays)


def read_resume(path: Path) -> ResumeCheckpoint:
    """Read and verify a checkpoint.

    Raises:
        TensorFileError: the file is missing, truncated or of another format, or its content does not match its digest.
    """
    return read_tensor_file(path, _RESUME_FORMAT, _parse_resume)


def _parse_resume(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> ResumeCheckpoint:
    fields = {name: _insert_arrays(value, arrays) for name, value in description.items()}
    fields["losses"], fields["rows"] = tuple(fields["losses"]), tuple(EpochMetrics(**row) for row in fields["rows"])
    fields["best"] = None if fields["best"] is None else BestEpoch(**fields["best"])
    return ResumeCheckpoint(**fields)


_ARRAY, _TENSOR, _DTYPE, _KEYED = "array", "tensor", "dtype", "keyed"


def _extract_arrays(tree: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return `tree` as JSON values and move its tensors to `arrays`, by dotted name; keys keep their types."""
    if isinstance(tree, np.ndarray):
        arrays[name] = tree
        return {_ARRAY: name}
    if isinstance(tree, torch.Tensor):
        arrays[name] = _to_array(tree)
        return {_TENSOR: name, _DTYPE: str(tree.dtype).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        return {_KEYED: [[key, _extract_arrays(value, f"{name}.{key}", arrays)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_extract_arrays(value, f"{name}.{number}", arrays) for number, value in enumerate(tree)]
    if isinstance(tree, torch.dtype):
        return {_DTYPE: str(tree).removeprefix("torch.")}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{name} is a {type(tree).__name__}, which can't be stored")


def _insert_arrays(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(tree, list):
        return [_insert_arrays(value, arrays) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _KEYED in tree:
        return {key: _insert_arrays(value, arrays) for key, value in tree[_KEYED]}
    if _ARRAY in tree:
        return arrays[tree[_ARRAY]]
    dtype = getattr(torch, tree[_DTYPE])
    return torch.from_numpy(arrays[tree[_TENSOR]]).view(dtype) if _TENSOR in tree else dtype


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a view of the tensor's memory; a dtype that NumPy lacks (bfloat16) as integers of the same size."""
    try:
        array: np.ndarray = tensor.detach().numpy()
    except TypeError:
        if tensor.dtype not in _STORED_DTYPES:
            raise
        array = tensor.detach().view(_STORED_DTYPES[tensor.dtype]).numpy()
    return array


# --- where a fold resumes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint from which a fold can resume.

    `keeps_best` says whether the best weights on disk belong to the checkpoint's best epoch. If those of a later epoch
    have replaced them, epochs are compared afresh from here on, so that logits and weights always belong to the same
    epoch. The later epoch, which was at least as good as any before it, is then trained again.
    """

    path: Path
    step: int  # optimizer steps done
    saved_s: float  # since 1970
    keeps_best: bool = True


def find_resume_point(
    paths: RunPaths, fingerprint: str, fold: int, world_size: int, allow_change: bool, log: RunLog
) -> ResumePoint | None:
    """Return the fold's newest valid checkpoint; others are skipped with a warning. Only the main process may call.

    A checkpoint holds the best epoch's logits but not its weights, which have a file of their own. That file must be
    valid too.

    Raises:
        UserError: another number of processes saved it, and `allow_change` is false.
        UserError: another version of doccls saved it, whose work must not be overwritten.
    """
    points: list[ResumePoint] = []
    world_sizes: dict[Path, int] = {}
    for path in filter(Path.exists, paths.resume_checkpoints(fold)):
        try:
            checkpoint = read_resume(path)
        except OtherVersionError as error:
            raise _refuse_other_version(error) from error
        except TensorFileError as error:
            log.line(f"[WARNING] {error}; checkpoint skipped")
            continue
        if (checkpoint.fingerprint, checkpoint.fold) != (fingerprint, fold):
            log.line(f"[WARNING] {path} belongs to another experiment or fold; checkpoint skipped")
            continue
        try:
            keeps_best = _compare_best(paths.best_checkpoint(fold), checkpoint)
        except OtherVersionError as error:
            raise _refuse_other_version(error) from error
        except TensorFileError as error:
            log.line(f"[WARNING] {path} skipped, because its best weights can't be used: {error}")
            continue
        world_sizes[path] = checkpoint.world_size
        points.append(ResumePoint(path, checkpoint.step, checkpoint.saved_s, keeps_best))
    if not points:
        return None
    newest = max(points, key=lambda point: point.step)
    if (saved_by := world_sizes[newest.path]) != world_size and not allow_change:
        raise UserError(
            f"fold {fold} was saved at step {newest.step} by {saved_by} processes, but {world_size} are running now. "
            f"Start {saved_by} processes; or pass --allow-world-size-change to resume with the same batches, but not "
            f"bit for bit; or delete {newest.path.parent}/last_fold{fold}_* to train the fold from the beginning"
        )
    return newest


def _refuse_other_version(error: OtherVersionError) -> UserError:
    return UserError(f"{error}. Continue the run with that version, or choose another --run-id")


def _compare_best(path: Path, checkpoint: ResumeCheckpoint) -> bool:
    """Return whether the best weights belong to the checkpoint's best epoch, not to a later one.

    Raises:
        TensorFileError: they are missing or damaged, or belong to an earlier epoch, another fold or another experiment.
    """
    if checkpoint.best is None:
        return True
    best = read_best(path)
    if (best.fingerprint, best.fold) != (checkpoint.fingerprint, checkpoint.fold) or best.epoch < checkpoint.best.epoch:
        raise TensorFileError(f"{path} belongs to another experiment, fold or epoch")
    return best.epoch == checkpoint.best.epoch


# --- how much disk a fold needs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiskNeed:
    """The disk space, in bytes, that a fold's files take while it trains."""

    best: int  # the best weights
    resume: int  # the two resume checkpoints, which are removed when the fold is done


def estimate_disk(weights: Iterable[torch.Tensor], trained: Iterable[torch.Tensor], with_ema: bool) -> DiskNeed:
    """Estimate the space for a model with these `weights` (of its state dict), of which `trained` are optimized."""
    best = _count_bytes(weights)
    return DiskNeed(best, 2 * ((2 if with_ema else 1) * best + _MOMENTS * _count_bytes(trained)))


def describe_disk(need: DiskNeed, free_bytes: int, fold: int, folder: Path) -> list[str]:
    """Return log lines about the space; among them a warning if less is free than twice what will be written."""
    needed = need.best + need.resume
    lines = [
        f"[DISK] fold={fold} writes about {format_size(needed)} (best weights {format_size(need.best)}, two resume "
        f"checkpoints {format_size(need.resume)}); {format_size(free_bytes)} are free"
    ]
    if free_bytes < _DISK_MARGIN * needed:
        lines.append(
            f"[WARNING] {folder}: {format_size(free_bytes)} are free, less than twice the {format_size(needed)} that "
            f"fold {fold} writes. If the disk fills up, resume checkpoints are skipped; failing to save the best "
            "weights ends the fold: free some space, or set output.exp_dir to another disk"
        )
    return lines


def _count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
