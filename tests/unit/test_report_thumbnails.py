"""Thumbnails: small, and within their budget."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from doccls.report.thumbnails import THUMBNAIL_PX, collect_thumbnails, encode_thumbnail
from doccls.report.training_pages import TrainingPage

NOISE = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)


def decode(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_thumbnail_is_small_and_always_the_same() -> None:
    encoded = encode_thumbnail(NOISE)
    assert decode(encoded).size == (107, THUMBNAIL_PX) and encode_thumbnail(NOISE.copy()) == encoded
    assert decode(encode_thumbnail(NOISE[:20, :10])).size == (10, 20), "a smaller page is not enlarged"


def test_thumbnails_end_where_the_budget_does() -> None:
    size = len(encode_thumbnail(NOISE))
    asked = []

    def read(row: int) -> TrainingPage | None:
        asked.append(row)
        return None if row == 7 else TrainingPage(NOISE, 300, 200)

    found = collect_thumbnails([5, 7, 3, 1, 2], read, max_bytes=2 * size + 1)
    assert list(found.content) == [5, 3] and (found.missing, found.left_out) == (1, 2)
    assert asked == [5, 7, 3, 1], "further pages are not even read"
    assert collect_thumbnails([5, 3], read, max_bytes=2 * size).left_out == 0
