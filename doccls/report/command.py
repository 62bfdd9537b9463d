"""`doccls report RUN`: the results of a finished run as one HTML file."""

import argparse
import webbrowser
from pathlib import Path

from doccls.config import load_config
from doccls.config.paths import (
    describe_error,
    find_output_problem,
    find_problem,
    format_path,
    is_absent,
    is_file,
    resolve_option,
)
from doccls.errors import UserError
from doccls.report.content import ReportContent, derive_content, order_for_thumbnails
from doccls.report.inputs import ReportInputs, read_inputs
from doccls.report.thumbnails import PageReader, Thumbnails, collect_thumbnails
from doccls.run.paths import find_run
from doccls.system.atomic_files import write_text
from doccls.system.disk import format_size

# Only files with this mark at their start are replaced, so that a report never takes the place of another page.
MARK = '<meta name="generator" content="doccls report">'
_MARK_SEARCH_BYTES = 1024


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
        UserError: the run is not merged, a file of it is damaged, or the report can't be written there.
    """
    paths = find_run(arguments.run)
    output = paths.report if arguments.output is None else resolve_option(arguments.output, "--output")
    _check_output(output)
    inputs = read_inputs(paths)
    content = derive_content(inputs)
    thumbnails, note = (None, None) if arguments.no_images else _collect_thumbnails(inputs, content)
    from doccls.report.page import render_page  # Jinja2 and Matplotlib take a second to import

    html = render_page(content, thumbnails, note)
    try:
        write_text(output, html)
    except OSError as error:
        raise UserError(f"--output: {describe_error(error, output, 'file')}") from error
    if note is not None:
        print(f"[WARNING] {note}")
    print(f"[REPORT] {format_size(len(html.encode()))}: {format_path(output)}")
    if arguments.open and not webbrowser.open(output.as_uri()):
        print("[WARNING] --open: no browser could be started; open the file by hand")
    return 0


def _check_output(output: Path) -> None:
    """Check that the report may be written to the path.

    Raises:
        UserError: it may not.
    """
    problem = _find_output_problem(output)
    if problem is not None:
        raise UserError(f"--output: {problem}")


def _find_output_problem(output: Path) -> str | None:
    shown = format_path(output)
    if output.suffix.lower() != ".html":
        return f"the report's name must end in .html: {shown}"
    problem = find_problem(output.parent, "folder") or find_output_problem(output.parent)
    if problem is not None or is_absent(output):
        return problem
    problem = find_problem(output, "file")
    if problem is None and not _is_earlier_report(output):
        problem = f"{shown} exists and is not an earlier report: remove it or choose another name"
    return problem


def _is_earlier_report(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(_MARK_SEARCH_BYTES)


def _collect_thumbnails(inputs: ReportInputs, content: ReportContent) -> tuple[Thumbnails | None, str | None]:
    """Return the thumbnails and, if images are missing, a note that says so."""
    snapshot = inputs.image_snapshot
    if not is_file(snapshot):
        return None, f"no thumbnails: {format_path(snapshot)}, which says where the images are, is missing"
    try:
        reader = PageReader(load_config(snapshot), inputs.merged.ids)
    except UserError as error:
        return None, f"no thumbnails: {error}"
    rows = [page.row for page in order_for_thumbnails(content.pages, content.mistakes)]
    thumbnails = collect_thumbnails(rows, reader.read)
    if not thumbnails.missing:
        return thumbnails, None
    return thumbnails, f"{thumbnails.missing:,} of {len(rows):,} pages have no thumbnail: their images can't be read"
