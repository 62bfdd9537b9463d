"""Thumbnails of training pages: small pictures that fit into a report."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from doccls.data.images import shrink_page
from doccls.report.training_pages import TrainingPage

THUMBNAIL_PX = 160
MAX_BYTES = 4_200_000  # of all thumbnails in base64; the rest of a report on 1,500 pages takes less than 0.8 MB
_QUALITY = 45
_FORMAT, MEDIA_TYPE = "WEBP", "image/webp"


@dataclass(frozen=True)
class Thumbnails:
    """The thumbnails that fit into the report."""

    content: Mapping[int, str]  # base64 of each thumbnail, by row of train.csv
    missing: int  # pages whose image can't be read any more
    left_out: int  # pages for which no space was left


def collect_thumbnails(
    rows: Iterable[int], read: Callable[[int], TrainingPage | None], max_bytes: int = MAX_BYTES
) -> Thumbnails:
    """Encode the page of each row, in order, until `max_bytes` are used up; `read` returns None for a missing page."""
    content: dict[int, str] = {}
    remaining, missing, used = list(rows), 0, 0
    for number, row in enumerate(remaining):
        page = read(row)
        if page is None:
            missing += 1
            continue
        encoded = encode_thumbnail(page.pixels)
        used += len(encoded)
        if used > max_bytes:
            return Thumbnails(content, missing, len(remaining) - number)
        content[row] = encoded
    return Thumbnails(content, missing, 0)


def encode_thumbnail(page: np.ndarray) -> str:
    """Return a page (height, width, 3) uint8 as a small picture in base64; equal pages give equal text."""
    shrunk = shrink_page(page, THUMBNAIL_PX) if max(page.shape[:2]) > THUMBNAIL_PX else page
    file = io.BytesIO()
    Image.fromarray(shrunk).save(file, _FORMAT, quality=_QUALITY, method=4)
    return base64.b64encode(file.getvalue()).decode("ascii")
