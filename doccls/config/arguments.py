"""The command-line arguments that select a config, shared by every command that takes one."""

import argparse
from pathlib import Path
from typing import Any

from doccls.config.load import MODES, LoadedConfig, Override, load_with_warnings, parse_override
from doccls.config.paths import leave_deleted_folder
from doccls.config.schema import Config


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add `--config`, `--mode`, `--set` and `--num-workers`."""
    parser.add_argument(
        "--config", type=Path, required=required, metavar="FILE", help="YAML file; its paths are relative to its folder"
    )
    _add_override_arguments(parser)


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the same arguments, with a `--config` that may be repeated: `configs` has all, and `config` the first."""
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", action=_Configs,
        help="YAML file; its paths are relative to its folder; may be repeated, to train several runs in one queue",
    )  # fmt: skip
    _add_override_arguments(parser)


class _Configs(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.configs = [*getattr(namespace, "configs", ()), values]
        namespace.config = namespace.configs[0]


def _add_override_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", choices=MODES, help="named set of defaults, overridden by the YAML file (default: basic)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override one key, as in --set train.epochs=3; may be repeated",
    )  # fmt: skip
    parser.add_argument("--num-workers", type=int, metavar="N", help="short for --set data.num_workers=N")


def load_arguments(arguments: argparse.Namespace) -> Config:
    """Load the config that the arguments of `add_config_arguments` select, for commands that don't train.

    Raises:
        UserError: see `load_with_warnings`.
    """
    return load_arguments_with_warnings(arguments).config


def load_arguments_with_warnings(arguments: argparse.Namespace) -> LoadedConfig:
    """Load the config that the arguments of `add_config_arguments` select.

    Raises:
        UserError: see `load_with_warnings`.
    """
    overrides = [parse_override(text) for text in arguments.overrides]
    if arguments.num_workers is not None:
        overrides.append(Override("data.num_workers", arguments.num_workers, "--num-workers"))
    loaded = load_with_warnings(arguments.config, arguments.mode, overrides)
    leave_deleted_folder()
    return loaded
