"""Initial weights from a file: reading it without running code, finding the model's tensors, and loading them."""

import argparse
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import nn

from doccls.errors import RankLocalError, UserError

StateDict = dict[str, torch.Tensor]

# The exceptions that reading a damaged or foreign tensor file can raise: torch.load(weights_only=True) and safetensors
# check little before they index, slice and unpack.
UNREADABLE = (
    OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, struct.error,
    zipfile.BadZipFile, pickle.UnpicklingError, SafetensorError, RecursionError,
)  # fmt: skip

# The entries of a training checkpoint in the order in which timm's own loader prefers them.
_TIMM_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
_WEB_PAGE = "it is a web page, such as the error page of a failed download"
_FOREIGN_STARTS = {
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"<?xml": _WEB_PAGE,
    b"version https://git-lfs": "it is a Git LFS pointer: fetch the file itself with `git lfs pull`",
}
_MAX_SHOWN = 3
_MAX_DEPTH = 8  # of nested mappings; torch can store one that contains itself


@dataclass(frozen=True)
class _Fit:
    """How tensors fit a model: those to load, and the names of those that don't fit."""

    tensors: StateDict
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]  # with both types
    surplus: tuple[str, ...]  # of further blocks than the model has
    non_finite: tuple[str, ...]
    expected: int  # tensors of the model

    @property
    def num_problems(self) -> int:
        return len(self.missing) + len(self.misshapen) + len(self.surplus) + len(self.non_finite)

    def describe(self) -> str:
        """Return what does not fit."""
        kinds = ((self.missing, "are missing"), (self.misshapen, "have another shape or type"))
        if self.non_finite:
            shown = ", ".join(self.non_finite[:_MAX_SHOWN])
            return f"is damaged: {len(self.non_finite)} tensors hold NaN or infinity, such as {shown}"
        if self.surplus and not self.missing and not self.misshapen:
            shown = ", ".join(self.surplus[:_MAX_SHOWN])
            return f"is of a larger model: {len(self.surplus)} tensors have no place in this one, such as {shown}"
        found = [f"{len(names)} {what}, such as {', '.join(names[:_MAX_SHOWN])}" for names, what in kinds if names]
        return f"does not fit the model: of its {self.expected} tensors, {'; '.join(found)}"


