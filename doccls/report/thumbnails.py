"""Thumbnails of training pages: small pictures that fit into a report."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from doccls.config import Config
from doccls.config.paths import read_regular_file
from doccls.data.formats import ImageError
from doccls.data.image_names import resolve_images
from doccls.data.images import load_page, shrink_page
from doccls.data.scan_cache import is_unchanged, read_scan_cache
from doccls.data.store import PageStore, StoredPages, choose_store, locate_pages

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
    rows: Iterable[int], read: Callable[[int], np.ndarray | None], max_bytes: int = MAX_BYTES
) -> Thumbnails:
    """Encode the page of each row, in order, until `max_bytes` are used up; `read` returns None for a missing page."""
    content: dict[int, str] = {}
    remaining, missing, used = list(rows), 0, 0
    for number, row in enumerate(remaining):
        page = read(row)
        if page is None:
            missing += 1
            continue
        encoded = encode_thumbnail(page)
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


class PageReader:
    """Reads training pages: from the page store where it has them, else from the image files. It writes nothing."""

    def __init__(self, config: Config, ids: Sequence[str]) -> None:
        """Find the image of each ID, and its page in the store."""
        self._max_pixels = config.data.max_image_pixels
        folder = config.data.image_dir_train
        names = resolve_images(ids, range(len(ids)), folder, config.data.image_ext).names
        self._paths = [None if name is None else folder / name for name in names]
        self._stored = self._find_stored(config)

    def read(self, row: int) -> np.ndarray | None:
        """Return the page of a row; None if its image is missing or can't be decoded."""
        path = self._paths[row]
        if path is None:
            return None
        page = None if self._stored is None else self._stored.read(row)
        if page is not None:
            return page
        try:
            return load_page(read_regular_file(path)[1], self._max_pixels, THUMBNAIL_PX)
        except (OSError, ValueError, ImageError):
            return None

    def _find_stored(self, config: Config) -> StoredPages | None:
        """Locate the stored pages of files that have not changed since they were scanned; None without a store."""
        choice = choose_store(config)
        if choice is None:
            return None
        store = PageStore(choice.folder, config.page_px)
        index = store.read_index()
        facts = {digest: location.fact for digest, location in index.items()}
        scans = read_scan_cache(store.scan_cache(self._max_pixels), self._max_pixels, facts)

        def find_digest(path: Path | None) -> str | None:
            scan = None if path is None else scans.get(path)
            return scan.fact.digest if path is not None and scan is not None and is_unchanged(path, scan) else None

        return locate_pages(index, [find_digest(path) for path in self._paths])
