"""The page of a comparison: self-contained, always the same, and with everything escaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from doccls.report.comparison import Comparison, RunRecord, derive_comparison
from doccls.report.comparison_page import render_comparison
from doccls.report.cost import Cost
from doccls.report.inputs import ReportInputs, read_inputs
from doccls.report.thumbnails import Thumbnails
from tests.unit.report_runs import CLASSES, COUNT, IDS, write_run
from tests.unit.test_report_page import HOSTILE, PICTURES, Elements

COST = Cost((3, 3), (60.0, 60.0), 500.0, ("cpu",), (1,), 1000, 2)


def compare(*runs: ReportInputs) -> Comparison:
    return derive_comparison([RunRecord(inputs, COST, "1") for inputs in runs])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[ReportInputs]:
    folder = tmp_path_factory.mktemp("runs")
    return [read_inputs(write_run(folder, seed=seed)) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def comparison(runs: list[ReportInputs]) -> Comparison:
    return compare(*runs[:2])


def read_words(html: str) -> str:
    """Return the text of the page, without its style and script."""
    body = html[html.index("<body>") : html.index("<script")]
    return " ".join(re.sub(r"<[^>]+>", "", body).replace("&#39;", "'").split())


def test_page_is_the_same_each_time(runs: list[ReportInputs], comparison: Comparison) -> None:
    assert render_comparison(comparison, PICTURES) == render_comparison(compare(*runs[:2]), PICTURES)


def test_page_needs_nothing_else(comparison: Comparison) -> None:
    html = render_comparison(comparison, PICTURES)
    elements = Elements(html).found
    assert {"link", "iframe", "object", "base", "img"}.isdisjoint(tag for tag, _ in elements)
    for _, attributes in elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset")
            assert name != "href" or (value or "").startswith("#")
    assert "url(" not in html and "@import" not in html and "Content-Security-Policy" in html


def test_anchors_lead_to_sections(comparison: Comparison) -> None:
    elements = Elements(render_comparison(comparison, PICTURES)).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {attributes.get("href", "#data") for tag, attributes in elements if tag == "a"}
    assert {name[1:] for name in named if name} <= set(ids)
    assert [name for name in ids if name in ("scores", "disagreements", "classes", "config", "cost", "next")] == [
        "scores", "disagreements", "classes", "config", "cost", "next",
    ]  # fmt: skip


def test_script_gets_the_pages_and_their_outcomes(comparison: Comparison) -> None:
    html = render_comparison(comparison, PICTURES)
    data = json.loads(Elements(html).scripts[0])
    assert data["letters"] == ["A", "B"] and data["thumbnails"] == {"0": "QUJD", "1": "REVG"}
    assert data["outcomes"] == {"B": [list(rows) for rows in comparison.pairs[0].outcomes]}
    assert [page[1] for page in data["pages"]] == list(IDS)
    assert all(len(page[3]) == 2 for page in data["pages"])


def test_differences_are_told_in_words(comparison: Comparison) -> None:
    (pair,) = comparison.pairs
    clean, damaged = pair.differences
    assert not clean.macro_f1.excludes_0
    sure = replace(damaged, macro_f1=replace(damaged.macro_f1, value=0.2, low=0.1, high=0.3))
    worse = replace(damaged, macro_f1=replace(damaged.macro_f1, value=-0.2, low=-0.3, high=-0.1))
    equal = replace(clean, num_changed=0)
    expected = {
        clean: "The interval contains 0: the difference may be noise.",
        sure: "The interval excludes 0: B scores higher.",
        worse: "The interval excludes 0: A scores higher.",
        equal: "Both predict the same class for every page.",
    }
    for scores, sentence in expected.items():
        changed = replace(comparison, pairs=(replace(pair, differences=(scores,)),))
        words = read_words(render_comparison(changed, None))
        assert [text for text in expected.values() if text in words] == [sentence]
    words = read_words(render_comparison(comparison, None))
    assert "B minus A: tiny2 minus tiny1" in words and "so the scores are optimistic" in words
    assert f"{clean.macro_f1.value:+.3f} macro-F1" in words
    assert f"interval {clean.macro_f1.low:+.3f} to {clean.macro_f1.high:+.3f}" in words


def test_several_runs_have_a_column_each(runs: list[ReportInputs]) -> None:
    comparison = compare(*runs)
    html = render_comparison(comparison, None)
    words = read_words(html)
    assert "C minus A: tiny3 minus tiny1" in words and "Of 2 comparisons at 95%, some may exclude 0 by chance" in words
    cells = re.findall(r'data-cell="(\w),(\d)" data-title="([^"]*)"[^>]*>(\d+)<', html)
    assert {(letter, int(outcome)): int(count) for letter, outcome, _, count in cells} == {
        (pair.letter, outcome): len(rows) for pair in comparison.pairs for outcome, rows in enumerate(pair.outcomes)
    }
    assert ("C", "1", "A and C: Only C right") in [cell[:3] for cell in cells]


def test_hostile_ids_labels_and_settings_are_escaped(tmp_path: Path) -> None:
    runs = [
        read_inputs(write_run(tmp_path, ids=(HOSTILE, *IDS[1:]), classes=(*CLASSES[:3], HOSTILE), seed=seed))
        for seed in (1, 2)
    ]
    assert runs[1].snapshot is not None
    changed = {**runs[1].snapshot, HOSTILE: HOSTILE, "provenance": {**runs[1].snapshot["provenance"], "x": HOSTILE}}
    cost = replace(COST, devices=(HOSTILE,), missing=(HOSTILE,))
    comparison = derive_comparison(
        [RunRecord(runs[0], cost, "1"), RunRecord(replace(runs[1], snapshot=changed), cost, "1")]
    )
    html = render_comparison(replace(comparison, notes=(HOSTILE,)), None, HOSTILE)
    assert HOSTILE not in html and "<img" not in html
    assert html.count("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;") >= 6
    elements = Elements(html)
    assert [tag for tag, _ in elements.found].count("script") == 2
    data = json.loads(elements.scripts[0])
    assert HOSTILE in {page[1] for page in data["pages"]} and HOSTILE in data["classes"]


def test_config_is_compared_in_words(runs: list[ReportInputs], comparison: Comparison) -> None:
    assert "No key of the config differs." in read_words(render_comparison(comparison, None))
    assert runs[1].snapshot is not None
    changed = replace(runs[1], snapshot={**runs[1].snapshot, "extra": 7})
    words = read_words(render_comparison(compare(runs[0], changed), None))
    assert "Only the keys that differ." in words and "extranot set7" in words
    words = read_words(render_comparison(compare(runs[0], replace(runs[1], snapshot=None)), None))
    assert "B tiny2 has no config.yaml" in words and "there are no two configs to compare" in words


def test_page_says_which_pages_have_thumbnails(comparison: Comparison) -> None:
    assert f"of {COUNT} pages have one" not in render_comparison(comparison, PICTURES)
    html = render_comparison(comparison, Thumbnails({0: "QUJD"}, 0, COUNT - 1))
    assert f"1 of {COUNT} pages have one, to keep this file small: first those on which runs disagree" in html
    assert "3 pages have no thumbnail" in render_comparison(comparison, PICTURES, "3 pages have no thumbnail")
    assert "Thumbnails show" not in render_comparison(comparison, None)


def test_without_damaged_copies_there_are_no_columns_of_them(tmp_path: Path) -> None:
    runs = [read_inputs(write_run(tmp_path, is_damaged=False, seed=seed)) for seed in (1, 2)]
    words = read_words(render_comparison(compare(*runs), None))
    assert "Macro-F1, damaged" not in words and "Damaged copies" not in words and "Clean pages" in words
