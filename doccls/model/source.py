"""What a model's name stands for: a model of timm, maybe under a former name, or of a folder or of the hub."""

from difflib import get_close_matches
from functools import lru_cache

import timm

from doccls.config.local_model import find_local_folder, read_architecture
from doccls.errors import DownloadError, UserError
from doccls.model.download import download

_HUB = "hf-hub:"


def check_model_name(name: str) -> None:
    """Check that timm knows the model name, or the architecture that a local folder names.

    Raises:
        UserError: it does not; the message lists the closest names.
    """
    folder = find_local_folder(name)
    if folder is not None:
        architecture, _ = read_architecture(folder)
        if not timm.is_model(architecture):
            raise UserError(f"model.name = {name!r}: its architecture is {architecture!r}, {_suggest(architecture)}")
    elif ":" not in name:  # timm itself resolves `hf-hub:...`
        base, _, tag = name.partition(".")
        if not timm.is_model(base) or (tag and name not in timm.list_pretrained()):
            raise UserError(f"model.name = {name!r}: {_suggest(name)}")


def resolve_alias(name: str) -> str:
    """Return the current name of a model that timm has renamed, with its tag; other names as they are."""
    return timm.models.get_deprecated_models().get(name) or name


@lru_cache(maxsize=4)
def has_fixed_input_size(name: str) -> bool:
    """Return whether the model has to be built for its image size; may read config.json of a folder or of the hub.

    Raises:
        UserError: config.json is missing or damaged.
        DownloadError: the network failed.
    """
    folder = find_local_folder(name)
    if folder is not None:
        architecture, fixed = read_architecture(folder)
        return has_fixed_input_size(resolve_alias(architecture)) if fixed is None else fixed
    if name.startswith(_HUB):
        try:
            loaded = download(name, lambda: timm.models.load_model_config_from_hf(name.removeprefix(_HUB)))
        except (UserError, DownloadError):
            raise
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"model.name = {name!r}: its config.json can't be used: {error}") from error
        return bool(loaded[0].get("fixed_input_size"))
    pretrained = None if ":" in name else timm.get_pretrained_cfg(name)
    return bool(pretrained and pretrained.fixed_input_size)


def _suggest(name: str) -> str:
    base = name.partition(".")[0]
    tagged = timm.list_pretrained()
    near = get_close_matches(name, [known for known in tagged if known.startswith(f"{base}.")], n=3, cutoff=0.3)
    near = near or get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
    hint = f"the closest are {', '.join(near)}" if near else "timm.list_models() gives all names"
    return f"timm has no such model; {hint}"
