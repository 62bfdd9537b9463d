"""The commands of `doccls`, also `python -m doccls`; `--help` lists them."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from doccls import blend, predict, preview, store_command, train
from doccls.config import Config
from doccls.config.arguments import add_config_arguments, load_arguments_with_warnings
from doccls.config.files import check_inputs
from doccls.config.paths import resolve_option
from doccls.config.reference import render_keys
from doccls.data.mixing import check_mixing
from doccls.data.prepare import describe_folds, prepare_data
from doccls.data.store import choose_store
from doccls.demo import command as demo
from doccls.report import command as report
from doccls.reporting.command import run_command
from doccls.reporting.console import guarding_console
from doccls.reporting.progress import ConsoleReporter
from doccls.runs import command as runs
from doccls.system.atomic_files import write_text
from doccls.system.rank import rank_by_environment
from doccls.system.user import complete_user
from doccls.system.variables import drop_empty_variables
from launcher import verify


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the `doccls` command line."""
    parser = argparse.ArgumentParser(prog="doccls", description="K-fold image classification, from CSV to submission.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo.add_arguments(commands.add_parser("demo", help="draw a data set and run the full pipeline on it, offline"))
    check = commands.add_parser("check", help="check a config and its data without training; or write the JSON schema")
    add_config_arguments(check, required=False)
    check.add_argument(
        "--schema", nargs="?", const=Path("-"), type=Path, metavar="FILE", help="write the JSON schema of the config"
    )
    check.add_argument("--keys", action="store_true", help="print every config key, its default and its meaning")
    preview.add_arguments(
        commands.add_parser("preview", help="draw twelve pages as the model sees them: clean, augmented, damaged")
    )
    commands.add_parser("train", help="train; same as python -m doccls.train", add_help=False)
    runs.add_arguments(commands.add_parser("runs", help="list the runs of an experiments folder, newest first"))
    report.add_arguments(
        commands.add_parser("report", help="write a run's results, or compare several runs, as one HTML page")
    )
    blend.add_arguments(commands.add_parser("blend", help="choose the weights by which several runs predict together"))
    predict.add_arguments(commands.add_parser("predict", help="average a run's folds on the test images"))
    store_command.add_arguments(commands.add_parser("store", help="show or clear the store of decoded pages"))
    verify.add_arguments(
        commands.add_parser("verify-resume", help="kill short runs of a config, resume them, and compare the bytes")
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    drop_empty_variables(os.environ)
    complete_user(os.environ)
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["train"]:
        return train.main(args[1:])
    with guarding_console():
        return _run(args)


def _run(args: Sequence[str]) -> int:
    parser = build_parser()
    arguments = parser.parse_args(args)
    if arguments.command == "check" and arguments.schema is None and arguments.config is None and not arguments.keys:
        parser.error("check needs --config FILE, --schema or --keys")
    command = functools.partial(_COMMANDS[arguments.command], arguments)
    prints = arguments.command in ("check", "runs") or (arguments.command == "store" and arguments.action == "info")
    return run_command(f"doccls {arguments.command}", command, rank_by_environment(), prints)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.schema is not None:
        text = render_schema()
        if arguments.schema == Path("-"):
            print(text, end="")
        else:
            write_text(resolve_option(arguments.schema, "--schema"), text)
    if arguments.keys:
        print(render_keys(), end="")
    if arguments.config is not None:
        loaded = load_arguments_with_warnings(arguments)
        config = loaded.config
        for warning in (*loaded.warnings, *check_inputs(config)):
            print(f"[WARNING] {warning}")
        from doccls.model.names import check_names  # timm takes seconds to import

        check_names(config)
        mixing = check_mixing(config.train, config.train.batch_size, config.train.num_processes or 1)
        print(f"[CONFIG] OK | {resolve_option(arguments.config, '--config')}")
        if mixing is not None:
            print(f"[WARNING] {mixing}")
        prepared = prepare_data(config, None, choose_store(config), ConsoleReporter())
        for warning in prepared.warnings:
            print(f"[WARNING] {warning}")
        print(f"[DATA] OK | {len(prepared.manifest)} rows, {len(prepared.manifest.classes)} classes")
        for line in describe_folds(prepared):
            print(f"[FOLD] {line}")
    return 0


def render_schema() -> str:
    """Return the JSON schema of a config file, which editors use to complete and check keys."""
    return json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": demo.demo,
    "check": _check,
    "preview": preview.preview,
    "runs": runs.runs,
    "report": report.report,
    "blend": blend.blend,
    "predict": predict.predict,
    "store": store_command.store,
    "verify-resume": verify.verify,
}


if __name__ == "__main__":
    sys.exit(main())
