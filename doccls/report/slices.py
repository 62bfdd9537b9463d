"""Slices: how often predictions are right on small and large, dark and bright, blurred and sharp pages; pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from doccls.data.images import shrink_page
from doccls.report.content import PageResult
from doccls.report.training_pages import TrainingPage

MAX_MEASURED = 2_000  # pages; measuring all pages of a large run would take longer than the rest of the report
_MAX_SLICES = 4
_MIN_PAGES = 20  # in a slice, except where equal values must stay together; fewer say little


@dataclass(frozen=True)
class PageFacts:
    """Measured properties of a page."""

    longest_px: int  # of the image file
    brightness: float  # mean luma, from 0 (black) to 1 (white)
    sharpness: float  # variance of the Laplacian of the luma, at the size of the model's input


@dataclass(frozen=True)
class Slice:
    """Pages whose property is in one range."""

    low: float  # of the property, inclusive
    high: float  # inclusive
    count: int
    accuracy: float
    accuracy_low: float  # of Wilson's interval
    accuracy_high: float
    accuracy_damaged: float | None  # on damaged copies of these pages


@dataclass(frozen=True)
class Property:
    """The slices of one property, each with about as many pages."""

    name: str
    unit: str
    digits: int  # after the decimal point
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Slices:
    """The slices of the measured pages."""

    measured: int  # pages
    properties: tuple[Property, ...]  # without those in which the pages hardly differ


def choose_sample(rows: Sequence[int]) -> list[int]:
    """Choose the pages to measure: all, or MAX_MEASURED of them, evenly spread over train.csv."""
    if len(rows) <= MAX_MEASURED:
        return sorted(rows)
    places = np.linspace(0, len(rows) - 1, MAX_MEASURED).round().astype(np.int64)
    ordered = sorted(rows)
    return [ordered[place] for place in places.tolist()]


def measure_page(page: TrainingPage, size_px: int) -> PageFacts:
    """Measure a page; `size_px` is the size of the model's input."""
    pixels = page.pixels
    if max(pixels.shape[:2]) > size_px:
        pixels = shrink_page(pixels, size_px)
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    sharpness = float(cv2.Laplacian(luma, cv2.CV_64F).var())
    return PageFacts(max(page.height_px, page.width_px), float(luma.mean()) / 255, sharpness)


def slice_pages(
    facts: Mapping[int, PageFacts], pages: Sequence[PageResult], damaged_hits_N: np.ndarray | None
) -> Slices:
    """Slice the measured pages by each property.

    Args:
        facts: of the measured pages, by row of train.csv.
        pages: the predictions.
        damaged_hits_N: whether the prediction for the damaged copy of each row is right; None without copies.
    """
    measured = [page for page in pages if page.row in facts]
    readers: tuple[tuple[str, str, int, Callable[[PageFacts], float]], ...] = (
        ("Size: longest side of the image", "px", 0, lambda fact: fact.longest_px),
        ("Brightness: mean, 0 is black and 1 white", "", 2, lambda fact: fact.brightness),
        ("Sharpness: variance of the Laplacian", "", 0, lambda fact: fact.sharpness),
    )
    properties = []
    for name, unit, digits, read in readers:
        values_N = np.array([read(facts[page.row]) for page in measured], dtype=np.float64)
        slices = tuple(
            _measure_slice(values_N[chosen_M], [measured[place] for place in chosen_M], damaged_hits_N)
            for chosen_M in _split(values_N)
        )
        if len(slices) > 1:
            properties.append(Property(name, unit, digits, slices))
    return Slices(len(measured), tuple(properties))


def _split(values_N: np.ndarray) -> list[np.ndarray]:
    """Return the places of each slice's values: parts of about the same size, where equal values stay together."""
    number = min(_MAX_SLICES, len(values_N) // _MIN_PAGES)
    if number < 2:
        return []
    edges = np.unique(np.quantile(values_N, np.arange(1, number) / number, method="lower"))
    part_N = np.searchsorted(edges, values_N, side="left")
    parts: list[np.ndarray] = []
    for part in np.unique(part_N):
        places = np.flatnonzero(part_N == part)
        if len(places) < _MIN_PAGES // 2:  # never the first part, which holds at least its share
            parts[-1] = np.concatenate([parts[-1], places])
        else:
            parts.append(places)
    return parts


def _measure_slice(values_M: np.ndarray, pages: Sequence[PageResult], damaged_hits_N: np.ndarray | None) -> Slice:
    hits = sum(not page.is_mistake for page in pages)
    low, high = bound_share(hits, len(pages))
    damaged = None if damaged_hits_N is None else float(damaged_hits_N[[page.row for page in pages]].mean())
    return Slice(float(values_M.min()), float(values_M.max()), len(pages), hits / len(pages), low, high, damaged)


def bound_share(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score method (Wilson 1927, JASA 22:209)."""
    z = 1.959964
    centre, spread = hits + z * z / 2, z * np.sqrt(hits * (count - hits) / count + z * z / 4)
    return float((centre - spread) / (count + z * z)), float((centre + spread) / (count + z * z))
