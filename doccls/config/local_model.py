"""The folder that `model.name: local-dir:FOLDER` names, in the layout of the hub: config.json and weights."""

import json
from pathlib import Path

from doccls.errors import UserError

PREFIX = "local-dir:"
CONFIG_FILE = "config.json"

# In the order of timm's own search.
_WEIGHTS_NAMES = (
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
_WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pth.tar", ".bin")


def find_local_folder(name: str) -> Path | None:
    """Return the folder that a model's name states, or None for the name of a model in timm or in the hub."""
    return Path(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None


def find_local_weights(folder: Path) -> Path:
    """Return the file of the folder's weights: the name that timm prefers, else the only file of the best ending.

    Raises:
        UserError: there is none, or several are equally good.
    """
    for file in (folder / name for name in _WEIGHTS_NAMES):
        if file.is_file():
            return file
    for ending in _WEIGHTS_ENDINGS:
        files = sorted(folder.glob(f"*{ending}"))
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(
                f"model.name = '{PREFIX}{folder}': the folder has several weights "
                f"({', '.join(file.name for file in files)}): set model.weights to one of them"
            )
    raise UserError(
        f"model.name = '{PREFIX}{folder}': the folder has no weights ({', '.join(_WEIGHTS_NAMES[:2])}, ...): add them, "
        "set model.weights to a file, or set model.pretrained: false"
    )


def read_architecture(folder: Path) -> tuple[str, bool | None]:
    """Read config.json: return timm's name of the architecture, and whether its input size is fixed, if stated.

    Raises:
        UserError: the file is missing or damaged, or names no architecture.
    """
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        architecture, pretrained = content["architecture"], content.get("pretrained_cfg") or content
        fixed = pretrained.get("fixed_input_size")
        if not isinstance(architecture, str):
            raise TypeError("not a string")
    except OSError as error:
        raise UserError(
            f"model.name = '{PREFIX}{folder}': {path}: {error.strerror} (paths in a config are relative to the config "
            "file)"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"model.name = '{PREFIX}{folder}': {path} is not the JSON file of a timm model, with an `architecture`"
        ) from error
    return architecture, fixed if isinstance(fixed, bool) else None
