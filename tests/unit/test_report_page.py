"""The page of a report: self-contained, always the same, and with everything escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from doccls.report.content import ReportContent, derive_content
from doccls.report.inputs import read_inputs
from doccls.report.page import render_page
from doccls.report.thumbnails import Thumbnails, collect_thumbnails
from tests.unit.report_runs import CLASSES, COUNT, IDS, write_run

HOSTILE = "</script><img src=x onerror=alert(1)>"
PICTURES = Thumbnails({0: "QUJD", 1: "REVG"}, 0, 0)


class Elements(HTMLParser):
    """Records all elements with their attributes, and the text of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> ReportContent:
    return derive_content(read_inputs(write_run(tmp_path_factory.mktemp("run"))))


def test_page_is_the_same_each_time(content: ReportContent) -> None:
    assert render_page(content, PICTURES) == render_page(content, PICTURES)


def test_page_needs_nothing_else(content: ReportContent) -> None:
    html = render_page(content, PICTURES)
    elements = Elements(html).found
    assert {"link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in elements)
    for _, attributes in elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), "an inline event handler"
            assert name not in ("src", "srcset") and (
                name not in ("href", "xlink:href") or (value or "").startswith("#")
            )
    assert "url(" not in html.replace("url(#", "") and "@import" not in html
    assert "default-src 'none'" in html


def test_each_confusion_is_a_button(content: ReportContent) -> None:
    found = Elements(render_page(content, None)).found
    cells = {attributes["data-cell"] for tag, attributes in found if tag == "button" and "data-cell" in attributes}
    assert cells == {f"{t},{p}" for t, row in enumerate(content.confusion_CC) for p, count in enumerate(row) if count}


def test_data_holds_each_page_and_each_thumbnail_once(content: ReportContent) -> None:
    html = render_page(content, PICTURES)
    data = json.loads(Elements(html).scripts[0])
    assert sorted(page[0] for page in data["pages"]) == list(range(COUNT)) and data["classes"] == list(CLASSES)
    assert data["thumbnails"] == {"0": "QUJD", "1": "REVG"} and html.count("QUJD") == 1
    assert data["mistakes"] == [page.row for page in content.mistakes]
    assert {page[1] for page in data["pages"]} == set(IDS)
    shown = {page[0]: page[4] for page in data["pages"]}
    for page in content.pages:
        assert shown[page.row] == [[column, f"{probability:.1%}"] for column, probability in page.top]


def test_element_ids_are_unique(content: ReportContent) -> None:
    elements = Elements(render_page(content, PICTURES)).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(set(ids)) == len(ids) > 30
    used = {str(attributes["href"])[1:] for _, attributes in elements if "href" in attributes}
    assert used <= set(ids)


def test_hostile_ids_labels_and_settings_are_escaped(tmp_path: Path) -> None:
    paths = write_run(tmp_path, ids=(HOSTILE, *IDS[1:]), classes=(*CLASSES[:3], HOSTILE))
    text = paths.snapshot.read_text(encoding="utf-8")
    paths.snapshot.write_text(text.replace("run_id: tiny0", f"run_id: {json.dumps(HOSTILE)}"), encoding="utf-8")
    content = derive_content(read_inputs(paths))
    html = render_page(content, None, images_note=HOSTILE)
    assert HOSTILE not in html and "<img" not in html
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in html
    elements = Elements(html)
    assert [tag for tag, _ in elements.found].count("script") == 2
    data = json.loads(elements.scripts[0])
    assert HOSTILE in {page[1] for page in data["pages"]} and HOSTILE in data["classes"]


def test_page_says_which_pages_have_thumbnails(content: ReportContent) -> None:
    assert "Thumbnails are shown for" not in render_page(content, PICTURES)
    html = render_page(content, Thumbnails({0: "QUJD"}, 0, COUNT - 1))
    assert f"Thumbnails are shown for 1 of {COUNT} pages" in html
    assert "3 pages have no thumbnail" in render_page(content, PICTURES, images_note="3 pages have no thumbnail")


def test_page_of_1500_pages_is_below_5_mb(content: ReportContent) -> None:
    budget = collect_thumbnails.__defaults__[0]  # type: ignore[index]
    html = render_page(content, Thumbnails({0: "x" * budget}, 0, 0))
    per_page = len(json.dumps([99_999, "0123456789abcdef.jpg", 4, 16, [[16, "12.3%"]] * 3], separators=(",", ":")))
    assert len(html) + 1500 * per_page < 5_000_000


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    html = render_page(derive_content(read_inputs(write_run(tmp_path, is_damaged=False))), None)
    assert "Damaged copies" not in html and 'id="curves"' in html and 'id="config"' in html


def test_many_classes_give_a_list_of_confusions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doccls.report.page._MAX_MATRIX_CLASSES", 3)
    content = derive_content(read_inputs(write_run(tmp_path)))
    html = render_page(content, None)
    counts = [int(count) for count in re.findall(r'data-cell="[^>]*>(\d+)<', html)]
    assert counts == sorted(counts, reverse=True) and sum(counts) == content.num_mistakes
