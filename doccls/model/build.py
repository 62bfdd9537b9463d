"""Config -> timm model: names, pooling and weights checked in the user's words, not in timm's assertions."""

import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import cast

import timm
import torch
from timm.layers import SelectAdaptivePool2d, convert_sync_batchnorm, set_fused_attn
from torch import nn

from doccls.config.schema import ModelConfig
from doccls.errors import DownloadError, RankLocalError, UserError
from doccls.model.download import download, locate_source
from doccls.model.pooling import GeneralizedMeanPool2d, use_deterministic_maxima
from doccls.model.weights import UNREADABLE

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "gem", "token", "map")


def build_model(config: ModelConfig, num_classes: int, img_size: int, fetch: bool = True) -> nn.Module:
    """The model on the CPU, in training mode, with its starting weights; draws from torch's global generator.

    Args:
        fetch: False leaves pretrained weights and `model.weights` out, for a model that gets others anyway.

    Raises:
        UserError: unknown name, a pooling or size that the architecture doesn't take, or weights that can't be had.
        DownloadError: the network failed; another attempt may succeed.
    """
    check_model_name(config.name)
    model = _create(config, config.pooling, num_classes, img_size)
    if not fetch:
        return model
    fresh = _list_pooling_parameters(config, model, img_size)
    if config.weights is not None:
        _load_file(model, config.weights, config.name, fresh)
    elif config.pretrained:
        _load_state(model, _fetch_pretrained(config, img_size), f"the hub's weights of {config.name}", fresh)
    return model


def fetch_pretrained(config: ModelConfig, img_size: int) -> Path | None:
    """Download what `build_model` takes from the hub, for machines that may not; returns the folder of the cache.

    It needs no GPU. None is returned if the config takes nothing from there.

    Raises:
        UserError: as `build_model`, or the network failed.
    """
    takes_weights = config.pretrained and config.weights is None
    if config.name.startswith("local-dir:") or not (takes_weights or config.name.startswith("hf-hub:")):
        return None
    try:
        build_model(config, 2, img_size, fetch=takes_weights)
    except DownloadError as error:
        raise UserError(str(error)) from error
    return locate_source(config.name)[1]


def get_normalization(config: ModelConfig, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the RGB channels, 0 to 1: the config's, else those that the model's weights were trained with."""
    own = timm.data.resolve_model_data_config(model)
    return tuple(config.mean or own["mean"]), tuple(config.std or own["std"])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trainable)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)


def list_poolings(name: str, img_size: int) -> list[str]:
    """The values of model.pooling that this architecture takes, found by trying each without memory or weights."""
    return [pooling for pooling in POOLINGS if _takes_pooling(name, pooling, img_size)]


def check_model_name(name: str) -> None:
    """timm knows the name.

    Raises:
        UserError: it does not; the closest names are told.
    """
    if ":" in name:  # `hf-hub:...` and `local-dir:...` are timm's to resolve
        return
    base, _, tag = name.partition(".")
    tagged = timm.list_pretrained()
    if timm.is_model(base) and (not tag or name in tagged):
        return
    near = get_close_matches(name, [known for known in tagged if known.startswith(f"{base}.")], n=3, cutoff=0.3)
    near = near or get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
    hint = f"the closest are {', '.join(near)}" if near else "timm.list_models() gives all names"
    raise UserError(f"model.name = {name!r}: timm has no such model; {hint}")


def _create(config: ModelConfig, pooling: str | None, num_classes: int, img_size: int) -> nn.Module:
    options = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    wanted = {name: value for name, value in options.items() if value is not None}
    if _has_fixed_input_size(config.name):
        wanted["img_size"] = img_size
    try:
        model = download(config.name, lambda: _create_with_pooling(config.name, pooling, num_classes, wanted))
    except (UserError, DownloadError):
        raise
    except (AssertionError, TypeError, ValueError, RuntimeError, AttributeError, OSError) as error:
        if pooling is not None:
            takes = list_poolings(config.name, img_size)
            if pooling not in takes:
                raise UserError(
                    f"model.pooling = {pooling!r}: {config.name} takes {', '.join(takes)}, "
                    "or null for the architecture's own"
                ) from error
        raise UserError(
            f"model.name = {config.name!r} can't be built with train.img_size = {img_size} and "
            f"{', '.join(f'model.{key} = {value}' for key, value in options.items())}: {error}"
        ) from error
    _check_img_size(config, pooling, img_size, wanted)
    return model


def _check_img_size(config: ModelConfig, pooling: str | None, img_size: int, options: dict[str, float]) -> None:
    """One page of that size through the model, without memory or weights."""
    try:
        with torch.device("meta"), torch.no_grad():
            probe = _create_with_pooling(config.name, pooling, 2, options).eval()
            probe(torch.empty(1, 3, img_size, img_size))
    except NotImplementedError:
        return  # the architecture does what the meta device can't: this tells nothing
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"train.img_size = {img_size}: {config.name} can't take it: {error}") from error


def has_plain_batchnorm(model: nn.Module) -> bool:
    """Whether BatchNorm in it normalises over the images of one process alone."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for module in model.modules()
    )


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """The model with BatchNorm over the images of all processes, which needs GPUs."""
    return cast(nn.Module, convert_sync_batchnorm(model))


