"""The page of a comparison: one HTML file that contains its style, its script and its pictures."""

from collections.abc import Sequence

from doccls.oof.bootstrap import LEVEL, RESAMPLES
from doccls.report.comparison import Comparison, Difference, Pair
from doccls.report.cost import Cost
from doccls.report.template import describe_thumbnails, render_template
from doccls.report.thumbnails import Thumbnails
from doccls.system.disk import format_size

_LEVELS = 8  # of colour in the table of outcomes


def render_comparison(comparison: Comparison, thumbnails: Thumbnails | None, images_note: str | None = None) -> str:
    """Render the page; equal content gives equal text. `thumbnails` is None if none are to be shown.

    `images_note` says why pages have no thumbnails, if that is not the user's wish.
    """
    differences = [scores for pair in comparison.pairs for scores in pair.differences]
    return render_template(
        "compare.html.j2",
        styles=("report.css", "compare.css"),
        scripts=("pages.js", "tables.js", "compare.js"),
        data=_list_data(comparison, thumbnails),
        comparison=comparison,
        first=comparison.runs[0],
        largest=max(row.largest for row in comparison.class_rows) or 1.0,
        order={label: number for number, label in enumerate(comparison.classes)},
        names={run.letter: run.content.run_id for run in comparison.runs},
        interval=f"{LEVEL:.0%}",
        num_resamples=RESAMPLES,
        scale=_find_scale([scores.macro_f1 for scores in differences]),
        levels={pair.letter: _list_levels(pair) for pair in comparison.pairs},
        cost_rows=list_cost_rows([run.cost for run in comparison.runs]),
        thumbnails=thumbnails,
        images_note=images_note,
    )


def _find_scale(differences: Sequence[Difference]) -> float:
    """Return the difference at the ends of all drawn intervals, so that they can be compared by eye."""
    largest = max(max(abs(difference.low), abs(difference.high)) for difference in differences)
    return next((scale for scale in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if scale >= largest), 1.0)


def _list_levels(pair: Pair) -> list[int]:
    """Return how dark each cell of the outcomes is, by its share of all pages: 0 (empty) to _LEVELS."""
    counts = [len(rows) for rows in pair.outcomes]
    return [-(-_LEVELS * count // max(1, sum(counts))) for count in counts]


def list_cost_rows(costs: Sequence[Cost]) -> list[tuple[str, list[str]]]:
    """Format each figure of the costs, for each run in turn; empty where it is not recorded."""
    columns: list[list[tuple[str, str]]] = [
        [
            ("Folds", str(len(cost.num_epochs) or "")),
            ("Epochs per fold", _format_range([str(number) for number in sorted(cost.num_epochs)])),
            ("Training time, all folds", _format_time(sum(cost.fold_times_s))),
            ("Training time per fold", _format_range([_format_time(time_s) for time_s in sorted(cost.fold_times_s)])),
            ("Peak memory", "" if cost.peak_mem_MiB is None else f"{cost.peak_mem_MiB:,.0f} MiB"),
            ("Devices", ", ".join(cost.devices)),
            ("Processes per fold", " or ".join(map(str, cost.world_sizes))),
            ("Weights on disk", _format_weights(cost)),
        ]
        for cost in costs
    ]
    rows = [(cells[0][0], [text for _, text in cells]) for cells in zip(*columns, strict=True)]
    return [(name, texts) for name, texts in rows if any(texts)]


def _format_weights(cost: Cost) -> str:
    if not cost.num_weights:
        return ""
    return f"{format_size(cost.weights_bytes)} in {cost.num_weights} file{'s' * (cost.num_weights > 1)}"


def _format_range(texts: Sequence[str]) -> str:
    """Return the first and the last text, or the one if they are equal."""
    return " to ".join(dict.fromkeys((texts[0], texts[-1]))) if texts else ""


def _format_time(seconds: float) -> str:
    if not seconds:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _list_data(comparison: Comparison, thumbnails: Thumbnails | None) -> dict[str, object]:
    """Return what the script reads."""
    return {
        "classes": comparison.classes,
        "letters": [run.letter for run in comparison.runs],
        "pages": [
            [page.row, page.sample_id, page.target, [[column, f"{prob:.1%}"] for column, prob in page.predictions]]
            for page in comparison.pages
        ],
        "outcomes": {pair.letter: pair.outcomes for pair in comparison.pairs},
        **describe_thumbnails(thumbnails),
    }
