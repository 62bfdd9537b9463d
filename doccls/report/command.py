"""`doccls report RUN`: the results of a finished run as one HTML file."""

import argparse
import webbrowser
from pathlib import Path

from doccls.config.paths import format_path, resolve_option
from doccls.report.make import make_report
from doccls.run.paths import find_run
from doccls.system.disk import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls report`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder: <exp_dir>/YYYYMMDD/<run_id>, or a blend's")
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="the report, an .html file (default: RUN/report.html); only an earlier report is replaced",
    )  # fmt: skip
    parser.add_argument(
        "--no-images", action="store_true", help="leave out the thumbnails; IDs, class names and paths stay"
    )
    parser.add_argument("--open", action="store_true", help="open the report in the browser")


def report(arguments: argparse.Namespace) -> int:
    """Write the report and return the exit code.

    Raises:
        UserError: no fold of the run has finished, a file of it is damaged, or the report can't be written there.
    """
    paths = find_run(arguments.run)
    output = paths.report if arguments.output is None else resolve_option(arguments.output, "--output")
    made = make_report(paths, output, with_images=not arguments.no_images)
    if made.images_note is not None:
        print(f"[WARNING] {made.images_note}")
    print(f"[REPORT] {format_size(made.size_bytes)}: {format_path(output)}")
    if arguments.open and not webbrowser.open(output.as_uri()):
        print("[WARNING] --open: no browser could be started; open the file by hand")
    return 0
