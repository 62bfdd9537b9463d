"""The files and folders that a config names: whether they can be used, before anything is read or written."""

from pathlib import Path

from doccls.config.local_model import CONFIG_FILE, find_local_folder, find_local_weights
from doccls.config.paths import PathKind, check_paths, find_problem, is_absent
from doccls.config.schema import Config

_Inputs = dict[str, tuple[Path | None, PathKind]]


def check_files(config: Config) -> None:
    """Check that every file and folder named in the config can be read, and that the output folders can be written.

    Raises:
        UserError: some can't; the message names all of them.
    """
    check_paths(_list_inputs(config), _list_outputs(config))
    local_model = find_local_folder(config.model.name)
    if local_model is not None and config.model.pretrained and config.model.weights is None:
        find_local_weights(local_model)


def check_present_files(config: Config) -> list[str]:
    """Check what exists on this machine as `check_files` does; return a line for each file or folder that does not.

    Raises:
        UserError: some can't be used; the message names all of them.
    """
    inputs = _list_inputs(config)
    absent = {key: (path, kind) for key, (path, kind) in inputs.items() if path is not None and is_absent(path)}
    check_paths({key: item for key, item in inputs.items() if key not in absent}, _list_outputs(config))
    return [f"{key}: {find_problem(path, kind)}" for key, (path, kind) in absent.items()]


def _list_inputs(config: Config) -> _Inputs:
    data, local_model = config.data, find_local_folder(config.model.name)
    required: _Inputs = {
        "data.train_csv": (data.train_csv, "file"),
        "data.image_dir_train": (data.image_dir_train, "folder"),
    }
    optional: _Inputs = {
        "data.sample_csv": (data.sample_csv, "file"),
        "data.image_dir_test": (data.image_dir_test, "folder"),
        "model.name": (None if local_model is None else local_model / CONFIG_FILE, "file"),
        "model.weights": (config.model.weights, "file"),
    }
    return required | {key: item for key, item in optional.items() if item[0] is not None}


def _list_outputs(config: Config) -> dict[str, Path]:
    store = config.data.store
    outputs = {"output.logs_dir": config.output.logs_dir, "output.exp_dir": config.output.exp_dir}
    return outputs | ({"data.store": store} if isinstance(store, Path) else {})
