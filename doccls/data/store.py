"""The decoded-page store: each page is decoded once, for all folds, epochs, ranks, workers, runs and restarts.

A folder of segments, each a safetensors file of some hundred pages, scaled and not yet set on white. One that exists is
whole and never changes; a page is found by the digest of its file's bytes, so a changed file never meets its old page.
"""

import json
import mmap
import re
import secrets
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
from safetensors.numpy import save

from doccls.config.schema import Config
from doccls.data.image_scan import ImageFact, ScannedImage
from doccls.errors import UserError
from doccls.system.atomic_files import replacing
from doccls.system.disk import format_size, measure_free
from doccls.system.lock import hold_lock

_RULE = 2
"""Of `decode_near` and `scale_page`: grows when they give other pixels."""
_PLACE = np.dtype([("segment", "i4"), ("offset", "i8"), ("height", "u2"), ("width", "u2"), ("checksum", "u4")])
"""20 bytes a sample: all of them go to each rank and each loader worker."""
_LENGTH = struct.Struct("<Q")
_MARGIN = 2
_SEGMENTS, _SCANS, _LOCK = "pages_*.safetensors", "scans_*.json", "filling.lock"
_OLD_SCANS = "images.json"
"""Of earlier versions."""
_SET = re.compile(r"px(?P<size>[1-9]\d{0,4})-pillow(?P<pillow>.+)-opencv(?P<opencv>.+)-(?P<rule>\d+)")
_SEGMENT_PAGES, _SEGMENT_BYTES = 256, 2**26


@dataclass(frozen=True)
class Place:
    """Where one page lies, and what the scan of its file found."""

    segment: Path
    offset: int
    height: int
    width: int
    checksum: int
    fact: ImageFact


class StoreError(UserError):
    """The store has no room."""


@dataclass(frozen=True)
class StoreChoice:
    """Where decoded pages are to be kept."""

    folder: Path
    needed: bool
    """It was named, so that it is an error if it can't be filled; otherwise a warning says so."""


def choose_store(config: Config) -> StoreChoice | None:
    """What data.store says; None if there is to be no store."""
    stated = config.data.store
    if isinstance(stated, Path):
        return StoreChoice(stated, needed=True)
    return StoreChoice(config.output.exp_dir.parent / "page_store", needed=False) if stated == "auto" else None


