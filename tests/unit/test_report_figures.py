"""The plots of a report: the same bytes each time, in the colours of the page."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from doccls.report.content import ReportContent, derive_content
from doccls.report.figures import Plot, plot_curves, plot_reliability, plot_resources
from doccls.report.inputs import read_inputs
from doccls.run.metrics_log import EpochMetrics
from tests.unit.report_runs import write_run


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> ReportContent:
    return derive_content(read_inputs(write_run(tmp_path_factory.mktemp("run"))))


def draw(content: ReportContent) -> list[Plot]:
    reliability = [plot for item in content.reliability for plot in plot_reliability(item)]
    return [*reliability, *plot_curves(content.epochs)]


def test_plots_are_the_same_each_time_whatever_the_users_style(
    content: ReportContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    plots = draw(content)
    monkeypatch.setitem(mpl.rcParams, "font.size", 30.0)
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 9.0)
    assert draw(content) == plots and mpl.rcParams["font.size"] == 30
    assert [plot.title for plot in plots[4:]] == [
        "Training loss", "Validation loss", "Macro-F1, clean pages", "Macro-F1, damaged copies",
    ]  # fmt: skip
    assert plots[0].title.startswith("Clean pages, before: ECE 0.") and len(plots) == 8


def test_plots_are_small_svg_without_colours_dates_and_links(content: ReportContent) -> None:
    for plot in draw(content):
        ElementTree.fromstring(plot.svg)
        assert len(plot.svg) < 20_000
        assert not re.search(r"#[0-9a-f]{6}\b|<metadata|<style|<script|font-family|\bdate\b", plot.svg)
        assert "var(--ink)" in plot.svg and ("epoch" in plot.svg or "share that is right" in plot.svg)


def test_description_says_what_the_curve_shows(content: ReportContent) -> None:
    (training, *_) = plot_curves(content.epochs)
    assert training.description == (
        "Training loss from the first to the last epoch: "
        "fold 0: 2.000 to 0.667, fold 1: 2.000 to 0.667, fold 2: 2.000 to 0.667."
    )


def test_values_that_are_missing_leave_gaps(content: ReportContent) -> None:
    epochs = [
        dataclasses.replace(
            epoch, train_loss=None if epoch.epoch == 2 else 1.0, selection_f1=None, macro_f1_damaged=None
        )
        for epoch in content.epochs
    ]
    assert [plot.title for plot in plot_curves(epochs)] == ["Training loss", "Validation loss", "Macro-F1, clean pages"]
    assert plot_curves([]) == ()


def test_restarts_are_marked(content: ReportContent) -> None:
    epochs = [
        dataclasses.replace(epoch, resumed_step=5 if (epoch.fold, epoch.epoch) == (1, 3) else None)
        for epoch in content.epochs
    ]
    plain, marked = plot_curves(content.epochs)[0], plot_curves(epochs)[0]
    assert "fold 1: 2.000 to 0.667 (restarted in epoch 3), fold 2: " in marked.description
    assert marked.svg.count("<use ") == plain.svg.count("<use ") + 1


def test_speed_and_memory_are_plotted_where_they_are_known(content: ReportContent) -> None:
    (memory,) = plot_resources(content.epochs)
    assert memory.title == "Memory of the main process in MiB" and "fold 0: 100 to 100, fold 1" in memory.description
    epochs = [dataclasses.replace(epoch, images_per_s=epoch.epoch * 1e4) for epoch in content.epochs]
    (speed, _) = plot_resources(epochs)
    assert speed.title == "Training images per second" and "fold 2: 10,000 to 30,000." in speed.description
    assert plot_resources([]) == ()


def test_description_names_folds_without_values_and_skips_missing_ends(content: ReportContent) -> None:
    def lose(epoch: EpochMetrics) -> EpochMetrics:
        is_lost = epoch.fold == 1 or (epoch.fold == 2 and epoch.epoch != 2)
        return dataclasses.replace(epoch, train_loss=None) if is_lost else epoch

    (training, *_) = plot_curves([lose(epoch) for epoch in content.epochs])
    assert training.description.endswith("fold 0: 2.000 to 0.667, fold 1: no values, fold 2: 1.000 to 1.000.")
    assert [(series.name, series.number) for series in training.legend] == [("fold 0", 0), ("fold 2", 2)]


def test_each_of_many_folds_has_a_line_of_its_own(content: ReportContent) -> None:
    epochs = [
        dataclasses.replace(epoch, fold=fold) for fold in range(20) for epoch in content.epochs if epoch.fold == 0
    ]
    for plot in plot_curves(epochs):
        assert [series.name for series in plot.legend] == [f"fold {fold}" for fold in range(20)]
        assert len({(series.number, series.dashes) for series in plot.legend}) == 20
        assert not plot.legend[7].dashes and plot.legend[8].dashes
        for series in plot.legend:
            (style,) = re.findall(rf"<path [^>]*fill: none;[^>]*var\(--series-{series.number}\)[^>]*>", plot.svg)[
                int(series.name.split()[1]) // 8 :
            ][:1]
            dashes = re.search(r"stroke-dasharray: ([0-9.,]+)", style)
            assert (dashes[1].replace(",", " ") if dashes else "") == series.dashes
