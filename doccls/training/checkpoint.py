"""The two files that a fold saves while it trains: `ckpt/best_fold{n}.pth` and `ckpt/last_fold{n}_{0,1}.safetensors`.

The first holds the weights of the best epoch, for `torch.load`, timm and `doccls predict`. The second holds all that a
fold needs to resume in mid-epoch, and nothing that is derived: order, augmentation, dropout and the learning rate are
functions of the step, so no generator's state is kept. Nothing in either is unpickled.
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
    TensorFileError,
    digest_arrays,
    read_tensor_file,
    refuse_format,
    write_tensor_file,
)

_BEST_FORMAT = "doccls-best-4"
_RESUME_FORMAT = "doccls-resume-3"
_MOMENTS = 2
"""Of each trained weight, with most optimizers; how many there are shows at the first step."""
_DISK_MARGIN = 2
_WITHOUT_NUMPY = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
"""Types that NumPy lacks, and what their bytes are kept as."""


# --- best weights ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestWeights:
    """What `ckpt/best_fold{n}.pth` holds."""

    state_dict: dict[str, torch.Tensor]
    """On the CPU; the key is timm's, so that `timm.models.load_checkpoint` reads the file."""
    fingerprint: str
    fold: int
    epoch: int
    macro_f1: float
    weights: str
    """`raw`, or `ema`: the exponential moving average."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    """In which it was validated: no (float32), fp16 or bf16."""
    config: Mapping[str, Any]
    """The resolved config, so that predicting needs this file alone."""


def write_best(path: Path, best: BestWeights) -> None:
    """Write the weights, whole, with a digest. Other Python threads can run meanwhile.

    Raises:
        OSError: no room, no right, ...; an earlier file is as it was.
    """
    meta = {name: value for name, value in vars(best).items() if name != "state_dict"}
    text = json.dumps({"format": _BEST_FORMAT} | meta)
    content = {"state_dict": best.state_dict, "meta": text, "digest": _digest_weights(best.state_dict, text)}
    with replacing(path) as file:
        sink = _Sink(file)
        try:
            torch.save(content, sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise sink.error or error from error


def read_best(path: Path) -> BestWeights:
    """Read and verify the weights; nothing in the file is run.

    Raises:
        TensorFileError: no such file, torn, or not one of doccls.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state_dict, text, digest = (content[name] for name in ("state_dict", "meta", "digest"))
        meta = json.loads(text)
        if not (isinstance(state_dict, dict) and isinstance(meta, dict)):
            raise TypeError("not mappings")
        refuse_format(path, meta.pop("format", None), _BEST_FORMAT)
        if digest != _digest_weights(state_dict, text):
            raise TensorFileError(f"checkpoint {path}: its content does not match its digest: the file is damaged")
        for name in ("classes", "mean", "std"):
            meta[name] = tuple(meta[name])
        return BestWeights(state_dict=state_dict, **meta)
    except TensorFileError:
        raise
    except FileNotFoundError as error:
        raise TensorFileError(f"no checkpoint {path}") from error
    except UNREADABLE as error:
        raise TensorFileError(f"checkpoint {path}: torn, or not one of doccls ({type(error).__name__})") from error


def parse_config(best: BestWeights) -> Config:
    """The config that the weights were trained with."""
    return Config.model_validate(dict(best.config))


def _digest_weights(state_dict: Mapping[str, torch.Tensor], text: str) -> str:
    return digest_arrays({name: _to_array(tensor) for name, tensor in state_dict.items()}, text)


class _Sink:
    """The file that torch.save writes to; torch's words for a full disk name neither the file nor the reason."""

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
    """The best epoch's validation."""

    epoch: int
    """1-based."""
    macro_f1: float
    selection_f1: float
    """What epochs are compared by: `doccls.oof.metrics.selection_f1`."""
    weights: str
    """`raw`, or `ema`: the exponential moving average."""
    indices_N: np.ndarray
    logits_NC: np.ndarray


