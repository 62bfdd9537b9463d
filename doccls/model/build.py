"""Config -> timm model, with checks of name, pooling and weights whose errors name the config key."""

import os
from pathlib import Path
from typing import cast

import timm
import torch
from timm.layers import SelectAdaptivePool2d, convert_sync_batchnorm, set_fused_attn
from torch import nn

from doccls.config.local_model import find_local_folder, find_local_weights
from doccls.config.schema import ModelConfig
from doccls.errors import DownloadError, UserError
from doccls.model.download import download, locate_source
from doccls.model.pooling import GeneralizedMeanPool2d, use_deterministic_maxima
from doccls.model.source import check_model_name, has_fixed_input_size, resolve_alias
from doccls.model.weights import load_file, load_state

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "gem", "token", "map")


def build_model(config: ModelConfig, num_classes: int, img_size: int, fetch: bool = True) -> nn.Module:
    """Build the model on the CPU, in training mode, with its initial weights; draws from torch's global generator.

    Args:
        fetch: False skips pretrained weights and `model.weights`, for a model whose weights are loaded later.

    Raises:
        UserError: unknown name, unsupported pooling, or weights that can't be loaded.
        DownloadError: the network failed; another attempt may succeed.
    """
    check_model_name(config.name)
    config = config.model_copy(update={"name": resolve_alias(config.name)})
    model = _create(config, config.pooling, num_classes, img_size)
    if not fetch:
        return model
    new_keys = _list_pooling_parameters(config, model, img_size)
    if config.weights is not None:
        load_file(model, config.weights, config.name, new_keys, f"model.weights = {config.weights}")
    elif config.pretrained and (folder := find_local_folder(config.name)) is not None:
        path = find_local_weights(folder)
        load_file(model, path, config.name, new_keys, f"model.name = {config.name!r}: {path}")
    elif config.pretrained:
        load_state(model, _fetch_pretrained(config, img_size), f"the hub's weights of {config.name}", new_keys)
    return model


def fetch_pretrained(config: ModelConfig, img_size: int) -> Path | None:
    """Download what `build_model` needs from the hub, for machines without network, and return the cache folder.

    Needs no GPU. Returns None if the config needs nothing from the hub.

    Raises:
        UserError: as for `build_model` and `check_img_size`, or the network failed.
    """
    takes_weights = config.pretrained and config.weights is None
    if find_local_folder(config.name) is not None or not (takes_weights or config.name.startswith("hf-hub:")):
        return None
    try:
        build_model(config, 2, img_size, fetch=takes_weights)
    except DownloadError as error:
        raise UserError(str(error)) from error
    check_img_size(config, img_size)
    return locate_source(resolve_alias(config.name))[1]


def get_normalization(config: ModelConfig, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) per RGB channel, 0 to 1: those of the config, or else those the model was pretrained with."""
    defaults = timm.data.resolve_model_data_config(model)
    return tuple(config.mean or defaults["mean"]), tuple(config.std or defaults["std"])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of all parameters and of trainable ones."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)


def list_poolings(name: str, img_size: int) -> list[str]:
    """List the values of model.pooling that this architecture supports, by trying each on the meta device."""
    return [pooling for pooling in POOLINGS if _supports_pooling(name, pooling, img_size)]


def _create(config: ModelConfig, pooling: str | None, num_classes: int, img_size: int) -> nn.Module:
    options = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    set_options = {name: value for name, value in options.items() if value is not None}
    if has_fixed_input_size(config.name):
        set_options["img_size"] = img_size

    def create() -> nn.Module:
        return _create_with_pooling(config.name, pooling, num_classes, set_options)

    try:  # of other models, nothing is fetched here
        model = download(config.name, create) if config.name.startswith("hf-hub:") else create()
    except (UserError, DownloadError):
        raise
    except (AssertionError, TypeError, ValueError, RuntimeError, AttributeError, OSError) as error:
        if pooling is not None:
            supported = list_poolings(config.name, img_size)
            if pooling not in supported:
                raise UserError(
                    f"model.pooling = {pooling!r}: {config.name} supports {', '.join(supported)}, "
                    "or null for the architecture's default"
                ) from error
        raise UserError(
            f"model.name = {config.name!r} can't be built with train.img_size = {img_size} and "
            f"{', '.join(f'model.{key} = {value}' for key, value in options.items())}: {error}"
        ) from error
    return model


def check_img_size(config: ModelConfig, img_size: int) -> None:
    """Check the image size with one forward pass on the meta device, without memory or weights.

    It costs about as much as building the model, so training leaves it to its first step, and checks when that fails.

    Raises:
        UserError: the model, which can be built, does not support the size.
    """
    name = resolve_alias(config.name)
    options: dict[str, float] = {"img_size": img_size} if has_fixed_input_size(name) else {}
    try:
        with torch.device("meta"), torch.no_grad():
            probe = _create_with_pooling(name, config.pooling, 2, options).eval()
            probe(torch.empty(1, 3, img_size, img_size))
    except (NotImplementedError, OSError):
        return  # an operation lacks meta support, or the hub does not answer, so nothing can be checked
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"train.img_size = {img_size}: {name} does not support it: {error}") from error


def has_plain_batchnorm(model: nn.Module) -> bool:
    """Return whether the model has BatchNorm layers that normalize over the images of a single process."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for module in model.modules()
    )


