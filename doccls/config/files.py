"""The files and folders that a config names: whether they can be used, before anything is read or written."""

from pathlib import Path

from doccls.config.local_model import CONFIG_FILE, find_local_folder, find_local_weights
from doccls.config.paths import PathKind, check_paths, find_output_problem, find_problem, is_absent, is_folder
from doccls.config.schema import Config

_Inputs = dict[str, tuple[Path | None, PathKind]]


def check_files(config: Config) -> None:
    """Check that every file and folder named in the config can be read, and that the output folders can be written.

    Raises:
        UserError: some can't; the message names all of them.
    """
    check_paths(_list_inputs(config), _list_outputs(config))
    _check_local_weights(config)


def check_inputs(config: Config, may_be_absent: bool = False) -> list[str]:
    """Check every file and folder that is read; return a line for each output folder that can't be written here.

    The run may be for another machine. With `may_be_absent`, inputs that don't exist are such lines too.

    Raises:
        UserError: some can't be read; the message names all of them.
    """
    inputs = _list_inputs(config)
    absent = {key: (path, kind) for key, (path, kind) in inputs.items() if path is not None and is_absent(path)}
    absent = absent if may_be_absent else {}
    check_paths({key: item for key, item in inputs.items() if key not in absent})
    if "model.name" not in absent:
        _check_local_weights(config)
    outputs = {key: find_output_problem(path) for key, path in _list_outputs(config).items()}
    return [
        *(f"{key}: {find_problem(path, kind)}" for key, (path, kind) in absent.items()),
        *(f"{key}: {problem}" for key, problem in outputs.items() if problem is not None),
    ]


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
    outputs = {"output.logs_dir": config.output.logs_dir}
    if not is_folder(config.output.exp_dir):  # only a run's own folder in it must be writable
        outputs["output.exp_dir"] = config.output.exp_dir
    return outputs | ({"data.store": store} if isinstance(store, Path) else {})


def _check_local_weights(config: Config) -> None:
    local_model = find_local_folder(config.model.name)
    if local_model is not None and config.model.pretrained and config.model.weights is None:
        find_local_weights(local_model)
