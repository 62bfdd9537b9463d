"""`doccls report RUN ...`: the results of a finished run, or a comparison of several, as one HTML file."""

import argparse
import webbrowser
from pathlib import Path

from doccls.config.paths import format_path, resolve_option
from doccls.report.make import make_comparison, make_report
from doccls.run.paths import find_run
from doccls.system.disk import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls report`."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="run folder: <exp_dir>/YYYYMMDD/<run_id>, or a blend's; of several, with the same rows and labels, the "
        "page compares each to the first",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="the report, an .html file (default: RUN/report.html, or compare_<others>.html in the first RUN); only "
        "an earlier report is replaced",
    )  # fmt: skip
    parser.add_argument(
        "--no-images", action="store_true", help="leave out the thumbnails; IDs, class names and paths stay"
    )
    parser.add_argument("--open", action="store_true", help="open the report in the browser")


def report(arguments: argparse.Namespace) -> int:
    """Write the report and return the exit code.

    Raises:
        UserError: no fold of a run has finished, a file of it is damaged, the runs can't be compared, or the report
            can't be written there.
    """
    first, *others = (find_run(folder) for folder in arguments.runs)
    default = first.comparison([paths.run_id for paths in others]) if others else first.report
    output = default if arguments.output is None else resolve_option(arguments.output, "--output")
    with_images = not arguments.no_images
    made = make_comparison([first, *others], output, with_images) if others else make_report(first, output, with_images)
    if made.images_note is not None:
        print(f"[WARNING] {made.images_note}")
    print(f"[REPORT] {format_size(made.size_bytes)}: {format_path(output)}")
    if arguments.open and not webbrowser.open(output.as_uri()):
        print("[WARNING] --open: no browser could be started; open the file by hand")
    return 0
