"""`doccls report RUN ...`: the results of a finished run, or a comparison of several, as one HTML file."""

import argparse
import webbrowser
from collections.abc import Sequence
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
from doccls.report.comparison import RunRecord, derive_comparison, order_rows
from doccls.report.content import derive_content, order_for_thumbnails
from doccls.report.cost import read_cost
from doccls.report.inputs import ReportInputs, read_damage_version, read_inputs
from doccls.report.thumbnails import PageReader, Thumbnails, collect_thumbnails
from doccls.run.paths import RunPaths, find_run
from doccls.system.atomic_files import write_text
from doccls.system.disk import format_size

# Only files with this mark at their start are replaced, so that a report never takes the place of another page.
MARK = '<meta name="generator" content="doccls report">'
_MARK_SEARCH_BYTES = 1024


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
        UserError: a run is not merged, a file of it is damaged, the runs can't be compared, or the report can't be
            written there.
    """
    first, *others = (find_run(folder) for folder in arguments.runs)
    default = first.comparison([paths.run_id for paths in others]) if others else first.report
    output = default if arguments.output is None else resolve_option(arguments.output, "--output")
    _check_output(output)
    html, note = (
        _make_comparison([first, *others], not arguments.no_images)
        if others
        else _make_page(first, not arguments.no_images)
    )
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


def _make_page(paths: RunPaths, has_images: bool) -> tuple[str, str | None]:
    """Return the page of a run and, if images are missing, a note that says so."""
    inputs = read_inputs(paths)
    content = derive_content(inputs)
    rows = [page.row for page in order_for_thumbnails(content.pages, content.mistakes)]
    thumbnails, note = _collect_thumbnails(inputs, rows) if has_images else (None, None)
    from doccls.report.page import render_page  # Jinja2 and Matplotlib take a second to import

    return render_page(content, thumbnails, note), note


def _make_comparison(paths: Sequence[RunPaths], has_images: bool) -> tuple[str, str | None]:
    """Return the page that compares the runs and, if images are missing, a note that says so."""
    records = []
    for inputs in map(read_inputs, paths):
        records.append(RunRecord(inputs, read_cost(inputs), read_damage_version(inputs)))
    comparison = derive_comparison(records)
    thumbnails, note = (
        _collect_thumbnails(records[0].inputs, order_rows(comparison.pairs)) if has_images else (None, None)
    )
    from doccls.report.comparison_page import render_comparison  # Jinja2 takes a while to import

    return render_comparison(comparison, thumbnails, note), note


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


def _collect_thumbnails(inputs: ReportInputs, rows: Sequence[int]) -> tuple[Thumbnails | None, str | None]:
    """Return the thumbnails of rows, the most needed first, and, if images are missing, a note that says so."""
    snapshot = inputs.image_snapshot
    if not is_file(snapshot):
        return None, f"no thumbnails: {format_path(snapshot)}, which says where the images are, is missing"
    try:
        reader = PageReader(load_config(snapshot), inputs.merged.ids)
    except UserError as error:
        return None, f"no thumbnails: {error}"
    thumbnails = collect_thumbnails(rows, reader.read)
    if not thumbnails.missing:
        return thumbnails, None
    return thumbnails, f"{thumbnails.missing:,} of {len(rows):,} pages have no thumbnail: their images can't be read"
