"""Slices: quarters of the pages by what was measured, with their accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from doccls.report.content import PageResult
from doccls.report.slices import MAX_MEASURED, PageFacts, bound_share, choose_sample, measure_page, slice_pages
from doccls.report.training_pages import TrainingPage


def make_page(row: int, is_right: bool) -> PageResult:
    return PageResult(row, f"page{row}", 0, 1, ((1 if is_right else 0, 0.9),))


def draw(side: int, shade: int) -> TrainingPage:
    return TrainingPage(np.full((side, side // 2, 3), shade, np.uint8), side * 10, side * 5)


def test_all_pages_are_measured_or_an_even_spread_of_them() -> None:
    assert choose_sample([5, 3, 4]) == [3, 4, 5]
    sample = choose_sample(range(100 * MAX_MEASURED))
    assert len(set(sample)) == MAX_MEASURED and sample[0] == 0 and sample[-1] == 100 * MAX_MEASURED - 1
    assert set(np.diff(sample)) <= {100, 101}


def test_page_is_measured() -> None:
    facts = measure_page(draw(100, 51), 100)
    assert (facts.longest_px, facts.sharpness) == (1000, 0) and facts.brightness == pytest.approx(0.2)
    stripes = np.zeros((60, 60, 3), np.uint8)
    stripes[::4] = 255
    sharp = measure_page(TrainingPage(stripes, 60, 60), 60).sharpness
    blurred = measure_page(TrainingPage(stripes, 60, 60), 30).sharpness
    assert sharp > blurred > 0, "it is measured at the size of the model's input"


def test_slices_are_quarters_with_the_accuracy_of_their_pages() -> None:
    facts = {row: PageFacts(500, row / 100, 10.0) for row in range(100)}
    pages = [make_page(row, is_right=row >= 25 or row < 5) for row in reversed(range(100))]
    damaged = np.arange(100) >= 50
    slices = slice_pages(facts, pages, damaged)
    (brightness,) = slices.properties
    assert slices.measured == 100 and brightness.name.startswith("Brightness")
    assert [(part.low, part.high, part.count) for part in brightness.slices] == [
        (0.0, 0.24, 25), (0.25, 0.49, 25), (0.5, 0.74, 25), (0.75, 0.99, 25),
    ]  # fmt: skip
    assert [part.accuracy for part in brightness.slices] == [0.2, 1, 1, 1]
    assert [part.accuracy_damaged for part in brightness.slices] == [0, 0, 1, 1]
    without = slice_pages(facts, pages, None).properties[0].slices
    assert [part.accuracy_damaged for part in without] == [None] * 4


def test_equal_values_stay_in_one_slice() -> None:
    facts = {row: PageFacts(300 if row < 60 else 400 + row, 0.5, 1.0) for row in range(100)}
    (size,) = slice_pages(facts, [make_page(row, True) for row in range(100)], None).properties
    assert [(part.low, part.high, part.count) for part in size.slices] == [
        (300, 300, 60), (460, 474, 15), (475, 499, 25),
    ]  # fmt: skip
    rare = {row: PageFacts(300 if row < 97 else 400, 0.5, 1.0) for row in range(100)}
    assert slice_pages(rare, [make_page(row, True) for row in range(100)], None).properties == ()


def test_few_pages_have_no_slices_and_pages_without_image_are_left_out() -> None:
    facts = {row: PageFacts(row, row, row) for row in range(39)}
    assert slice_pages(facts, [make_page(row, True) for row in range(60)], None).properties == ()
    facts = {row: PageFacts(row, row, row) for row in range(40)}
    found = slice_pages(facts, [make_page(row, True) for row in range(60)], None)
    assert found.measured == 40 and [len(item.slices) for item in found.properties] == [2, 2, 2]


@pytest.mark.parametrize(("hits", "count"), [(0, 20), (7, 20), (20, 20), (640, 1000)])
def test_interval_is_wilsons(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert bound_share(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-6)
