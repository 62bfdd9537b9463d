"""The decoded-page store: each page is decoded once for all folds, epochs, ranks, workers, runs and restarts.

It is a folder of segments, safetensors files of up to 256 pages each, scaled but not yet padded. A segment that exists
is complete and never changes. Pages are keyed by the digest of their file's bytes, so a changed file never gets its old
page.
"""

import json
import mmap
import os
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

from doccls.config.paths import describe_error, list_matching
from doccls.config.schema import Config
from doccls.data.image_scan import ImageFact, ScannedImage
from doccls.data.images import PIXEL_RULE
from doccls.errors import UserError
from doccls.system.atomic_files import replacing
from doccls.system.disk import format_size, measure_free
from doccls.system.lock import hold_lock

# 20 bytes per sample: all of them go to each rank and loader worker.
_LOCATION = np.dtype([("segment", "i4"), ("offset", "i8"), ("height", "u2"), ("width", "u2"), ("checksum", "u4")])
_LENGTH = struct.Struct("<Q")
_FREE_SPACE_FACTOR = 2
_SEGMENT, _SCANS, _LOCK = r"pages_.*\.safetensors", "scans_*.json", "filling.lock"
_OLD_SCANS = "images.json"  # of earlier versions
_SET = re.compile(r"px(?P<size>[1-9]\d{0,4})-pillow(?P<pillow>.+)-opencv(?P<opencv>.+)-(?P<rule>\d+)")
_SEGMENT_PAGES, _SEGMENT_BYTES = 256, 2**26


@dataclass(frozen=True)
class PageLocation:
    """The location of a page in the store, and the facts about its file."""

    segment: Path
    offset: int
    height: int
    width: int
    checksum: int
    fact: ImageFact


class StoreError(UserError):
    """The disk is too full for the store."""


@dataclass(frozen=True)
class StoreChoice:
    """The folder of the page store to use."""

    folder: Path
    required: bool  # named in the config: failing to fill it is an error; otherwise a warning


def choose_store(config: Config) -> StoreChoice | None:
    """Return the store that data.store selects; None for no store."""
    stated = config.data.store
    if isinstance(stated, Path):
        return StoreChoice(stated, required=True)
    return StoreChoice(config.output.exp_dir.parent / "page_store", required=False) if stated == "auto" else None


