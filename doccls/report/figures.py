"""The plots of a report, as SVG for the page: equal values give equal text, and the page's style gives the colours."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from doccls.report.confidence import Reliability, ReliabilityBins
from doccls.report.plotting import Axes, Figure, MaxNLocator, mpl
from doccls.run.metrics_log import EpochMetrics

_SIZE_INCHES = (3.6, 2.5)
_NUM_SERIES = 8
_Curve = tuple[str, Callable[[EpochMetrics], float | None]]  # title, and the value of an epoch
_LINE_WIDTH = 1.5
# Lengths of dashes and gaps. Each round through the colours has a pattern of its own, so 32 curves differ.
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
# Each colour stands for a variable of the page's style, so that plots follow the light or dark theme.
_INK, _FAINT, _GRID, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_SERIES = tuple(f"#0505{number:02x}" for number in range(_NUM_SERIES))
_VARIABLES = {_INK: "ink", _FAINT: "faint", _GRID: "line", _ACCENT: "accent"} | {
    colour: f"series-{number}" for number, colour in enumerate(_SERIES)
}
_STYLE: dict[Any, Any] = {  # Matplotlib's types list every key, and differ between its versions
    "svg.fonttype": "none",  # text stays text, which is small, and can be selected and read aloud
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": _LINE_WIDTH,
    "lines.scale_dashes": False,  # so that the lengths are those of the legend
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Series:
    """A curve of a plot, as its legend shows it."""

    name: str
    number: int  # of its colour in the page's style
    dashes: str  # lengths of dashes and gaps, as in SVG's `stroke-dasharray`; empty for a solid line


@dataclass(frozen=True)
class Plot:
    """A plot, and its content in words."""

    title: str
    description: str  # for those who can't see it
    svg: str
    legend: tuple[Series, ...] = ()


def plot_reliability(reliability: Reliability) -> tuple[Plot, Plot]:
    """Plot the reliability diagram of the probabilities before and after calibration."""
    figures = reliability.calibration
    pages = "clean pages" if reliability.name == "clean" else "damaged copies"
    return (
        _plot_bins(reliability.before, f"{pages.capitalize()}, before", figures.ece),
        _plot_bins(reliability.after, f"{pages.capitalize()}, after", figures.ece_calibrated),
    )


def _plot_bins(bins: ReliabilityBins, title: str, ece: float) -> Plot:
    with _drawing(title) as (axes, render):
        axes.plot((0, 1), (0, 1), color=_FAINT, linewidth=1, linestyle="--")
        axes.vlines(bins.confidence_B, bins.confidence_B, bins.accuracy_B, color=_ACCENT, alpha=0.45, linewidth=3)
        areas = 8 + 150 * bins.count_B / bins.count_B.max()
        axes.scatter(
            bins.confidence_B, bins.accuracy_B, areas, color=_ACCENT, alpha=0.85, linewidth=0, zorder=3, clip_on=False
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the predicted class", ylabel="share that is right")
        svg = render()
    listed = ", ".join(
        f"{confidence:.0%}: {accuracy:.0%} of {count}"
        for confidence, accuracy, count in zip(bins.confidence_B, bins.accuracy_B, bins.count_B, strict=True)
    )
    return Plot(
        f"{title}: ECE {ece:.3f}", f"Probability of the predicted class, and the share that is right: {listed}.", svg
    )


def plot_curves(epochs: Sequence[EpochMetrics]) -> tuple[Plot, ...]:
    """Plot the learning curves of each fold: losses and scores over epochs; curves without values are left out."""
    curves: tuple[_Curve, ...] = (
        ("Training loss", lambda epoch: epoch.train_loss),
        ("Validation loss", lambda epoch: epoch.valid_loss),
        ("Macro-F1, clean pages", lambda epoch: epoch.macro_f1),
        ("Macro-F1, damaged copies", lambda epoch: epoch.macro_f1_damaged),
    )
    return _plot_known(curves, epochs, marks_best=True)


def plot_resources(epochs: Sequence[EpochMetrics]) -> tuple[Plot, ...]:
    """Plot the speed and the memory of each fold over epochs; curves without values are left out."""
    curves: tuple[_Curve, ...] = (
        ("Training images per second", lambda epoch: epoch.images_per_s),
        ("Memory of the main process in MiB", lambda epoch: epoch.mem_MiB),
    )
    return _plot_known(curves, epochs, marks_best=False)


def _plot_known(curves: Sequence[_Curve], epochs: Sequence[EpochMetrics], marks_best: bool) -> tuple[Plot, ...]:
    known = [(title, read) for title, read in curves if any(read(epoch) is not None for epoch in epochs)]
    return tuple(_plot_curve(title, read, epochs, marks_best) for title, read in known)


def _plot_curve(
    title: str, read: Callable[[EpochMetrics], float | None], epochs: Sequence[EpochMetrics], marks_best: bool
) -> Plot:
    said, legend = [], []
    with _drawing(title) as (axes, render):
        for number, (fold, group) in enumerate(groupby(epochs, key=lambda epoch: epoch.fold)):
            rows = list(group)
            values = np.array([np.nan if (value := read(row)) is None else value for row in rows], dtype=np.float64)
            known = values[np.isfinite(values)]
            if not len(known):
                said.append(f"fold {fold}: no values")
                continue
            said.append(f"fold {fold}: {_format(known[0])} to {_format(known[-1])}{_list_restarts(rows)}")
            cycle, place = divmod(number, _NUM_SERIES)
            colour, dashes = _SERIES[place], _DASHES[cycle % len(_DASHES)]
            axes.plot([row.epoch for row in rows], values, color=colour, linestyle=(0, dashes) if dashes else "-")
            best = _find_best(rows) if marks_best else None
            if best is not None:
                axes.plot(rows[best].epoch, values[best], "o", color=colour, markersize=5)
            resumed = [index for index, row in enumerate(rows) if row.resumed_step is not None]
            axes.plot([rows[index].epoch for index in resumed], values[resumed], "^", color=colour, markersize=5)
            legend.append(Series(f"fold {fold}", place, " ".join(f"{length:g}" for length in dashes)))
        axes.set(xlabel="epoch")
        if not marks_best:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        svg = render()
    return Plot(title, f"{title} from the first to the last epoch: {', '.join(said)}.", svg, tuple(legend))


def _format(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def _list_restarts(rows: Sequence[EpochMetrics]) -> str:
    epochs = [str(row.epoch) for row in rows if row.resumed_step is not None]
    return f" (restarted in epoch {' and '.join(epochs)})" if epochs else ""


def _find_best(rows: Sequence[EpochMetrics]) -> int | None:
    """Return the position of the epoch that was kept, the later one of equals; None in logs of earlier versions."""
    scores = [row.selection_f1 for row in rows]
    if any(score is None for score in scores):
        return None
    return max(range(len(rows)), key=lambda place: (scores[place], place))


@contextmanager
def _drawing(salt: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Yield the axes of an empty plot, and a function that returns the plot as SVG.

    The IDs of markers and clip paths in it depend on the salt; it must differ between the plots of a page.
    """
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc changes nothing
        mpl.rcParams.update(_STYLE | {"svg.hashsalt": salt})
        figure = Figure(figsize=_SIZE_INCHES)
        yield figure.add_subplot(), lambda: _render(figure)


def _render(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style).*?</\1>\s*", "", svg, flags=re.DOTALL)  # the style of lines is in report.css
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # they repeat in each plot, and nothing refers to them
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    # The family of fonts is that of the page; Matplotlib states it in one property or in two.
    svg = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return re.sub("|".join(_VARIABLES), lambda match: f"var(--{_VARIABLES[match[0]]})", svg)
