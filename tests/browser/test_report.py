"""The report in a real browser, used as a person does: with the mouse, and with the keyboard alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import NAMES, Page, browsing, find_chromium

from doccls.report.command import add_arguments, report
from doccls.report.content import PageResult, ReportContent, derive_content
from doccls.report.inputs import read_inputs
from doccls.run.paths import RunPaths
from tests.unit.report_runs import CLASSES, IDS, write_run

HOSTILE = "</script><img src=x onerror=alert(1)>"
Cell = tuple[int, int]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, bool, str], None]) -> Path:
    need(
        "browser", find_chromium() is not None, f"none of {', '.join(NAMES)} is on the PATH (apt-get install chromium)"
    )
    folder = tmp_path_factory.mktemp("report")
    write_run(folder, ids=(HOSTILE, *IDS[1:]), classes=(*CLASSES[:2], HOSTILE, CLASSES[3]))
    return folder


@pytest.fixture(scope="module")
def content(workspace: Path) -> ReportContent:
    (run,) = workspace.glob("experiments/*/*")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert report(parser.parse_args([str(run), "--output", str(workspace / "report.html")])) == 0
    return derive_content(read_inputs(RunPaths(run)))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, content: ReportContent) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(workspace: Path, browser: Page) -> Iterator[Page]:
    """Open the report, and check afterwards that it has asked for nothing and reported no error."""
    browser.show(1280, 800, "light")
    browser.open(workspace / "report.html")
    yield browser
    assert browser.errors == [] and browser.requests == [(workspace / "report.html").as_uri()]
    assert browser.evaluate("document.querySelectorAll('img[src=x]').length") == 0


def list_cell(content: ReportContent, cell: Cell) -> list[PageResult]:
    return [item for item in content.pages if (item.target, item.prediction) == cell]


def read_cards(page: Page, list_id: str) -> list[str]:
    cards: list[str] = page.evaluate(f"[...document.querySelectorAll('#{list_id} .id')].map((e) => e.textContent)")
    return cards


def find_cells(content: ReportContent) -> list[Cell]:
    return [(t, p) for t, row in enumerate(content.confusion_CC) for p, count in enumerate(row) if count]


def test_click_on_a_cell_shows_exactly_its_pages(page: Page, content: ReportContent) -> None:
    cells = find_cells(content)
    assert len(cells) > 5
    for target, prediction in cells:
        page.click(f'[data-cell="{target},{prediction}"]')
        expected = list_cell(content, (target, prediction))
        assert read_cards(page, "pages-list") == [item.sample_id for item in expected]
        status = page.evaluate("document.getElementById('pages-status').textContent")
        assert (
            f"Label {content.classes[target]}, predicted {content.classes[prediction]}: {len(expected)} page" in status
        )
        pressed = page.evaluate("[...document.querySelectorAll('[aria-pressed=true]')].map((e) => e.dataset.cell)")
        assert pressed == [f"{target},{prediction}"]
    shown = page.evaluate("document.querySelector('#pages-list .top').innerText.split(/\\s+/)")
    assert shown == [text for column, p in expected[0].top for text in (*content.classes[column].split(), f"{p:.1%}")]


def test_mistakes_have_thumbnails_the_most_confident_first(page: Page, content: ReportContent) -> None:
    assert read_cards(page, "mistakes-list") == [item.sample_id for item in content.mistakes]
    images = "[...document.querySelectorAll('#mistakes-list img')]"
    widths = page.evaluate(f"Promise.all({images}.map((image) => image.decode().then(() => image.naturalWidth)))")
    named_like_a_file = [item for item in content.mistakes if item.sample_id != HOSTILE]
    assert len(widths) == len(named_like_a_file) and all(width > 20 for width in widths)


def test_table_sorts_by_each_column_in_both_orders(page: Page, content: ReportContent) -> None:
    f1 = [row.metrics.f1 for row in content.class_rows]
    order = sorted(range(len(f1)), key=lambda row: f1[row])
    button, header = "#classes thead th:nth-child(5) button", "#classes thead th:nth-child(5)"
    for direction, expected in (("ascending", order), ("descending", order[::-1])):
        page.click(button)
        rows = page.evaluate("[...document.querySelectorAll('#classes tbody th')].map((e) => e.textContent)")
        assert rows == [content.classes[row] for row in expected]
        assert page.evaluate(f"document.querySelector('{header}').getAttribute('aria-sort')") == direction
        assert page.evaluate("document.querySelectorAll('#classes [aria-sort]').length") == 1


def test_keyboard_reaches_cells_and_sorts(page: Page, content: ReportContent) -> None:
    wanted = find_cells(content)[1]
    focused = "document.activeElement"
    for _ in range(60):
        page.press("Tab")
        if page.evaluate(f"{focused}.dataset.cell") == f"{wanted[0]},{wanted[1]}":
            break
    assert page.evaluate(f"{focused}.dataset.cell") == f"{wanted[0]},{wanted[1]}"
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid", "the focus is visible"
    page.press("Enter")
    assert read_cards(page, "pages-list") == [item.sample_id for item in list_cell(content, wanted)]
    page.evaluate("document.querySelector('#classes thead button').focus()")
    page.press(" ")
    rows = page.evaluate("[...document.querySelectorAll('#classes tbody th')].map((e) => e.textContent)")
    assert rows == list(content.classes)[::-1]


def test_config_is_searched(page: Page) -> None:
    page.click("#config summary")
    page.evaluate("document.getElementById('config-search').focus()")
    page.send("Input.insertText", text="IMAGE_DIR_TRAIN")
    visible = "[...document.querySelectorAll('#config-rows tr')].filter((e) => e.checkVisibility())"
    assert page.evaluate(f"{visible}.map((e) => e.cells[0].textContent)") == ["data.image_dir_train"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [375, 1280])
def test_page_fits_the_window_and_follows_the_readers_setting(page: Page, width_px: int, scheme: str) -> None:
    page.show(width_px, 800, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = [int(part) for part in background[4:-1].split(",")]
    assert (min(brightness) > 200) if scheme == "light" else (max(brightness) < 60)