class PageStore:
    """The pages of one size, rule and set of decoder versions; others have folders of their own."""

    def __init__(self, folder: Path, size_px: int) -> None:
        self.size_px = size_px
        self.folder = folder / f"px{size_px}-pillow{PIL.__version__}-opencv{cv2.__version__}-{PIXEL_RULE}"

    @property
    def segment_pages(self) -> int:
        """The number of pages per segment, which limits the memory used and the work that a kill loses."""
        return max(1, min(_SEGMENT_PAGES, _SEGMENT_BYTES // (3 * self.size_px**2)))

    def scan_cache(self, max_pixels: int) -> Path:
        """Return the path of the scan cache for that pixel limit."""
        return self.folder / _SCANS.replace("*", str(max_pixels))

    @property
    def lock(self) -> Path:
        """The lock held by the process that decodes, so that of several that start at once only one does."""
        return self.folder / _LOCK

    def read_index(self) -> dict[str, PageLocation]:
        """Read the pages of all segments, by file digest; skip damaged and foreign files."""
        index: dict[str, PageLocation] = {}
        for segment in list_matching(self.folder, _SEGMENT):
            index |= _read_header(segment, self.size_px)
        return index

    def add(self, pages: Sequence[ScannedImage]) -> dict[str, PageLocation]:
        """Write the scaled pages as a new segment; return their locations by file digest.

        Raises:
            OSError: the disk is full, the folder is not writable, ...
        """
        scaled = {page.fact.digest: np.ascontiguousarray(page.scaled) for page in pages}
        facts = {digest: fact for digest, *fact in (astuple(page.fact) for page in pages)}
        metadata = json.dumps({digest: [zlib.crc32(scaled[digest].data), *fact] for digest, fact in facts.items()})
        segment = self.folder / f"pages_{secrets.token_hex(8)}.safetensors"
        content = save(scaled, {"pages": metadata, "crc32": str(zlib.crc32(metadata.encode()))})
        with replacing(segment, len(content)) as file:
            file.write(content)
        return _read_header(segment, self.size_px)

    def check_free_space(self, count: int) -> None:
        """Check that the disk has space for `count` more pages of the maximum size, twice over.

        Raises:
            StoreError: it has not.
        """
        needed, free = count * 3 * self.size_px**2, measure_free(self.folder)
        if free < _FREE_SPACE_FACTOR * needed:
            raise StoreError(
                f"{self.folder}: {format_size(free)} are free, less than twice the {format_size(needed)} that "
                f"{count} pages of {self.size_px} px may take"
            )


@dataclass(eq=False)
class StoredPages:
    """The stored pages of all samples, memory-mapped so that all processes of a host share the page cache."""

    segments: tuple[Path, ...]
    locations_N: np.ndarray  # (n,) of dtype `_LOCATION`; segment -1 where there is no page
    # By segment; None where the file system can't map files (some FUSE): pages are read from the file then.
    _maps: "dict[int, mmap.mmap | None]" = field(default_factory=dict)

    def read(self, sample: int) -> np.ndarray | None:
        """Return the sample's page, (height, width, 3) uint8, read-only; None if it is missing or damaged."""
        segment, offset, height, width, checksum = self.locations_N[sample].tolist()
        if segment < 0:
            return None
        try:
            page = self._read_bytes(segment, offset, height * width * 3)
        except (OSError, ValueError):
            return None  # removed, or not on this host
        if zlib.crc32(page) != checksum:
            print(f"[WARNING] {self.segments[segment]}: a page is damaged and will be decoded again", file=sys.stderr)
            return None
        return np.frombuffer(page, np.uint8).reshape(height, width, 3)

    def _read_bytes(self, segment: int, offset: int, size: int) -> memoryview:
        if segment not in self._maps:
            with self.segments[segment].open("rb") as file:
                try:
                    self._maps[segment] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError:
                    self._maps[segment] = None
        mapped = self._maps[segment]
        if mapped is not None:
            return memoryview(mapped)[offset : offset + size]
        with self.segments[segment].open("rb") as file:
            file.seek(offset)
            return memoryview(file.read(size))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # another process makes its own maps


@dataclass(frozen=True)
class PageSet:
    """The pages of one size that one set of decoder versions made."""

    folder: Path
    size_px: int
    made_by: str
    usable: bool  # whether the installed versions use it
    pages: int
    size_bytes: int
    damaged: int  # number of truncated or foreign files, which are ignored


def list_page_sets(folder: Path) -> list[PageSet]:
    """List the page sets of a store, sorted by size; empty if there is no store."""
    page_sets = []
    for path in _list_subfolders(folder):
        match = _SET.fullmatch(path.name)
        if match is not None:
            size_px = int(match["size"])
            segments = [(segment, len(_read_header(segment, size_px))) for segment in list_matching(path, _SEGMENT)]
            page_sets.append(
                PageSet(
                    folder=path,
                    size_px=size_px,
                    made_by=f"Pillow {match['pillow']}, OpenCV {match['opencv']}, rule {match['rule']}",
                    usable=PageStore(folder, size_px).folder == path,
                    pages=sum(pages for _, pages in segments),
                    size_bytes=sum(segment.stat().st_size for segment, _ in segments),
                    damaged=sum(pages == 0 for _, pages in segments),
                )
            )
    return sorted(page_sets, key=lambda pages: (pages.size_px, pages.made_by))


def _list_subfolders(folder: Path) -> list[Path]:
    """Return the subfolders that are no links; none if there is no folder.

    Raises:
        UserError: the folder can't be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(describe_error(error, folder, "folder")) from error


def clear_page_set(pages: PageSet) -> None:
    """Remove a page set. Processes that have its files open keep them and decode all other pages.

    Raises:
        LockError: pages are being decoded into it now.
        OSError: no permission.
    """
    lock = pages.folder / _LOCK
    with hold_lock(lock, "decoded pages are being removed"):
        leftovers = (*pages.folder.glob(".*.tmp"), *pages.folder.glob(f"{_LOCK}.*.next"))
        scans = (*pages.folder.glob(_SCANS), pages.folder / _OLD_SCANS)
        for file in (*list_matching(pages.folder, _SEGMENT), *leftovers, *scans, lock):
            file.unlink(missing_ok=True)
    for folder in (pages.folder, pages.folder.parent):
        with suppress(OSError):  # it holds other files
            folder.rmdir()


def locate_pages(index: Mapping[str, PageLocation], digests: Sequence[str | None]) -> StoredPages:
    """Locate the page of each sample by the digest of its file; None is a sample without a page."""
    locations = [None if digest is None else index.get(digest) for digest in digests]
    segments = sorted({page.segment for page in locations if page is not None})
    number_of = {segment: number for number, segment in enumerate(segments)}
    rows = [
        (-1, 0, 0, 0, 0)
        if page is None
        else (number_of[page.segment], page.offset, page.height, page.width, page.checksum)
        for page in locations
    ]
    return StoredPages(tuple(segments), np.array(rows, _LOCATION))


def _read_header(segment: Path, size_px: int) -> dict[str, PageLocation]:
    """Read a segment's pages by file digest; none if it is truncated or foreign or its header is damaged."""
    try:
        size = segment.stat().st_size
        with segment.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > size:
                return {}
            header = json.loads(file.read(length))
        metadata, data_start = header.pop("__metadata__"), _LENGTH.size + length
        if zlib.crc32(metadata["pages"].encode()) != int(metadata["crc32"]):
            return {}
        page_metadata, pages = json.loads(metadata["pages"]), {}
        for digest, tensor in header.items():
            (height, width, depth), (start, end) = tensor["shape"], tensor["data_offsets"]
            is_valid = start >= 0 and data_start + end <= size and 0 < height <= size_px and 0 < width <= size_px
            if not is_valid or (tensor["dtype"], depth, end - start) != ("U8", 3, height * width * 3):
                return {}
            checksum, *fact = page_metadata[digest]
            pages[digest] = PageLocation(segment, data_start + start, height, width, checksum, ImageFact(digest, *fact))
        return pages
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return {}
