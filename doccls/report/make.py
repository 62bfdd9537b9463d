"""Makes the report of a run or a blend, or the comparison of several, from their files to one HTML file."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from doccls.config import Config, load_config
from doccls.config.paths import describe_error, find_file_output_problem, find_problem, format_path, is_file
from doccls.config.snapshot import read_snapshot
from doccls.errors import UserError
from doccls.oof.predictions import is_merged
from doccls.report.comparison import RunRecord, derive_comparison, order_rows
from doccls.report.content import derive_content, order_for_thumbnails
from doccls.report.cost import read_cost
from doccls.report.inputs import ReportInputs, read_damage_version, read_inputs
from doccls.report.slices import choose_sample, measure_page, slice_pages
from doccls.report.thumbnails import Thumbnails, collect_thumbnails
from doccls.report.training_pages import PageReader, TrainingPage
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import write_text
from doccls.system.signals import Interrupted, check_stop

# Only files with this mark at their start are replaced, so that a report never takes the place of another page.
MARK = '<meta name="generator" content="doccls report">'
_MARK_SEARCH_BYTES = 1024


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    path: Path
    size_bytes: int
    images_note: str | None  # why pages have no thumbnail, if that is not the user's wish


def make_report(paths: RunPaths, output: Path, with_images: bool = True) -> Report:
    """Write the report of a run or a blend to `output`, in place of an earlier report.

    Raises:
        UserError: no fold of the run has finished, a file of it is damaged, or the report can't be written there.
    """
    return _write(output, lambda: _render_run(paths, with_images))


def make_comparison(paths: Sequence[RunPaths], output: Path, with_images: bool = True) -> Report:
    """Write a page that compares runs or blends with the first of them to `output`, in place of an earlier report.

    Raises:
        UserError: as for `make_report`, or the runs can't be compared.
    """
    return _write(output, lambda: _render_comparison(paths, with_images))


def is_reported(paths: RunPaths) -> bool:
    """Return whether the run has a report that is not older than its predictions and, if it is merged, its scores."""
    files = [*paths.list_predictions(), *([paths.summary] if is_merged(paths) else [])]
    try:
        reported_ns = paths.report.stat().st_mtime_ns
        return all(file.stat().st_mtime_ns <= reported_ns for file in files)
    except OSError:
        return False


def report_run(paths: RunPaths, say: Callable[[str], None]) -> None:
    """Write the report into the folder of a run at its end. Whatever goes wrong is a warning: the run is complete."""
    try:
        report = make_report(paths, paths.report)
    except Interrupted as stop:
        say(f"[WARNING] no report: {stop}; to make it: doccls report {shlex.quote(str(paths.root))}")
        return
    except Exception as error:  # noqa: BLE001 (the results of a training must not depend on a picture of them)
        say(f"[WARNING] no report: {str(error) or type(error).__name__}")
        return
    if report.images_note is not None:
        say(f"[WARNING] report: {report.images_note}")
    say(f"[REPORT] {report.path}")


def wants_report(paths: RunPaths) -> bool:
    """Return whether the run's snapshot asks for a report (`output.report`); without a snapshot, it does."""
    if not is_file(paths.snapshot):
        return True
    try:
        output = read_snapshot(paths.snapshot).get("output")
    except UserError:
        return True  # making the report will say what is wrong
    return not isinstance(output, dict) or output.get("report") is not False


def _write(output: Path, render: Callable[[], tuple[str, str | None]]) -> Report:
    problem = find_file_output_problem(output, "report", ".html", "report", _is_earlier_report)
    if problem is not None:
        raise UserError(problem)
    html, note = render()
    try:
        write_text(output, html)
    except OSError as error:
        raise UserError(describe_error(error, output, "file")) from error
    return Report(output, len(html.encode()), note)


def _is_earlier_report(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(_MARK_SEARCH_BYTES)


def _render_run(paths: RunPaths, with_images: bool) -> tuple[str, str | None]:
    """Return the page of a run and, if images are missing, a note that says so."""
    inputs = read_inputs(paths)
    content = derive_content(inputs)
    config, reader, note = _open_pages(inputs)
    thumbnails, slices = None, None
    if config is not None and reader is not None:
        rows = [page.row for page in order_for_thumbnails(content.pages, content.mistakes)]
        facts = {}
        sample = dict.fromkeys(choose_sample(rows))

        def read(row: int) -> TrainingPage | None:
            check_stop()  # all pages of a run may take minutes
            page = reader.read(row)
            if page is not None and row in sample:
                facts[row] = measure_page(page, config.train.img_size)
            return page

        if with_images:
            thumbnails = collect_thumbnails(rows, read)
            note = _note_missing(thumbnails, len(rows))
        for row in sample:
            if row not in facts:
                read(row)
        slices = slice_pages(facts, content.pages, inputs.merged.find_damaged_hits())
    note = note if with_images else None
    from doccls.report.page import render_page  # Jinja2 and Matplotlib take a second to import

    return render_page(content, thumbnails, slices, note), note


def _render_comparison(paths: Sequence[RunPaths], with_images: bool) -> tuple[str, str | None]:
    """Return the page that compares the runs and, if images are missing, a note that says so."""
    records = []
    for inputs in map(read_inputs, paths):
        records.append(RunRecord(inputs, read_cost(inputs), read_damage_version(inputs)))
    comparison = derive_comparison(records)
    thumbnails, note = None, None
    if with_images:
        _, reader, note = _open_pages(records[0].inputs)
        if reader is not None:
            rows = order_rows(comparison.pairs)
            thumbnails = collect_thumbnails(rows, reader.read)
            note = _note_missing(thumbnails, len(rows))
    from doccls.report.comparison_page import render_comparison  # Jinja2 takes a while to import

    return render_comparison(comparison, thumbnails, note), note


def _open_pages(inputs: ReportInputs) -> tuple[Config | None, PageReader | None, str | None]:
    """Return the config that says where the images are, a reader of the pages, or a note that says why not."""
    snapshot = inputs.image_snapshot
    if not is_file(snapshot):
        return None, None, f"no thumbnails: {format_path(snapshot)}, which says where the images are, is missing"
    try:
        config = load_config(snapshot)
        problem = find_problem(config.data.image_dir_train, "folder")
        if problem is not None:
            raise UserError(f"data.image_dir_train: {problem}")
        return config, PageReader(config, inputs.merged.ids), None
    except UserError as error:
        return None, None, f"no thumbnails: {' '.join(str(error).split())}"


def _note_missing(thumbnails: Thumbnails, count: int) -> str | None:
    if not thumbnails.missing:
        return None
    return f"{thumbnails.missing:,} of {count:,} pages have no thumbnail: their images can't be read"
