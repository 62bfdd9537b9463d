"""The decoded-page store: each page is decoded once, for all folds, epochs, ranks, workers, runs and restarts.

A folder of segments, each a safetensors file of some hundred pages, scaled and not yet set on white. One that exists is
whole and never changes; a page is found by the digest of its file's bytes, so a changed file never meets its old page.
"""

import json
import mmap
import secrets
import shutil
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
from safetensors.numpy import save

from doccls.data.images import ImageFact, Inspected, pad_page
from doccls.errors import UserError
from doccls.run.artifacts import replacing

_RULE = 1
"""Of `decode_image` and `scale_page`: grows when they give other pixels."""
_PLACE = np.dtype([("segment", "i4"), ("offset", "i8"), ("height", "u2"), ("width", "u2"), ("checksum", "u4")])
"""20 bytes a sample: all of them go to each rank and each loader worker."""
_LENGTH = struct.Struct("<Q")
_MARGIN = 2
_SEGMENT_PAGES, _SEGMENT_BYTES = 256, 2**26


@dataclass(frozen=True)
class Place:
    """Where one page lies, and what the look at its file found."""

    segment: Path
    offset: int
    height: int
    width: int
    checksum: int
    pixels: int
    """Of the whole page, before it was scaled."""
    fact: ImageFact


class StoreError(UserError):
    """The store has no room."""


class PageStore:
    """Pages scaled to one size. What other sizes, rules or versions of the decoders made lies in other folders."""

    def __init__(self, folder: Path, size_px: int) -> None:
        self.size_px = size_px
        self.folder = folder / f"px{size_px}-pillow{PIL.__version__}-opencv{cv2.__version__}-{_RULE}"

    @property
    def segment_pages(self) -> int:
        """Pages decoded between two writes: what a kill may lose, and what is held in memory."""
        return max(1, min(_SEGMENT_PAGES, _SEGMENT_BYTES // (3 * self.size_px**2)))

    @property
    def looks(self) -> Path:
        """What the looks at the files found: whoever comes next need not read them."""
        return self.folder / "images.json"

    @property
    def lock(self) -> Path:
        """Held by whoever decodes, so that of several that come at once one does."""
        return self.folder / "filling.lock"

    def read_index(self) -> dict[str, Place]:
        """Digest of a file -> its page, of all segments; what is no whole segment is passed over."""
        found: dict[str, Place] = {}
        for segment in sorted(self.folder.glob("pages_*.safetensors")):
            found |= _read_header(segment, self.size_px)
        return found

    def add(self, pages: Sequence[Inspected]) -> None:
        """Keep the scaled pages, in a segment of their own.

        Raises:
            OSError: no room, no right, ...
        """
        scaled = {one.fact.digest: np.ascontiguousarray(one.scaled) for one in pages}
        told = {
            one.fact.digest: [zlib.crc32(scaled[one.fact.digest].data), one.pixels, one.fact.content, one.fact.pages]
            for one in pages
        }
        words = json.dumps(told)
        with replacing(self.folder / f"pages_{secrets.token_hex(8)}.safetensors") as file:
            file.write(save(scaled, {"pages": words, "crc32": str(zlib.crc32(words.encode()))}))

    def check_room(self, count: int) -> None:
        """So many more pages can be kept, each as large as it may be.

        Raises:
            StoreError: they can't.
        """
        needed, free = count * 3 * self.size_px**2, shutil.disk_usage(self.folder).free
        if free < _MARGIN * needed:
            raise StoreError(
                f"{self.folder}: {free / 2**20:.0f} MiB are free, less than twice the {needed / 2**20:.0f} MiB that "
                f"{count} pages of {self.size_px} px may take"
            )


@dataclass(eq=False)
class StoredPages:
    """The pages of all samples; in the memory that the kernel keeps of the segments, for all processes of a machine."""

    segments: tuple[Path, ...]
    places_N: np.ndarray
    """(n,) of `_PLACE`; segment -1 where there is no page."""
    size_px: int
    _maps: dict[int, mmap.mmap] = field(default_factory=dict)

    def read(self, sample: int) -> np.ndarray | None:
        """The sample's page, (size_px, size_px, 3) uint8; None if there is none, or it is damaged, or not to be had."""
        segment, offset, height, width, checksum = self.places_N[sample].tolist()
        if segment < 0:
            return None
        try:
            page = memoryview(self._map(segment))[offset : offset + height * width * 3]
        except (OSError, ValueError):
            return None  # gone, or not on this machine
        if zlib.crc32(page) != checksum:
            print(f"[WARNING] {self.segments[segment]}: a page is damaged, and decoded anew", file=sys.stderr)
            return None
        return pad_page(np.frombuffer(page, np.uint8).reshape(height, width, 3), self.size_px)

    def _map(self, segment: int) -> mmap.mmap:
        if segment not in self._maps:
            with self.segments[segment].open("rb") as file:
                self._maps[segment] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[segment]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # another process maps for itself


def locate_pages(index: Mapping[str, Place], digests: Sequence[str | None], size_px: int) -> StoredPages:
    """Where the page of each sample lies, by the digest of its file; None is a sample without one."""
    found = [None if digest is None else index.get(digest) for digest in digests]
    segments = sorted({place.segment for place in found if place is not None})
    number = {segment: place for place, segment in enumerate(segments)}
    rows = [
        (-1, 0, 0, 0, 0) if one is None else (number[one.segment], one.offset, one.height, one.width, one.checksum)
        for one in found
    ]
    return StoredPages(tuple(segments), np.array(rows, _PLACE), size_px)


def _read_header(segment: Path, size_px: int) -> dict[str, Place]:
    """What a segment holds; nothing of one that is torn, foreign or damaged in its words."""
    try:
        size = segment.stat().st_size
        with segment.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > size:
                return {}
            header = json.loads(file.read(length))
        stated, begin = header.pop("__metadata__"), _LENGTH.size + length
        if zlib.crc32(stated["pages"].encode()) != int(stated["crc32"]):
            return {}
        words, found = json.loads(stated["pages"]), {}
        for digest, told in header.items():
            (height, width, depth), (start, end) = told["shape"], told["data_offsets"]
            fits = start >= 0 and begin + end <= size and 0 < height <= size_px and 0 < width <= size_px
            if not fits or (told["dtype"], depth, end - start) != ("U8", 3, height * width * 3):
                return {}
            checksum, pixels, content, pages = words[digest]
            fact = ImageFact(digest, None, content, pages)
            found[digest] = Place(segment, begin + start, height, width, checksum, pixels, fact)
        return found
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return {}