class PageStore:
    """Pages scaled to one size. What other sizes, rules or versions of the decoders made lies in other folders."""

    def __init__(self, folder: Path, size_px: int) -> None:
        self.size_px = size_px
        self.folder = folder / f"px{size_px}-pillow{PIL.__version__}-opencv{cv2.__version__}-{_RULE}"

    @property
    def segment_pages(self) -> int:
        """Pages decoded between two writes: what a kill may lose, and what is held in memory."""
        return max(1, min(_SEGMENT_PAGES, _SEGMENT_BYTES // (3 * self.size_px**2)))

    def scan_cache(self, max_pixels: int) -> Path:
        """What was found in the files at that limit of pixels: the next process need not read them."""
        return self.folder / _SCANS.replace("*", str(max_pixels))

    @property
    def lock(self) -> Path:
        """Held by the process that decodes, so that of several that start at once one does."""
        return self.folder / _LOCK

    def read_index(self) -> dict[str, Place]:
        """Digest of a file -> its page, of all segments; what is no whole segment is passed over."""
        found: dict[str, Place] = {}
        for segment in sorted(self.folder.glob(_SEGMENTS)):
            found |= _read_header(segment, self.size_px)
        return found

    def add(self, pages: Sequence[ScannedImage]) -> dict[str, Place]:
        """Write the scaled pages as a new segment; where each of them is.

        Raises:
            OSError: no room, no right, ...
        """
        scaled = {page.fact.digest: np.ascontiguousarray(page.scaled) for page in pages}
        facts = {digest: fact for digest, *fact in (astuple(page.fact) for page in pages)}
        words = json.dumps({digest: [zlib.crc32(scaled[digest].data), *fact] for digest, fact in facts.items()})
        segment = self.folder / f"pages_{secrets.token_hex(8)}.safetensors"
        with replacing(segment) as file:
            file.write(save(scaled, {"pages": words, "crc32": str(zlib.crc32(words.encode()))}))
        return _read_header(segment, self.size_px)

    def check_free_space(self, count: int) -> None:
        """So many more pages can be kept, each as large as it may be.

        Raises:
            StoreError: they can't.
        """
        needed, free = count * 3 * self.size_px**2, measure_free(self.folder)
        if free < _MARGIN * needed:
            raise StoreError(
                f"{self.folder}: {format_size(free)} are free, less than twice the {format_size(needed)} that "
                f"{count} pages of {self.size_px} px may take"
            )


@dataclass(eq=False)
class StoredPages:
    """The pages of all samples; in the memory that the kernel keeps of the segments, for all processes of a machine."""

    segments: tuple[Path, ...]
    places_N: np.ndarray
    """(n,) of `_PLACE`; segment -1 where there is no page."""
    _maps: dict[int, mmap.mmap] = field(default_factory=dict)

    def read(self, sample: int) -> np.ndarray | None:
        """The sample's page, (height, width, 3) uint8, read-only; None if there is none, or it is damaged or gone."""
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
        return np.frombuffer(page, np.uint8).reshape(height, width, 3)

    def _map(self, segment: int) -> mmap.mmap:
        if segment not in self._maps:
            with self.segments[segment].open("rb") as file:
                self._maps[segment] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[segment]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # another process maps for itself


@dataclass(frozen=True)
class PageSet:
    """The pages of one size that one set of decoders made."""

    folder: Path
    size_px: int
    made_by: str
    usable: bool
    """These versions use it."""
    pages: int
    size_bytes: int
    damaged: int
    """Files that are torn or foreign, and passed over."""


def list_page_sets(folder: Path) -> list[PageSet]:
    """What a store holds, by size; nothing where there is no store."""
    found = []
    for place in folder.glob("px*"):
        named = _SET.fullmatch(place.name)
        if named is not None and place.is_dir() and not place.is_symlink():
            size_px = int(named["size"])
            segments = [(segment, len(_read_header(segment, size_px))) for segment in place.glob(_SEGMENTS)]
            found.append(
                PageSet(
                    folder=place,
                    size_px=size_px,
                    made_by=f"Pillow {named['pillow']}, OpenCV {named['opencv']}, rule {named['rule']}",
                    usable=PageStore(folder, size_px).folder == place,
                    pages=sum(pages for _, pages in segments),
                    size_bytes=sum(segment.stat().st_size for segment, _ in segments),
                    damaged=sum(pages == 0 for _, pages in segments),
                )
            )
    return sorted(found, key=lambda pages: (pages.size_px, pages.made_by))


def clear_page_set(pages: PageSet) -> None:
    """Remove it. Who has its files open keeps what it has, and decodes what it has not.

    Raises:
        LockError: pages are being decoded into it now.
        OSError: no right to.
    """
    lock = pages.folder / _LOCK
    with hold_lock(lock, "decoded pages are being removed"):
        leftovers = (*pages.folder.glob(".*.tmp"), *pages.folder.glob(f"{_LOCK}.*.next"))
        scans = (*pages.folder.glob(_SCANS), pages.folder / _OLD_SCANS)
        for file in (*pages.folder.glob(_SEGMENTS), *leftovers, *scans, lock):
            file.unlink(missing_ok=True)
    for folder in (pages.folder, pages.folder.parent):
        with suppress(OSError):  # somebody else's files are in it
            folder.rmdir()


def locate_pages(index: Mapping[str, Place], digests: Sequence[str | None]) -> StoredPages:
    """Where the page of each sample lies, by the digest of its file; None is a sample without one."""
    found = [None if digest is None else index.get(digest) for digest in digests]
    segments = sorted({place.segment for place in found if place is not None})
    number = {segment: position for position, segment in enumerate(segments)}
    rows = [
        (-1, 0, 0, 0, 0)
        if place is None
        else (number[place.segment], place.offset, place.height, place.width, place.checksum)
        for place in found
    ]
    return StoredPages(tuple(segments), np.array(rows, _PLACE))


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
        for digest, tensor in header.items():
            (height, width, depth), (start, end) = tensor["shape"], tensor["data_offsets"]
            fits = start >= 0 and begin + end <= size and 0 < height <= size_px and 0 < width <= size_px
            if not fits or (tensor["dtype"], depth, end - start) != ("U8", 3, height * width * 3):
                return {}
            checksum, *fact = words[digest]
            found[digest] = Place(segment, begin + start, height, width, checksum, ImageFact(digest, *fact))
        return found
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return {}
