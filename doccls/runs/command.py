"""`doccls runs [EXP_DIR]`: the runs of an experiments folder as a table."""

import argparse
import shutil
import sys
from datetime import datetime
from pathlib import Path

from doccls.config.paths import describe_error, find_problem, format_path, resolve_option
from doccls.errors import UserError
from doccls.run.paths import DAY
from doccls.runs.read import read_run
from doccls.runs.scan import list_run_folders
from doccls.runs.table import order_runs, render_table

_DEFAULT = Path("experiments")  # as output.exp_dir beside the config file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls runs`."""
    parser.add_argument(
        "exp_dir", nargs="?", type=Path, default=_DEFAULT, metavar="EXP_DIR",
        help="the folder of the runs, output.exp_dir (default: %(default)s)",
    )  # fmt: skip


def runs(arguments: argparse.Namespace) -> int:
    """Print the table and return the exit code; write nothing.

    Raises:
        UserError: there is no such folder, or it can't be listed.
    """
    exp_dir = resolve_option(arguments.exp_dir, "EXP_DIR")
    problem = find_problem(exp_dir, "folder")
    if problem is not None:
        raise UserError(f"EXP_DIR: {problem}")
    try:
        found = list_run_folders(exp_dir)
    except OSError as error:
        raise UserError(f"EXP_DIR: {describe_error(error, exp_dir, 'folder')}") from error
    now = datetime.now()
    read = [(folder, read_run(folder, now)) for folder in found.folders]
    listed = order_runs(run for _, run in read if run is not None)
    if listed:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(render_table(exp_dir, listed, width), end="")
    else:
        hint = "; for those of this day, list the folder above it" if DAY.fullmatch(exp_dir.name) else ""
        print(f"no runs in {format_path(exp_dir)} (runs are in EXP_DIR/YYYYMMDD/<run_id>{hint})")
    for text in [
        *found.problems,
        *(f"{format_path(folder)} is left out: nothing of a run is in it" for folder, run in read if run is None),
        *(f"{format_path(link)} is left out: it is a link" for link in found.links),
    ]:
        print(f"[WARNING] {text}")
    return 0