@dataclass(frozen=True)
class ResumeCheckpoint:
    """What `ckpt/last_fold{n}_{0,1}.safetensors` holds."""

    fingerprint: str
    fold: int
    world_size: int
    precision: str
    saved_s: float
    """Seconds since 1970."""
    step: int
    """Optimizer steps done, over all epochs."""
    losses: tuple[float, ...]
    """Of the steps of the epoch that `step` lies in, or has just ended."""
    skipped_steps: int
    """Of that epoch, in fp16."""
    rows: tuple[EpochMetrics, ...]
    """Of the epochs that are validated."""
    best: BestEpoch | None
    model: dict[str, dict[str, torch.Tensor]]
    """The state dicts of the trained module, `raw`, and of the EMA's, `ema`; buffers as the main process has them."""
    buffers_RB: torch.Tensor
    """Each rank's own floating buffers (BatchNorm's, of both modules), one after the other: (ranks, n) float64."""
    optimizer: dict[str, Any]
    """`state_dict()` of the optimizer."""
    scaler: dict[str, Any]
    """`state_dict()` of fp16's gradient scaler; empty in other precisions."""


def write_resume(path: Path, checkpoint: ResumeCheckpoint) -> None:
    """Write the checkpoint, whole. Its tensors must be on the CPU. Other Python threads can run meanwhile.

    Raises:
        OSError: no room, no right, ...; an earlier file is as it was.
        TypeError: the optimizer keeps what no file can hold.
    """
    arrays: dict[str, np.ndarray] = {}
    fields = {name: value for name, value in vars(checkpoint).items() if name not in ("best", "rows")}
    best = checkpoint.best
    fields |= {"rows": [asdict(row) for row in checkpoint.rows], "best": None if best is None else dict(vars(best))}
    description = {name: _take_out(value, name, arrays) for name, value in fields.items()}
    write_tensor_file(path, _RESUME_FORMAT, description, arrays)


def read_resume(path: Path) -> ResumeCheckpoint:
    """Read and verify a checkpoint.

    Raises:
        TensorFileError: missing, torn, of another format, or its content does not match its digest.
    """
    return read_tensor_file(path, _RESUME_FORMAT, _parse_resume)


