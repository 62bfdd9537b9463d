"""The structure of TIFF files: their directories, which of them is the page, and where its pixels are.

Parsed from the raw bytes. Libraries that interpret all tags reject intact pages for one tag of the wrong type. Sources:
TIFF 6.0 and its technical notes, BigTIFF.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

NEW_SUBFILE_TYPE, SUBFILE_TYPE, SUB_IFDS = 254, 255, 330
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, SAMPLES, STRIP_BYTES, PLANAR = 273, 277, 279, 284
PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 317, 320, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT, MAX_SAMPLE, ORIENTATION = 338, 339, 281, 274
FILL_ORDER, ROWS_PER_STRIP, GDAL_NODATA = 266, 278, 42113

# What pixels need: size, samples, compression and its tables, strips and tiles, colour model, palette, missing data.
_PIXEL_TAGS = frozenset(
    (256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 281, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339)
) | frozenset((347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 532, 42113))
# TIFF's integer types: BYTE, SHORT, LONG, IFD, and BigTIFF's LONG8 and IFD8.
_INTEGERS = {1: "B", 3: "H", 4: "L", 13: "L", 16: "Q", 18: "Q"}
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_OLD_JPEG = 6  # a compression
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_OLD_REDUCED = 2  # of the older SubfileType
_MAX_DIRECTORIES = 10_000
_MAX_SUB_IFDS = 100
_MAX_ENTRIES = 4096  # of a directory; real ones have fewer than 200
MAX_SAMPLES_PER_PIXEL = 65_535
_MAX_VALUES = 10_000_000  # of a tag; the strips of a page are far fewer


@dataclass(frozen=True)
class Ifd:
    """An image file directory of a TIFF."""

    entries: dict[int, int]  # tag -> offset of its first entry
    next: int  # offset of the next directory; 0 for none
    size_bytes: int = 0  # of all entries, repeated tags included


class Tiff:
    """A TIFF or BigTIFF file, or an EXIF block, which has the same structure."""

    def __init__(self, data: bytes) -> None:
        """Parse the header.

        Raises:
            struct.error, ValueError: not a TIFF.
        """
        self._data = data
        self.order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        if not self.order:
            raise ValueError("not a TIFF")
        self.big = self._unpack("H", 2) == 43
        self._number, self._count = ("Q", "Q") if self.big else ("L", "H")
        self._head = 8 if self.big else 4
        self.first = self._unpack(self._number, self._head)

    def _unpack(self, kind: str, offset: int) -> int:
        if offset > len(self._data):
            raise struct.error("an offset behind the end of the file")
        (value,) = struct.unpack_from(self.order + kind, self._data, offset)
        return int(value)

    def read_ifd(self, start: int) -> Ifd:
        """Read the directory at offset `start`.

        Raises:
            struct.error: it is damaged.
        """
        count = self._unpack(self._count, start)
        if count > _MAX_ENTRIES:
            raise struct.error("not a directory")
        width = 20 if self.big else 12
        start += struct.calcsize(f"={self._count}")
        entries: dict[int, int] = {}
        for offset in range(start, start + count * width, width):
            entries.setdefault(self._unpack("H", offset), offset)
        return Ifd(entries, self._unpack(self._number, start + count * width), count * width)

    def list_ifds(self) -> Iterator[Ifd]:
        """Yield the directories of the chain, up to the first damaged, repeated or overlapping one."""
        seen: set[int] = set()
        offset, unused_bytes = self.first, len(self._data)
        while offset and offset not in seen and len(seen) < _MAX_DIRECTORIES and unused_bytes > 0:
            seen.add(offset)
            try:
                ifd = self.read_ifd(offset)
            except struct.error:
                return
            yield ifd
            offset = ifd.next
            unused_bytes -= ifd.size_bytes

    def find_page(self) -> Ifd:
        """Return the directory of the first page: not a reduced copy (a thumbnail) of it, nor a mask.

        If the chain has only reduced copies, as a camera's file may, the page is in a sub-directory of one.

        Raises:
            struct.error: the file has no readable directory.
        """
        for ifd in self.list_ifds():
            if self.is_page(ifd):
                return ifd
        parents = (self.read_integers(parent, SUB_IFDS, _MAX_SUB_IFDS) for parent in self.list_ifds())
        for offset in islice(chain.from_iterable(parents), _MAX_SUB_IFDS):
            try:
                ifd = self.read_ifd(offset)
            except struct.error:
                continue
            if self.is_page(ifd):
                return ifd
        return self.read_ifd(self.first)

    def is_page(self, ifd: Ifd) -> bool:
        """Return whether the directory is a page in full size."""
        is_reduced_or_mask = (self.read_integer(ifd, NEW_SUBFILE_TYPE) or 0) & (_REDUCED | _MASK)
        return not is_reduced_or_mask and self.read_integer(ifd, SUBFILE_TYPE) != _OLD_REDUCED

    def read_integer(self, ifd: Ifd, tag: int) -> int | None:
        """Return the tag's value if it is a single integer."""
        values = self.read_integers(ifd, tag, 2)
        return values[0] if len(values) == 1 else None

    def read_integers(self, ifd: Ifd, tag: int, limit: int = _MAX_VALUES) -> tuple[int, ...]:
        """Return the tag's values, at most the first `limit`; none if it is absent, damaged, or not of integers."""
        offset = ifd.entries.get(tag)
        if offset is None:
            return ()
        kind, count = _INTEGERS.get(self._unpack("H", offset + 2)), self._unpack(self._number, offset + 4)
        if not kind or count > _MAX_VALUES:
            return ()
        start, size = offset + (12 if self.big else 8), count * struct.calcsize(f"={kind}")
        if size > (8 if self.big else 4):
            start = self._unpack(self._number, start)
        if start + size > len(self._data):
            return ()
        return struct.unpack_from(f"{self.order}{min(count, limit)}{kind}", self._data, start)

    def has_truncated_pixels(self, ifd: Ifd) -> bool:
        """Return whether a strip or tile of the page lies partly behind the end of the file.

        The last strip of an uncompressed page may be stated too long, or not at all.
        """
        compression = self.read_integer(ifd, COMPRESSION) or 1
        if compression == _OLD_JPEG:  # its strips are often stated wrongly, and aren't needed
            return False
        for offsets_tag, lengths_tag in ((STRIP_OFFSETS, STRIP_BYTES), (TILE_OFFSETS, TILE_BYTES)):
            offsets, lengths = self.read_integers(ifd, offsets_tag), self.read_integers(ifd, lengths_tag)
            if offsets_tag == STRIP_OFFSETS and compression == 1:
                lengths = (*lengths[:-1], min([self._count_last_strip_bytes(ifd), *lengths[-1:]]))
            if any(start + length > len(self._data) for start, length in zip(offsets, lengths, strict=False)):
                return True
        return False

    def _count_last_strip_bytes(self, ifd: Ifd) -> int:
        width, height, rows = (self.read_integer(ifd, tag) or 0 for tag in (WIDTH, HEIGHT, ROWS_PER_STRIP))
        rows = min(rows or height, height) or 1
        bits = self.read_integers(ifd, BITS, MAX_SAMPLES_PER_PIXEL) or (1,)
        row_bits = width * (bits[0] if self.read_integer(ifd, PLANAR) == 2 else sum(bits))
        return (height % rows or rows) * -(-row_bits // 8)

    def read_number(self, ifd: Ifd, tag: int) -> float | None:
        """Return the number that the tag's text, of at most 40 characters, states; None if it states none."""
        offset = ifd.entries.get(tag)
        count = self._unpack(self._number, offset + 4) if offset is not None else 0
        if offset is None or count > 40 or self._unpack("H", offset + 2) != 2:
            return None
        start = offset + (12 if self.big else 8)
        if count > (8 if self.big else 4):
            start = self._unpack(self._number, start)
        try:
            return float(self._data[start : start + count].rstrip(b"\0"))
        except ValueError:
            return None

    def read_photometric(self, ifd: Ifd) -> int:
        """Return what the page's colours mean. Where the required tag is missing, guess as libtiff does."""
        if values := self.read_integers(ifd, PHOTOMETRIC, 1):
            return values[0]
        compression, samples = self.read_integer(ifd, COMPRESSION) or 1, self.read_integer(ifd, SAMPLES) or 1
        if compression in (2, 3, 4):  # fax
            return 0
        return 1 if samples < 3 else 6 if compression in (6, 7) else 2

    def strip(self, replaced: Mapping[int, tuple[int, ...]] | None = None) -> bytes:
        """Return the file with one directory at its end: the first page's, with only the tags that pixels need.

        A BigTIFF becomes a TIFF, since Pillow doesn't recognise those of big-endian order. The tags in `replaced` get
        new values, of type LONG; those without values are left out.

        Raises:
            struct.error: the directory is damaged, or lies behind 4 GiB.
        """
        ifd = self.find_page()
        fields = {
            tag: (4, len(values), struct.pack(f"{self.order}{len(values)}L", *values))
            for tag, values in (replaced or {}).items()
        }
        fields |= {
            tag: self._read_field(tag, offset)
            for tag, offset in ifd.entries.items()
            if tag in _PIXEL_TAGS and tag not in fields
        }
        if PHOTOMETRIC not in fields:  # Pillow would take the page for its negative
            fields[PHOTOMETRIC] = (4, 1, struct.pack(f"{self.order}L", self.read_photometric(ifd)))
        start = len(self._data) + len(self._data) % 2
        arrays, entries = bytearray(), bytearray()
        for tag, (kind, count, value) in sorted(fields.items()):
            if len(value) > 4:
                pointer = struct.pack(f"{self.order}L", start + len(arrays))
                arrays += value + bytes(len(value) % 2)
                value = pointer
            entries += struct.pack(f"{self.order}HHL", tag, kind, count) + value.ljust(4, b"\0") if count else b""
        number = len(entries) // 12
        directory = struct.pack(f"{self.order}H", number) + entries + bytes(4)
        head = self._data[:2] + struct.pack(f"{self.order}HL", 42, start + len(arrays))
        return head + self._data[len(head) : start].ljust(start - len(head), b"\0") + arrays + directory

    def _read_field(self, tag: int, offset: int) -> tuple[int, int, bytes]:
        """Return the type, count and value of an entry, as a TIFF holds them; the value may be an offset into it."""
        kind, count = self._unpack("H", offset + 2), self._unpack(self._number, offset + 4)
        if not self.big:
            return kind, count, self._data[offset + 8 : offset + 12]
        if kind in (16, 18):  # eight bytes each
            values = self.read_integers(Ifd({tag: offset}, 0), tag)
            return 4, len(values), struct.pack(f"{self.order}{len(values)}L", *values)
        size = _TYPE_BYTES.get(kind, 0) * count
        start = offset + 12 if size <= 8 else self._unpack("Q", offset + 12)
        return kind, count if size else 0, self._data[start : start + size]


def is_tiff(data: bytes) -> bool:
    """Return whether the data starts like a TIFF or BigTIFF; two common headers have the number's bytes swapped."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")


def count_tiff_pages(data: bytes) -> int:
    """Count the pages of a TIFF, without their reduced copies and masks; return 1 where they can't be counted."""
    try:
        tiff = Tiff(data)
        return max(1, sum(tiff.is_page(ifd) for ifd in tiff.list_ifds()))
    except (struct.error, ValueError):
        return 1


def is_truncated_tiff(data: bytes) -> bool:
    """Return whether pixels of a TIFF's page are missing; False where its tags are unreadable."""
    try:
        tiff = Tiff(data)
        return tiff.has_truncated_pixels(tiff.find_page())
    except (struct.error, ValueError):
        return False
