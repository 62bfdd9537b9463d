"""Training pages as a report shows and measures them: undamaged, at the size in which the page store keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from doccls.config import Config
from doccls.config.paths import read_regular_file
from doccls.data.formats import ImageError
from doccls.data.image_names import resolve_images
from doccls.data.image_scan import ImageFact, ImageScan
from doccls.data.images import decode_reduced
from doccls.data.scan_cache import is_unchanged, read_scan_cache
from doccls.data.store import PageStore, StoredPages, choose_store, locate_pages


@dataclass(frozen=True, eq=False)
class TrainingPage:
    """A page, and the size of the image file that it comes from."""

    pixels: np.ndarray  # (height, width, 3) uint8 RGB, longest side `config.page_px`
    height_px: int  # of the upright page in the file
    width_px: int


class PageReader:
    """Reads training pages: from the page store where it has them, else from the image files, with the same result.

    It writes nothing.
    """

    def __init__(self, config: Config, ids: Sequence[str]) -> None:
        """Find the image of each ID, and its page in the store."""
        self._max_pixels, self._page_px = config.data.max_image_pixels, config.page_px
        folder = config.data.image_dir_train
        names = resolve_images(ids, range(len(ids)), folder, config.data.image_ext).names
        self._paths = [None if name is None else folder / name for name in names]
        self._facts: list[ImageFact | None] = [None] * len(ids)
        self._stored = self._find_stored(config)

    def read(self, row: int) -> TrainingPage | None:
        """Return the page of a row; None if its image is missing or can't be decoded."""
        path, fact = self._paths[row], self._facts[row]
        if path is None:
            return None
        pixels = None if self._stored is None or fact is None else self._stored.read(row)
        if pixels is not None and fact is not None:
            return TrainingPage(pixels, fact.height_px, fact.width_px)
        try:
            decoded = decode_reduced(read_regular_file(path)[1], self._max_pixels, self._page_px)
        except (OSError, ValueError, ImageError):
            return None
        return TrainingPage(decoded.scale(self._page_px), decoded.height_px, decoded.width_px)

    def _find_stored(self, config: Config) -> StoredPages | None:
        """Locate the stored pages of files that have not changed since they were scanned; None without a store."""
        choice = choose_store(config)
        if choice is None:
            return None
        store = PageStore(choice.folder, config.page_px)
        index = store.read_index()
        facts = {digest: location.fact for digest, location in index.items()}
        scans = read_scan_cache(store.scan_cache(self._max_pixels), self._max_pixels, facts)
        self._facts = [_find_fact(path, None if path is None else scans.get(path)) for path in self._paths]
        return locate_pages(index, [None if fact is None else fact.digest for fact in self._facts])


def _find_fact(path: Path | None, scan: ImageScan | None) -> ImageFact | None:
    """Return the facts about a file unless it has changed since its scan."""
    return scan.fact if path is not None and scan is not None and is_unchanged(path, scan) else None