def has_synchronized_batchnorm(model: nn.Module) -> bool:
    """Return whether the model has BatchNorm layers that normalize over the images of all processes."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """Convert BatchNorm to SyncBatchNorm (statistics over the images of all processes), which needs GPUs."""
    return cast(nn.Module, convert_sync_batchnorm(model))


def _create_with_pooling(name: str, pooling: str | None, num_classes: int, options: dict[str, float]) -> nn.Module:
    if "TIMM_FUSED_ATTN" not in os.environ:  # timm's switch; its default leaves Swin's attention unfused
        set_fused_attn(True, experimental=True)
    if pooling not in (None, *POOLINGS):
        raise ValueError(f"unknown pooling {pooling!r}")
    pool_option = {} if pooling is None else {"global_pool": "avg" if pooling == "gem" else pooling}
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, **pool_option, **options)
    use_deterministic_maxima(model)
    if pooling == "gem":
        _use_gem(model)
    return cast(nn.Module, model)


def _use_gem(model: nn.Module) -> None:
    """Replace the only pooling layer by GeM, which timm lacks; architectures that pool inline don't support it."""
    found = [name for name, module in model.named_modules() if isinstance(module, SelectAdaptivePool2d)]
    if len(found) != 1:
        raise ValueError("no pooling layer to replace")
    parent, _, leaf = found[0].rpartition(".")
    pool = model.get_submodule(found[0])
    setattr(model.get_submodule(parent), leaf, GeneralizedMeanPool2d.like(pool))


def _supports_pooling(name: str, pooling: str, img_size: int) -> bool:
    options: dict[str, float] = {"img_size": img_size} if has_fixed_input_size(name) else {}
    try:
        with torch.device("meta"), torch.no_grad():
            model = _create_with_pooling(name, pooling, 2, options).eval()
            return tuple(model(torch.empty(2, 3, img_size, img_size)).shape) == (2, 2)
    except (AssertionError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False


def _fetch_pretrained(config: ModelConfig, img_size: int) -> dict[str, torch.Tensor]:
    size = {"img_size": img_size} if has_fixed_input_size(config.name) else {}
    try:
        model = download(config.name, lambda: timm.create_model(config.name, pretrained=True, **size))
    except (UserError, DownloadError):
        raise
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        if "No pretrained weights" in str(error):
            raise UserError(
                f"model.pretrained = True: timm has no pretrained weights for {config.name!r}: choose another "
                "model.name, set model.weights to a file, or set model.pretrained: false"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.pretrained = True: the weights of {config.name!r} could not be fetched from the hub ({reason}). "
            "Without network access, download them elsewhere and set model.weights: path/to/model.safetensors"
        ) from error
    return cast(dict[str, torch.Tensor], model.state_dict())


def _list_pooling_parameters(config: ModelConfig, model: nn.Module, img_size: int) -> set[str]:
    """List the tensors that the model has only because of model.pooling; pretrained weights lack them."""
    if config.pooling is None:
        return set()
    options: dict[str, float] = {"img_size": img_size} if has_fixed_input_size(config.name) else {}
    with torch.device("meta"):
        default = _create_with_pooling(config.name, None, 2, options)
    return model.state_dict().keys() - default.state_dict().keys()
