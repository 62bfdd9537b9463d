"""The comparison of runs in a real browser, used as a person does: with the mouse, and with the keyboard alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import NAMES, Page, browsing, find_chromium

from doccls.report.command import add_arguments, report
from doccls.report.comparison import Comparison, RunRecord, derive_comparison
from doccls.report.cost import read_cost
from doccls.report.inputs import read_inputs
from tests.unit.report_runs import CLASSES, IDS, write_run

HOSTILE = "</script><img src=x onerror=alert(1)>"
RIGHT_TO_LEFT = "\u05d3\u05e3 1 (a).jpg"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, bool, str], None]) -> Path:
    need(
        "browser", find_chromium() is not None, f"none of {', '.join(NAMES)} is on the PATH (apt-get install chromium)"
    )
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def comparison(workspace: Path) -> Comparison:
    ids, classes = (HOSTILE, RIGHT_TO_LEFT, *IDS[2:]), (*CLASSES[:2], HOSTILE, CLASSES[3])
    runs = [write_run(workspace, ids=ids, classes=classes, seed=seed) for seed in (1, 2, 3)]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [*(str(paths.root) for paths in runs), "--output", str(workspace / "compare.html")]
    assert report(parser.parse_args(words)) == 0
    return derive_comparison([RunRecord(inputs, read_cost(inputs), "1") for inputs in map(read_inputs, runs)])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, comparison: Comparison) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(workspace: Path, browser: Page) -> Iterator[Page]:
    """Open the comparison, and check afterwards that it has asked for nothing and reported no error."""
    browser.show(1280, 800, "light")
    browser.open(workspace / "compare.html")
    yield browser
    assert browser.errors == [] and browser.requests == [(workspace / "compare.html").as_uri()]
    assert browser.evaluate("document.querySelectorAll('img[src=x]').length") == 0


def list_ids(comparison: Comparison, number: int, outcome: int) -> list[str]:
    ids = {item.row: item.sample_id for item in comparison.pages}
    return [ids[row] for row in comparison.pairs[number].outcomes[outcome]]


def read_cards(page: Page) -> list[str]:
    cards: list[str] = page.evaluate("[...document.querySelectorAll('#pages-list .id')].map((e) => e.textContent)")
    return cards


def test_click_on_a_number_shows_exactly_its_pages(page: Page, comparison: Comparison) -> None:
    seen: list[str] = []
    for number, pair in enumerate(comparison.pairs):
        for outcome, rows in enumerate(pair.outcomes):
            page.click(f'[data-cell="{pair.letter},{outcome}"]')
            assert read_cards(page) == list_ids(comparison, number, outcome)
            status = page.evaluate("document.getElementById('pages-status').textContent")
            assert status.startswith(f"A and {pair.letter}: ") and f": {len(rows)} page" in status
            pressed = page.evaluate("[...document.querySelectorAll('[aria-pressed=true]')].map((e) => e.dataset.cell)")
            assert pressed == [f"{pair.letter},{outcome}"]
            seen += read_cards(page)
    assert sorted(seen) == sorted(2 * [item.sample_id for item in comparison.pages])
    last = next(item for item in comparison.pages if item.row == rows[0])
    shown = page.evaluate("document.querySelector('#pages-list .top').innerText.split(/\\s+/)")
    expected = [
        (letter, *comparison.classes[column].split(), f"{prob:.1%}")
        for letter, (column, prob) in zip("ABC", last.predictions, strict=True)
    ]
    assert shown == [text for texts in expected for text in texts]


def test_pages_have_thumbnails(page: Page) -> None:
    images = "[...document.querySelectorAll('#pages-list img')]"
    widths = page.evaluate(f"Promise.all({images}.map((image) => image.decode().then(() => image.naturalWidth)))")
    named_like_a_file = [name for name in read_cards(page) if name not in (HOSTILE, RIGHT_TO_LEFT)]
    assert len(widths) == len(named_like_a_file) > 0 and all(width > 20 for width in widths)


def test_keyboard_reaches_numbers_and_sorts(page: Page, comparison: Comparison) -> None:
    focused, wanted = "document.activeElement", "C,1"
    for _ in range(40):
        page.press("Tab")
        if page.evaluate(f"{focused}.dataset.cell") == wanted:
            break
    assert page.evaluate(f"{focused}.dataset.cell") == wanted
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid", "the focus is visible"
    page.press("Enter")
    assert read_cards(page) == list_ids(comparison, 1, 1)
    assert page.evaluate(f"{focused}.id") == "pages", "the next Tab is in the pages"
    page.press("Escape")
    assert page.evaluate(f"{focused}.dataset.cell") == wanted
    classes = "[...document.querySelectorAll('#classes tbody th')].map((e) => e.textContent)"
    assert page.evaluate(classes) == [row.label for row in comparison.class_rows]
    page.evaluate("document.querySelector('#classes thead th:nth-child(6) button').focus()")
    page.press(" ")
    by_difference = sorted(comparison.class_rows, key=lambda row: row.differences[0])
    assert page.evaluate(classes) == [row.label for row in by_difference]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [375, 1280])
def test_page_fits_the_window_and_follows_the_readers_setting(page: Page, width_px: int, scheme: str) -> None:
    page.show(width_px, 800, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = [int(part) for part in background[4:-1].split(",")]
    assert (min(brightness) > 200) if scheme == "light" else (max(brightness) < 60)