def load_file(model: nn.Module, path: Path, name: str, new_keys: set[str], source: str) -> None:
    """Load the model's tensors, except the classifier's and `new_keys`, from a .safetensors or .pth file.

    The tensors are looked for where timm's loader looks for them, then under any prefix or entry of the file, which
    other trainers add. No code in the file is run.

    Args:
        name: the model's name, for messages.
        source: the config key and its value, for messages.

    Raises:
        RankLocalError: the file is missing or unreadable.
        UserError: the tensors do not fit the model, or several sets of tensors in the file do.
    """
    content = _read_content(path, source)
    refusal: Exception | None = None
    fits: dict[str, _Fit] = {}  # by prefix
    min_count = max(2, len(list(model.parameters())) // 2)  # half, since timm's conversion may split tensors
    plain = ("", timm.models.clean_state_dict(_find_timm_entry(content)))
    for prefix, tensors in chain([plain], _list_prefixed(content, min_count)):
        if any(fit.num_problems == 0 and prefix.startswith(shorter) for shorter, fit in fits.items()):
            continue  # the tensors are found; timm's conversion has removed the rest of this prefix
        try:
            fits[prefix] = _compare(model, _convert(tensors, model), new_keys)
        except (KeyError, RuntimeError, AttributeError, TypeError, ValueError, IndexError) as error:
            refusal = refusal or error
    complete = [prefix for prefix, fit in fits.items() if fit.num_problems == 0]
    if len(complete) > 1:
        raise UserError(
            f"{source}: several sets of tensors in it fit the model, under the names {', '.join(complete)}: write the "
            "one to use to a file of its own"
        )
    if not fits:
        raise UserError(f"{source}: these are not weights of {name}: {refusal}") from refusal
    prefix, fit = min(fits.items(), key=lambda item: item[1].num_problems)
    if fit.num_problems:
        if refusal is not None and prefix:  # timm's own conversion says more than a poor match under a prefix
            raise UserError(f"{source}: these are not weights of {name}: {refusal}") from refusal
        raise UserError(f"{source}{f' (tensors under {prefix})' if prefix else ''} {fit.describe()}")
    model.load_state_dict(fit.tensors, strict=False)


def load_state(model: nn.Module, state_dict: StateDict, source: str, new_keys: set[str]) -> None:
    """Load all tensors except `new_keys` and the classifier, whose classes differ; all others must fit.

    Raises:
        UserError: tensors are missing or have another shape or type; the message names some of each.
    """
    fit = _compare(model, state_dict, new_keys)
    if fit.num_problems:
        raise UserError(f"{source} {fit.describe()}")
    model.load_state_dict(fit.tensors, strict=False)


def _compare(model: nn.Module, state_dict: StateDict, new_keys: set[str]) -> _Fit:
    """Compare tensors with those of the model, except `new_keys` and the classifier."""
    expected = model.state_dict()
    classifier = tuple(f"{name}." for name in _list_classifiers(model))
    # timm renames the last norm when it pools tokens: the weights are the same.
    norms = {f"fc_{key}": value for key, value in state_dict.items() if key.startswith("norm.")}
    renamed = {key: value for key, value in norms.items() if key in new_keys}
    skipped = {key for key in expected if key.startswith(classifier)} | (new_keys - renamed.keys())
    stored = {key: value for key, value in {**state_dict, **renamed}.items() if key in expected and key not in skipped}
    fitting = {key: value for key, value in stored.items() if _is_fitting(value, expected[key])}
    required = expected.keys() - _list_recomputed(model) - skipped
    misshapen = (
        f"{key} ({_format_type(stored[key])} instead of {_format_type(expected[key])})"
        for key in sorted(required & stored.keys() - fitting.keys())
    )
    missing, surplus = tuple(sorted(required - stored.keys())), _list_surplus(model, state_dict, classifier)
    non_finite = tuple(key for key, value in fitting.items() if not value.isfinite().all())
    return _Fit(fitting, missing, tuple(misshapen), surplus, non_finite, len(expected))


def _list_surplus(model: nn.Module, state_dict: StateDict, classifier: tuple[str, ...]) -> tuple[str, ...]:
    """List the tensors of blocks that the model lacks within a part that it has, as of a deeper model.

    Tensors of other parts, such as heads for other tasks, and extra tensors of a block that the model has don't count.
    """
    modules = dict(model.named_modules())
    return tuple(
        key
        for key in state_dict
        if not key.startswith(classifier)
        and (block := key.rpartition(".")[0]) not in modules
        and block.partition(".")[0] in modules
    )


def _list_classifiers(model: nn.Module) -> list[str]:
    """List the names of the classifier's layers, of which distilled models have two."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier")
    if names:
        return [names] if isinstance(names, str) else list(names)
    found = model.get_classifier()  # type: ignore[operator]  # the config.json of a folder may not name it
    layers = list(found) if isinstance(found, tuple | list) else [found]
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def _list_recomputed(model: nn.Module) -> set[str]:
    """List the buffers that files may lack: counters, and indices and masks that the model's constructor computes.

    The statistics of normalization layers are the only buffers that training changes.
    """
    return {name for name, _ in model.named_buffers() if not name.rpartition(".")[2].startswith("running_")}


def _is_fitting(stored: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether the shapes agree and no quantized integers would pass for weights."""
    return stored.shape == expected.shape and stored.is_floating_point() == expected.is_floating_point()


def _format_type(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _read_content(path: Path, source: str) -> Mapping[str, Any]:
    """Return the file's content: tensors by name, or the entries of a training checkpoint."""
    if not path.is_file():
        problem = "not a file" if path.exists() else "no such file"
        raise RankLocalError(f"model.weights: {problem}: {path} (paths in a config are relative to the config file)")
    try:
        content = _read_mapping(path)
    except UNREADABLE as error:
        raise RankLocalError(
            f"{source}: not a .safetensors or .pth file of plain tensors ({_find_reason(path, error)})"
        ) from error
    return content


def _read_mapping(path: Path) -> Mapping[str, Any]:
    if path.name.endswith(".safetensors"):
        tensors: dict[str, Any]
        try:
            tensors = safetensors.torch.load_file(path)
        except (OSError, RuntimeError, SafetensorError):  # damaged, or the file system can't map files (some FUSE)
            tensors = safetensors.torch.load(path.read_bytes())
        return tensors
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm's trainer stores its arguments
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise TypeError(f"it holds a {type(content).__name__}, no tensors by name")
    return content


def _find_reason(path: Path, error: BaseException) -> str:
    """Return why a file can't be read: by how it begins, by the objects in it, or the error's first line."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as unreadable:
        return unreadable.strerror or str(unreadable)
    if not start:
        return "the file is empty"
    for beginning, reason in _FOREIGN_STARTS.items():
        if start.startswith(beginning):
            return reason
    if isinstance(error, pickle.UnpicklingError):
        objects = _list_objects(path)
        if not objects:
            return "it holds no tensors"
        return (
            f"it holds Python objects ({', '.join(objects[:_MAX_SHOWN])}), which are never loaded, since that can run "
            "code: store the weights alone, as torch.save(model.state_dict(), FILE)"
        )
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _list_objects(path: Path) -> list[str]:
    """List the Python objects in a .pth file that torch refuses to load; it is read without running its code."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except UNREADABLE:
        return []


def _find_timm_entry(content: Mapping[str, Any]) -> StateDict:
    """Return the tensors that timm's loader would use: averaged ones first; the content itself without an entry."""
    entries = (content[entry] for entry in _TIMM_ENTRIES if isinstance(content.get(entry), Mapping))
    return {str(key): value for key, value in next(entries, content).items() if isinstance(value, torch.Tensor)}


def _convert(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Convert the names and shapes of the original author's weights to timm's."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    converted: StateDict = convert(state_dict, model) if convert else state_dict
    return converted


def _list_prefixed(content: Mapping[str, Any], min_count: int) -> Iterator[tuple[str, StateDict]]:
    """Yield each prefix of the file's dotted names that at least `min_count` tensors have, and these without it."""
    pending = [("", dict(_flatten(content)))]
    while pending:
        prefix, tensors = pending.pop()
        groups: dict[str, StateDict] = {}
        for key, value in tensors.items():
            first, _, rest = key.partition(".")
            groups.setdefault(f"{prefix}{first}.", {})[rest] = value
        large = [(longer, group) for longer, group in groups.items() if len(group) >= min_count]
        yield from large
        pending += large


def _flatten(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of nested mappings by dotted name; mappings deeper than any trainer's are ignored."""
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _flatten(value, f"{prefix}{key}.", depth + 1)
