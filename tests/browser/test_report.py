"""The report in a real browser, used as a person does: with the mouse, and with the keyboard alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chromium import NAMES, Page, browsing, find_chromium

from doccls.report.command import add_arguments, report
from doccls.report.content import PageResult, ReportContent, count_confusion, derive_content
from doccls.report.inputs import read_inputs
from doccls.report.page import render_page
from doccls.run.paths import RunPaths
from tests.unit.report_runs import CLASSES, IDS, write_run

HOSTILE = "</script><img src=x onerror=alert(1)>"
HEBREW = "\u05d7\u05e9\u05d1\u05d5\u05e0\u05d9\u05ea (1"
FOCUSED = "document.activeElement"
Cell = tuple[int, int]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, bool, str], None]) -> Path:
    need(
        "browser", find_chromium() is not None, f"none of {', '.join(NAMES)} is on the PATH (apt-get install chromium)"
    )
    folder = tmp_path_factory.mktemp("report")
    write_run(folder, ids=(HOSTILE, *IDS[1:]), classes=(CLASSES[0], HEBREW, HOSTILE, CLASSES[3]))
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


def test_keyboard_sorts(page: Page, content: ReportContent) -> None:
    page.evaluate("document.querySelector('#classes thead button').focus()")
    page.press(" ")
    rows = page.evaluate("[...document.querySelectorAll('#classes tbody th')].map((e) => e.textContent)")
    assert rows == list(content.classes)[::-1]


def focused_cell(page: Page) -> str | None:
    cell: str | None = page.evaluate(f"{FOCUSED}.dataset.cell ?? null")
    return cell


def tab_to_cells(page: Page) -> None:
    """Press Tab until a cell has the focus."""
    for _ in range(30):
        page.press("Tab")
        if focused_cell(page) is not None:
            return
    raise AssertionError("Tab reaches no cell")


@pytest.mark.parametrize("key", ["Enter", " "])
def test_keyboard_goes_from_a_cell_to_its_pages_and_back(page: Page, content: ReportContent, key: str) -> None:
    tab_to_cells(page)
    page.press("Home", is_control_down=True)
    first, second = find_cells(content)[:2]
    assert focused_cell(page) == f"{first[0]},{first[1]}"
    page.press("ArrowRight")
    assert focused_cell(page) == f"{second[0]},{second[1]}"
    assert page.evaluate(f"getComputedStyle({FOCUSED}).outlineStyle") == "solid", "the focus is visible"
    page.press(key)
    assert read_cards(page, "pages-list") == [item.sample_id for item in list_cell(content, second)]
    assert page.evaluate(f"{FOCUSED}.id") == "pages"
    for way_back in ("Escape", "Enter"):  # the latter on the button
        page.press("Tab")
        assert page.evaluate(f"{FOCUSED}.id") == "pages-back", "the next Tab stays in the pages"
        page.press(way_back)
        assert focused_cell(page) == f"{second[0]},{second[1]}"
        page.press("Tab")
        assert page.evaluate(f"{FOCUSED}.id") == "pages", "all cells are one stop"


def test_arrows_move_between_the_numbers(page: Page, content: ReportContent) -> None:
    cells = find_cells(content)
    rows = [[cell for cell in cells if cell[0] == target] for target in sorted({target for target, _ in cells})]
    tab_to_cells(page)

    def press(key: str, is_control_down: bool = False) -> Cell:
        page.press(key, is_control_down)
        target, prediction = str(focused_cell(page)).split(",")
        assert page.evaluate("[...document.querySelectorAll('[data-cell][tabindex=\"0\"]')].length") == 1
        return int(target), int(prediction)

    assert press("Home", is_control_down=True) == cells[0]
    assert press("ArrowLeft") == press("ArrowUp") == cells[0], "the first one"
    assert [press("ArrowRight") for _ in rows[0]] == [*rows[0][1:], rows[0][-1]]
    assert press("Home") == cells[0] and press("End") == rows[0][-1]
    cell = rows[0][-1]
    for row in rows[1:]:
        nearest = min(row, key=lambda other: abs(other[1] - cell[1]))
        assert press("ArrowDown") == nearest
        cell = nearest
    assert press("End", is_control_down=True) == cells[-1] == press("ArrowDown")


def test_click_moves_nothing_beside_the_pages_and_shows_them_below(page: Page, content: ReportContent) -> None:
    cells = [f'[data-cell="{target},{prediction}"]' for target, prediction in find_cells(content)]
    page.show(1280, 300, "light")
    for cell in cells:
        page.evaluate(f"document.querySelector({json.dumps(cell)}).scrollIntoView({{ block: 'center' }})")
        before = page.evaluate("scrollY")
        page.click(cell)
        assert page.evaluate("scrollY") == before > 0
        assert f'[data-cell="{focused_cell(page)}"]' == cell
    page.show(375, 500, "light")
    page.click(cells[0])
    top = page.evaluate("document.getElementById('pages-status').getBoundingClientRect().top")
    assert 0 <= top < 200


def test_labels_of_the_other_direction_stay_in_place(page: Page, content: ReportContent) -> None:
    row, column = next((t, p) for t, p in find_cells(content) if t == 1 and p not in (1, 2))
    cell = f'[data-cell="{row},{column}"]'
    page.click(cell)
    status = "document.getElementById('pages-status')"
    assert page.evaluate(f"{status}.textContent").startswith(f"Label {HEBREW}, predicted {CLASSES[column]}: ")
    # From left to right: the words before the label, the label, the words after it.
    lefts = page.evaluate(
        f"[...{status}.childNodes].map((node) => {{"
        "const range = document.createRange(); range.selectNodeContents(node);"
        "return Math.min(...[...range.getClientRects()].filter((r) => r.width > 3).map((r) => r.left)); })"
    )
    assert len(lefts) == 5 and lefts == sorted(lefts)
    isolated = "bdi, code, [data-cell], figure *, title, script, style, template"
    plain = page.evaluate(
        "(() => { const found = []; const walker = document.createTreeWalker(document, NodeFilter.SHOW_TEXT);"
        "for (let node; (node = walker.nextNode()); )"
        f"if (/[\\u0590-\\u05ff]/.test(node.data) && !node.parentElement.closest('{isolated}')) found.push(node.data);"
        "return found; })()"
    )
    assert plain == []
    label = page.evaluate(f"document.querySelector('{cell}').getAttribute('aria-label')")
    assert label.endswith(f": label \u2068{HEBREW}\u2069, predicted \u2068{CLASSES[column]}\u2069")
    assert label.split(" ")[1] in ("page:", "pages:") and label.split(" ")[0] == page.evaluate(
        f"document.querySelector('{cell}').textContent"
    )


def write_large(content: ReportContent, num_classes: int, file: Path) -> None:
    """Write a report on classes with long names, of which each page is also taken for its neighbours."""
    classes = tuple(f"Type {number}: scanned letters with a long name" for number in range(num_classes))
    pages = tuple(
        PageResult(row, f"page{row}", 0, target, ((column, 0.5), (target, 0.25)))
        for row, (target, column) in enumerate(
            (target, (target + step) % num_classes) for target in range(num_classes) for step in range(3)
        )
    )
    large = replace(
        content, classes=classes, pages=pages, confusion_CC=count_confusion(pages, num_classes), mistakes=()
    )
    file.write_text(render_page(large, None), encoding="utf-8")


@pytest.mark.parametrize("width_px", [375, 1280])
@pytest.mark.parametrize("num_classes", [60, 70])
def test_focused_cells_of_many_classes_are_in_sight(
    workspace: Path, browser: Page, content: ReportContent, num_classes: int, width_px: int
) -> None:
    file = workspace / "large.html"
    write_large(content, num_classes, file)
    browser.show(width_px, 800, "light")
    browser.open(file)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width_px
    tab_to_cells(browser)
    is_covered = (
        f"(() => {{ const r = {FOCUSED}.getBoundingClientRect();"
        f"return document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2) !== {FOCUSED}; }})()"
    )
    visited = set()
    back = [("End", True), *[("ArrowUp", False), ("Home", False), ("ArrowUp", False), ("End", False)] * 5]
    forth = [("Home", True), *[("ArrowDown", False), ("ArrowRight", False)] * 12]
    for key, is_control_down in [*back, *forth]:
        browser.press(key, is_control_down)
        visited.add(focused_cell(browser))
        assert not browser.evaluate(is_covered), focused_cell(browser)
    assert len(visited) > 12
    # Back from the pages, a cell that was scrolled away is in sight again.
    browser.press("Home", is_control_down=True)
    cell = focused_cell(browser)
    browser.press("Enter")
    assert browser.evaluate("document.querySelectorAll('#pages-list > li').length") == 1
    browser.evaluate("document.querySelector('.matrix-box').scrollTo(9999, 9999)")
    browser.press("Escape")
    assert focused_cell(browser) == cell and not browser.evaluate(is_covered)
    assert browser.errors == []


def test_many_classes_without_confusions_leave_the_list_out(
    workspace: Path, browser: Page, content: ReportContent
) -> None:
    pages = tuple(PageResult(row, f"page{row}", 0, row, ((row, 0.9),)) for row in range(70))
    classes = tuple(map(str, range(70)))
    perfect = replace(content, classes=classes, pages=pages, confusion_CC=count_confusion(pages, 70), mistakes=())
    file = workspace / "perfect.html"
    file.write_text(render_page(perfect, None), encoding="utf-8")
    browser.open(file)
    text = browser.evaluate("document.getElementById('confusion').innerText")
    assert text.split("\n")[-1] == "No confusions: every prediction matches its label." and browser.errors == []


def test_config_is_searched(page: Page) -> None:
    page.click("#config summary")
    page.evaluate("document.getElementById('config-search').focus()")
    page.send("Input.insertText", text="IMAGE_DIR_TRAIN")
    visible = "[...document.querySelectorAll('#config-rows > div')].filter((e) => e.checkVisibility())"
    assert page.evaluate(f"{visible}.map((e) => e.firstElementChild.textContent)") == ["data.image_dir_train"]
    page.send("Input.insertText", text="?")
    assert page.evaluate("document.getElementById('config-status').textContent") == "nothing found"


@pytest.mark.parametrize("width_px", [375, 1280])
def test_config_is_not_cut_off(page: Page, width_px: int) -> None:
    page.show(width_px, 800, "light")
    page.click("#config summary")
    cut = page.evaluate(
        "[...document.querySelectorAll('#config-rows, #config-rows *')].filter((e) => e.checkVisibility() && "
        "(e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline' || "
        "e.getBoundingClientRect().right > innerWidth)).map((e) => e.textContent)"
    )
    assert cut == []
    below, beside = page.evaluate(
        "(() => { const [key, value] = [...document.querySelector('#config-rows div').children]"
        ".map((e) => e.getBoundingClientRect()); return [value.top >= key.bottom, value.left >= key.right]; })()"
    )
    assert (below, beside) == (width_px < 640, width_px >= 640)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [375, 1280])
def test_page_fits_the_window_and_follows_the_readers_setting(page: Page, width_px: int, scheme: str) -> None:
    page.show(width_px, 800, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = [int(part) for part in background[4:-1].split(",")]
    assert (min(brightness) > 200) if scheme == "light" else (max(brightness) < 60)


def test_print_is_light_whatever_the_readers_setting(page: Page) -> None:
    names = ["page", "surface", "ink", "hit", "miss", "paper", *(f"series-{number}" for number in range(8))]
    read = f"{json.dumps(names)}.map((name) => getComputedStyle(document.body).getPropertyValue(`--${{name}}`))"
    printed = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.send("Emulation.setEmulatedMedia", media="print", features=features)
        printed[scheme] = page.evaluate(read)
    page.send("Emulation.setEmulatedMedia", media="", features=features)
    assert printed["light"] == printed["dark"] != page.evaluate(read)
