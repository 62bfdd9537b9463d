"""The page of a report: one HTML file that contains its style, its script and its pictures."""

from collections.abc import Sequence

from markupsafe import Markup

from doccls.report.content import PageResult, ReportContent
from doccls.report.figures import plot_curves, plot_reliability, plot_resources
from doccls.report.slices import MAX_MEASURED, Slices
from doccls.report.template import describe_thumbnails, render_template
from doccls.report.thumbnails import Thumbnails

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
    reliability = [plot for item in content.reliability for plot in plot_reliability(item)]
    return render_template(
        "report.html.j2",
        styles=("report.css",),
        scripts=("pages.js", "tables.js", "report.js"),
        data=_list_data(content, thumbnails),
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
        max_measured=MAX_MEASURED,
        images_note=images_note,
    )


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


def _list_data(content: ReportContent, thumbnails: Thumbnails | None) -> dict[str, object]:
    """Return what the script reads."""
    return {
        "classes": content.classes,
        "pages": [_describe_page(page) for page in content.pages],
        "mistakes": [page.row for page in content.mistakes],
        **describe_thumbnails(thumbnails),
    }


def _describe_page(page: PageResult) -> list[object]:
    top = [[column, f"{probability:.1%}"] for column, probability in page.top]  # rounded once, here
    return [page.row, page.sample_id, page.fold, page.target, top]