def _create_with_pooling(name: str, pooling: str | None, num_classes: int, options: dict[str, float]) -> nn.Module:
    if "TIMM_FUSED_ATTN" not in os.environ:  # timm's own switch; by default it leaves Swin's attention unfused
        set_fused_attn(True, experimental=True)
    if pooling not in (None, *POOLINGS):
        raise ValueError(f"unknown pooling {pooling!r}")
    own = {} if pooling is None else {"global_pool": "avg" if pooling == "gem" else pooling}
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, **own, **options)
    use_deterministic_maxima(model)
    if pooling == "gem":
        _use_gem(model)
    return cast(nn.Module, model)


def _use_gem(model: nn.Module) -> None:
    """Replace the one timm pooling layer by GeM, which timm lacks; architectures that pool inline can't take it."""
    found = [name for name, module in model.named_modules() if isinstance(module, SelectAdaptivePool2d)]
    if len(found) != 1:
        raise ValueError("no pooling layer to replace")
    parent, _, leaf = found[0].rpartition(".")
    own = model.get_submodule(found[0])
    setattr(model.get_submodule(parent), leaf, GeneralizedMeanPool2d.like(own))


def _takes_pooling(name: str, pooling: str, img_size: int) -> bool:
    options: dict[str, float] = {"img_size": img_size} if _has_fixed_input_size(name) else {}
    try:
        with torch.device("meta"), torch.no_grad():
            model = _create_with_pooling(name, pooling, 2, options).eval()
            return tuple(model(torch.empty(2, 3, img_size, img_size)).shape) == (2, 2)
    except (AssertionError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False


def _has_fixed_input_size(name: str) -> bool:
    own = None if ":" in name else timm.get_pretrained_cfg(name)
    return bool(own and own.fixed_input_size)


def _fetch_pretrained(config: ModelConfig, img_size: int) -> dict[str, torch.Tensor]:
    size = {"img_size": img_size} if _has_fixed_input_size(config.name) else {}
    try:
        model = download(config.name, lambda: timm.create_model(config.name, pretrained=True, **size))
    except (UserError, DownloadError):
        raise
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        if "No pretrained weights" in str(error):
            raise UserError(
                f"model.pretrained = True: timm has no pretrained weights for {config.name!r}: take another "
                "model.name, point model.weights at a file, or set model.pretrained: false"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.pretrained = True: the weights of {config.name!r} could not be fetched from the hub ({reason}). "
            "On a machine without network, download them elsewhere and set model.weights: path/to/model.safetensors"
        ) from error
    return cast(dict[str, torch.Tensor], model.state_dict())


def _load_file(model: nn.Module, path: Path, name: str, fresh: set[str]) -> None:
    if not path.is_file():
        raise RankLocalError(f"model.weights: no such file: {path} (paths in a config are relative to the config file)")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except UNREADABLE as error:
        raise RankLocalError(
            f"model.weights = {path}: not a .safetensors or .pth file of plain tensors "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})"
        ) from error
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = adapt(state, model) if adapt else state
    except (KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"model.weights = {path}: not the weights of {name}: {error}") from error
    _load_state(model, state, f"model.weights = {path}", fresh)


def _list_pooling_parameters(config: ModelConfig, model: nn.Module, img_size: int) -> set[str]:
    """Tensors that the model has only because of model.pooling: no stored weights hold them."""
    if config.pooling is None:
        return set()
    options: dict[str, float] = {"img_size": img_size} if _has_fixed_input_size(config.name) else {}
    with torch.device("meta"):
        usual = _create_with_pooling(config.name, None, 2, options)
    return model.state_dict().keys() - usual.state_dict().keys()


def _load_state(model: nn.Module, state: dict[str, torch.Tensor], source: str, fresh: set[str]) -> None:
    """Load all but the classifier, whose classes are others, and `fresh`; anything else must fit."""
    own = model.state_dict()
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    classifier = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    # timm renames the last norm when it pools tokens: the weights are the same.
    renamed = {f"fc_{key}": value for key, value in state.items() if key.startswith("norm.") and f"fc_{key}" in fresh}
    state = {**state, **renamed}
    spared = {key for key in own if key.startswith(classifier)} | (fresh - renamed.keys())
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    missing = sorted(own.keys() - fitting.keys() - spared)
    if missing:
        raise UserError(
            f"{source} does not fit the model: {len(missing)} of {len(own)} tensors are absent or of another shape, "
            f"such as {', '.join(missing[:3])}"
        )
    kept = {key: value for key, value in fitting.items() if key not in spared}
    model.load_state_dict(kept, strict=False)