def _parse_resume(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> ResumeCheckpoint:
    fields = {name: _put_back(value, arrays) for name, value in description.items()}
    fields["losses"], fields["rows"] = tuple(fields["losses"]), tuple(EpochMetrics(**row) for row in fields["rows"])
    fields["best"] = None if fields["best"] is None else BestEpoch(**fields["best"])
    return ResumeCheckpoint(**fields)


_ARRAY, _TENSOR, _DTYPE, _KEYED = "array", "tensor", "dtype", "keyed"


def _take_out(tree: Any, place: str, arrays: dict[str, np.ndarray]) -> Any:
    """`tree` as JSON values: its tensors go to `arrays`, by their place; keys that are numbers stay numbers."""
    if isinstance(tree, np.ndarray):
        arrays[place] = tree
        return {_ARRAY: place}
    if isinstance(tree, torch.Tensor):
        arrays[place] = _to_array(tree)
        return {_TENSOR: place, _DTYPE: str(tree.dtype).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        return {_KEYED: [[key, _take_out(value, f"{place}.{key}", arrays)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_take_out(value, f"{place}.{number}", arrays) for number, value in enumerate(tree)]
    if isinstance(tree, torch.dtype):
        return {_DTYPE: str(tree).removeprefix("torch.")}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{place} is a {type(tree).__name__}, which can't be saved")


def _put_back(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(tree, list):
        return [_put_back(value, arrays) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _KEYED in tree:
        return {key: _put_back(value, arrays) for key, value in tree[_KEYED]}
    if _ARRAY in tree:
        return arrays[tree[_ARRAY]]
    dtype = getattr(torch, tree[_DTYPE])
    return torch.from_numpy(arrays[tree[_TENSOR]]).view(dtype) if _TENSOR in tree else dtype


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory; of a type that NumPy lacks (bfloat16), as integers of the same size."""
    try:
        array: np.ndarray = tensor.detach().numpy()
    except TypeError:
        if tensor.dtype not in _WITHOUT_NUMPY:
            raise
        array = tensor.detach().view(_WITHOUT_NUMPY[tensor.dtype]).numpy()
    return array


# --- where a fold resumes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumePoint:
    """Where a fold resumes."""

    path: Path
    step: int
    """Optimizer steps done."""
    saved_s: float
    """Seconds since 1970."""
    keeps_best: bool = True
    """Whether the best weights on disk are those of its best epoch. Those of a later epoch have replaced them: epochs
    from here on are then compared anew, so that logits and weights are always of one epoch. The later epoch, which was
    at least as good as any before, comes again."""


def find_resume_point(
    paths: RunPaths, fingerprint: str, fold: int, world_size: int, allow_change: bool, log: RunLog
) -> ResumePoint | None:
    """The newest complete checkpoint of the fold; what can't be used is logged and passed over.

    The main process calls. A checkpoint holds the best epoch's logits, and not its weights: these have a file of their
    own, which must be complete too.

    Raises:
        UserError: another number of processes saved it, and `allow_change` is false.
    """
    found: list[ResumePoint] = []
    world_sizes: dict[Path, int] = {}
    for path in filter(Path.exists, paths.resume_checkpoints(fold)):
        try:
            checkpoint = read_resume(path)
        except TensorFileError as error:
            log.line(f"[WARNING] {error}: passed over")
            continue
        if (checkpoint.fingerprint, checkpoint.fold) != (fingerprint, fold):
            log.line(f"[WARNING] {path}: of another experiment or fold: passed over")
            continue
        try:
            keeps_best = _compare_best(paths.best_checkpoint(fold), checkpoint)
        except TensorFileError as error:
            log.line(f"[WARNING] {path}: passed over, since its best weights are not there: {error}")
            continue
        world_sizes[path] = checkpoint.world_size
        found.append(ResumePoint(path, checkpoint.step, checkpoint.saved_s, keeps_best))
    if not found:
        return None
    newest = max(found, key=lambda point: point.step)
    if (saved_by := world_sizes[newest.path]) != world_size and not allow_change:
        raise UserError(
            f"fold {fold} was saved at step {newest.step} by {saved_by} processes, and these are {world_size}. "
            f"Start {saved_by}; or say --allow-world-size-change: the same batches follow, but not the same bits; "
            f"or delete {newest.path.parent}/last_fold{fold}_*, and the fold begins again"
        )
    return newest


def _compare_best(path: Path, checkpoint: ResumeCheckpoint) -> bool:
    """Whether the best weights are those of the checkpoint's best epoch, not of a later one.

    Raises:
        TensorFileError: they are missing, damaged, of an earlier epoch or of something else.
    """
    if checkpoint.best is None:
        return True
    best = read_best(path)
    if (best.fingerprint, best.fold) != (checkpoint.fingerprint, checkpoint.fold) or best.epoch < checkpoint.best.epoch:
        raise TensorFileError(f"{path}: of another experiment, fold or epoch")
    return best.epoch == checkpoint.best.epoch


# --- how much disk a fold needs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiskNeed:
    """What a fold's files take, in bytes, while it trains."""

    best: int
    """Its best weights."""
    resume: int
    """Its two resume checkpoints; gone when it is done."""


def estimate_disk(weights: Iterable[torch.Tensor], trained: Iterable[torch.Tensor], with_ema: bool) -> DiskNeed:
    """Of a model with these `weights` (its state dict's), of which the optimizer has the `trained` ones."""
    best = _count_bytes(weights)
    return DiskNeed(best, 2 * ((2 if with_ema else 1) * best + _MOMENTS * _count_bytes(trained)))


def describe_disk(need: DiskNeed, free_bytes: int, fold: int, folder: Path) -> list[str]:
    """What the log says of it; a warning if less is free than twice what will be written."""
    needed = need.best + need.resume
    lines = [
        f"[DISK] fold={fold} writes about {format_size(needed)} (best weights {format_size(need.best)}, two resume "
        f"checkpoints {format_size(need.resume)}); {format_size(free_bytes)} are free"
    ]
    if free_bytes < _DISK_MARGIN * needed:
        lines.append(
            f"[WARNING] {folder}: {format_size(free_bytes)} are free, less than twice the {format_size(needed)} that "
            f"fold {fold} writes. If the disk fills up, resume checkpoints are skipped; failing to save the best "
            "weights ends the fold: make room, or set output.exp_dir to another disk"
        )
    return lines


def _count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
