"""One fold's out-of-fold part: a safetensors file that says by itself what it belongs to."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from doccls.errors import UserError
from doccls.run.artifacts import remove_leftovers, replacing
from doccls.run.paths import RunError, RunPaths

_FORMAT = "doccls-oof-part-2"


class PartError(UserError):
    """A part is torn, foreign or not what it says; the message names the file and the reason."""


@dataclass(frozen=True)
class PartInfo:
    """What a part says of itself."""

    identity: str
    """The run's identity; parts of different identities don't merge."""
    fold: int
    num_folds: int
    num_samples: int
    """Rows of train.csv, over all folds."""
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    """ID of each row of the part, as written in train.csv."""
    skipped: tuple[int, ...]
    """Indices of rows of this fold without a usable image: their logits are NaN."""
    best_epoch: int
    macro_f1: float
    precision: str = "no"
    """In which the logits were computed: no (float32), fp16 or bf16."""
    micro_batch_size: int | None = None
    """Most images that a process took at a time; None is its whole share of the batch."""


@dataclass(frozen=True)
class OofPart:
    """The validation logits of one fold's best epoch, keyed by sample index."""

    info: PartInfo
    indices_N: np.ndarray
    """(n,) int64, ascending: rows of train.csv."""
    logits_NC: np.ndarray
    """(n, classes) float32."""
    targets_N: np.ndarray
    """(n,) int64."""


def write_part(path: Path, part: OofPart) -> None:
    """Write the part, whole; the same part gives the same bytes."""
    _validate(part, "a part about to be written")
    arrays = {"indices": part.indices_N, "logits": part.logits_NC, "targets": part.targets_N}
    # One key: safetensors writes several in an order that differs from run to run.
    metadata = {"doccls": json.dumps({"format": _FORMAT, "digest": _digest(part), "info": asdict(part.info)})}
    with replacing(path) as file:
        file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def read_part(path: Path) -> OofPart:
    """Read and verify a part.

    Raises:
        PartError: missing, torn, of another format, or its content does not match its digest or its own words.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {}).get("doccls", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise PartError(f"OOF part {path}: can't be read: {error}") from error
    if metadata.get("format") != _FORMAT or arrays.keys() != {"indices", "logits", "targets"}:
        raise PartError(f"OOF part {path}: not a doccls OOF part")
    try:
        part = OofPart(_parse_info(metadata["info"]), arrays["indices"], arrays["logits"], arrays["targets"])
    except (KeyError, TypeError, ValueError) as error:
        raise PartError(f"OOF part {path}: its description is damaged: {error}") from error
    if metadata.get("digest") != _digest(part):
        raise PartError(f"OOF part {path}: its content does not match its digest: the file is damaged")
    _validate(part, str(path))
    return part


def find_finished_folds(paths: RunPaths, identity: str | None, num_folds: int) -> list[int]:
    """Folds whose part is there, valid and of this identity: a fold is done by its result, nobody's word.

    Raises:
        RunError: a part belongs to another identity (None takes any): the run id was used for something else.
    """
    finished = []
    for fold in range(num_folds):
        path = paths.part(fold)
        if not path.exists():
            continue
        try:
            info = read_part(path).info
        except PartError:
            continue  # damaged: the fold is trained again and its part replaced
        if identity is not None and info.identity != identity:
            raise RunError(
                f"run {paths.run_id} in {paths.root} was made with another config, data, folds or weights "
                f"(identity {info.identity[:12]}, now {identity[:12]}): take another --run-id"
            )
        if info.fold == fold:
            finished.append(fold)
    return finished


def find_damage(path: Path) -> str | None:
    """What is wrong with a part that is there; None of a valid one, or where there is none."""
    if not path.exists():
        return None
    try:
        read_part(path)
    except PartError as error:
        return str(error)
    return None


def remove_states(paths: RunPaths, folds: Iterable[int]) -> None:
    """Of folds whose part stands: nothing goes on from their states, nor from what a kill left half-written of them."""
    for fold in folds:
        for path in paths.last_states(fold):
            remove_leftovers(path)
            path.unlink(missing_ok=True)


def is_merged(paths: RunPaths) -> bool:
    """Whether the merged files are there, and of the parts as they are."""
    try:
        merged_ns = paths.summary.stat().st_mtime_ns  # written last
        return all(part.stat().st_mtime_ns <= merged_ns for part in paths.parts_dir.glob("fold*.safetensors"))
    except FileNotFoundError:
        return False


def _parse_info(fields: dict[str, Any]) -> PartInfo:
    for name in ("classes", "ids", "skipped"):
        fields[name] = tuple(fields[name])
    return PartInfo(**fields)


def _digest(part: OofPart) -> str:
    digest = hashlib.sha256(json.dumps(asdict(part.info)).encode())
    for array in (part.indices_N, part.logits_NC, part.targets_N):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _validate(part: OofPart, where: str) -> None:
    info, rows = part.info, len(part.indices_N)
    kinds = [array.dtype.name for array in (part.indices_N, part.logits_NC, part.targets_N)]
    if kinds != ["int64", "float32", "int64"] or part.logits_NC.shape != (rows, len(info.classes)):
        raise PartError(f"OOF part {where}: arrays of the wrong kind or shape")
    if len(part.targets_N) != rows or len(info.ids) != rows:
        raise PartError(f"OOF part {where}: indices, targets and IDs differ in number")
    if rows and (
        np.any(np.diff(part.indices_N) <= 0) or part.indices_N[0] < 0 or part.indices_N[-1] >= info.num_samples
    ):
        raise PartError(f"OOF part {where}: indices are not ascending within 0 to {info.num_samples - 1}")
    if not 0 <= info.fold < info.num_folds:
        raise PartError(f"OOF part {where}: fold {info.fold} of {info.num_folds} folds")
    if np.any((part.targets_N < 0) | (part.targets_N >= len(info.classes))):
        raise PartError(f"OOF part {where}: targets outside the {len(info.classes)} classes")
    bad = set(part.indices_N[~np.isfinite(part.logits_NC).all(axis=1)].tolist()) - set(info.skipped)
    if bad:
        raise PartError(f"OOF part {where}: {len(bad)} rows have non-finite logits, such as row {min(bad)}")
