"""The page of a report: one HTML file that contains its style, its script and its pictures."""

import json
from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup

from doccls.report.content import PageResult, ReportContent
from doccls.report.figures import plot_curves, plot_reliability, plot_resources
from doccls.report.slices import Slices
from doccls.report.thumbnails import MEDIA_TYPE, Thumbnails

_MAX_MATRIX_CLASSES = 60
_MAX_CONFUSIONS = 200
_LONG_LABEL = 4  # characters; longer labels of columns are turned
_LEVELS = 8  # of colour in the confusion matrix


def render_page(
    content: ReportContent, thumbnails: Thumbnails | None, slices: Slices | None = None, images_note: str | None = None
) -> str:
    """Render the page; equal content gives equal text. `thumbnails` and `slices` are None if none are to be shown.

    `images_note` says why pages have no thumbnails, if that is not the user's wish.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = lambda value: f"{value:.3f}"
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    reliability = [plot for item in content.reliability for plot in plot_reliability(item)]
    return environment.get_template("report.html.j2").render(
        content=content,
        summary=content.summary,
        has_matrix=len(content.classes) <= _MAX_MATRIX_CLASSES,
        long_labels=max(map(len, content.classes)) > _LONG_LABEL,
        confusions=_list_confusions(content.confusion_CC),
        levels=_list_levels(content.confusion_CC) if len(content.classes) <= _MAX_MATRIX_CLASSES else [],
        reliability_plots=[(plot, Markup(plot.svg)) for plot in reliability],
        curve_plots=[(plot, Markup(plot.svg)) for plot in plot_curves(content.epochs)],
        resource_plots=[(plot, Markup(plot.svg)) for plot in plot_resources(content.epochs)],
        has_restarts=any(epoch.resumed_step is not None for epoch in content.epochs),
        thumbnails=thumbnails,
        slices=slices if slices is not None and slices.properties else None,
        images_note=images_note,
        data=Markup(_render_data(content, thumbnails)),
        style=Markup(_read_file("report.css")),
        script=Markup(_read_file("report.js")),
    )


def _read_file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _list_levels(confusion_CC: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return how dark each cell of the confusion matrix is, by its share of the row: 0 (empty) to _LEVELS."""
    totals = [max(1, sum(row)) for row in confusion_CC]
    return [[-(-_LEVELS * count // total) for count in row] for row, total in zip(confusion_CC, totals, strict=True)]


def _list_confusions(confusion_CC: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Return label, prediction and number of pages of the most frequent confusions, the most frequent first."""
    cells = [
        (target, column, count)
        for target, row in enumerate(confusion_CC)
        for column, count in enumerate(row)
        if count and column != target
    ]
    return sorted(cells, key=lambda cell: (-cell[2], *cell))[:_MAX_CONFUSIONS]


def _render_data(content: ReportContent, thumbnails: Thumbnails | None) -> str:
    """Return what the script reads, as JSON in which nothing can end the script element."""
    pictures = {} if thumbnails is None else thumbnails.content
    data = {
        "classes": content.classes,
        "pages": [_describe_page(page) for page in content.pages],
        "mistakes": [page.row for page in content.mistakes],
        "media_type": MEDIA_TYPE,
        "thumbnails": pictures,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _describe_page(page: PageResult) -> list[object]:
    top = [[column, f"{probability:.1%}"] for column, probability in page.top]  # rounded once, here
    return [page.row, page.sample_id, page.fold, page.target, top]
