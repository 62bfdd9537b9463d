"""Image metadata: orientation, number of pages, and stripping of everything that pixels don't need.

Parsed from the raw bytes without ever raising: malformed metadata counts as absent. Libraries that interpret all of it
reject intact pages for one tag of the wrong type. Sources: EXIF 2.32, TIFF 6.0, PNG (W3C, third edition), the WebP
container (RFC 9649).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_ORIENTATION = 0x0112
_NEW_SUBFILE_TYPE = 0x00FE  # bit 0: a reduced-resolution copy of another page
_INTEGERS = {1: "B", 3: "H", 4: "L"}  # TIFF's integer types: BYTE, SHORT, LONG
# What a decoder needs: size, samples, compression and its tables, strips and tiles, colour model and palette.
_PIXEL_TAGS = frozenset(
    (256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339)
) | frozenset((347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 532))
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA_FLAGS = 0b0010_1100  # in a VP8X chunk: ICC profile, EXIF, XMP
_MAX_PAGES = 10_000


@dataclass(frozen=True)
class _Ifd:
    """An image file directory of a TIFF."""

    entries: dict[int, int]  # tag -> offset of its first entry
    next: int  # offset of the next directory; 0 for none


class _Tiff:
    """A TIFF or BigTIFF file, or an EXIF block, which has the same structure."""

    def __init__(self, data: bytes) -> None:
        """Parse the header.

        Raises:
            struct.error, ValueError: not a TIFF.
        """
        self._data = data
        self._order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        if not self._order:
            raise ValueError("not a TIFF")
        self.big = self._unpack("H", 2) == 43
        self._number, self._count = ("Q", "Q") if self.big else ("L", "H")
        self._head = 8 if self.big else 4
        self.first = self._unpack(self._number, self._head)

    def _unpack(self, kind: str, offset: int) -> int:
        (value,) = struct.unpack_from(self._order + kind, self._data, offset)
        return int(value)

    def read_ifd(self, start: int) -> _Ifd:
        """Read the directory at offset `start`."""
        count = self._unpack(self._count, start)
        width = 20 if self.big else 12
        start += struct.calcsize(f"={self._count}")
        entries: dict[int, int] = {}
        for offset in range(start, start + count * width, width):
            entries.setdefault(self._unpack("H", offset), offset)
        return _Ifd(entries, self._unpack(self._number, start + count * width))

    def read_integer(self, ifd: _Ifd, tag: int) -> int | None:
        """Return the tag's value if it is a single integer."""
        offset = ifd.entries.get(tag)
        if offset is None:
            return None
        kind, count = _INTEGERS.get(self._unpack("H", offset + 2)), self._unpack(self._number, offset + 4)
        return self._unpack(kind, offset + (12 if self.big else 8)) if kind and count == 1 else None

    def strip(self) -> bytes:
        """Return the file with a new directory at its end: the first page's, with only the tags that pixels need."""
        ifd, width = self.read_ifd(self.first), 20 if self.big else 12
        kept = [
            self._data[offset : offset + width] for tag, offset in sorted(ifd.entries.items()) if tag in _PIXEL_TAGS
        ]
        start = len(self._data) + len(self._data) % 2
        head = self._data[: self._head] + struct.pack(self._order + self._number, start)
        directory = struct.pack(self._order + self._count, len(kept)) + b"".join(kept) + bytes(8)
        return head + self._data[len(head) : start].ljust(start - len(head), b"\0") + directory


def read_orientation(data: bytes) -> int:
    """Return the image file's EXIF or TIFF orientation, 1 to 8; 1 (upright) if it is absent or malformed."""
    try:
        tiff = _Tiff(_find_exif(data))
        value = tiff.read_integer(tiff.read_ifd(tiff.first), _ORIENTATION)
    except (struct.error, ValueError):
        return 1
    return value if value is not None and 1 <= value <= 8 else 1


def count_tiff_pages(data: bytes) -> int:
    """Count the pages of a TIFF, without their reduced copies; return 1 where they can't be counted."""
    seen: set[int] = set()
    pages = 0
    try:
        tiff = _Tiff(data)
        offset = tiff.first
        while offset and offset not in seen and len(seen) < _MAX_PAGES:
            seen.add(offset)
            ifd = tiff.read_ifd(offset)
            pages += not (tiff.read_integer(ifd, _NEW_SUBFILE_TYPE) or 0) & 1
            offset = ifd.next
    except (struct.error, ValueError):
        pass
    return max(1, pages)


def strip_metadata(data: bytes) -> bytes:
    """Return the image file without what pixels don't need; unchanged if its format is unknown or it is malformed."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _strip_jpeg(data)
        if data.startswith(_PNG):
            kept = [data[start:end] for kind, start, end in _list_png_chunks(data) if kind in _PNG_PIXELS]
            return _PNG + b"".join(kept)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _strip_webp(data)
        if is_tiff(data):
            return _Tiff(data).strip()
    except (struct.error, ValueError):
        pass
    return data


def is_tiff(data: bytes) -> bool:
    """Return whether the data starts like a TIFF or BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _find_exif(data: bytes) -> bytes:
    """Return the TIFF structure with the orientation: the file's EXIF block, or a TIFF itself; empty if absent."""
    if data.startswith(b"\xff\xd8"):
        for kind, start, end in _list_jpeg_segments(data):
            if kind == 0xE1 and data[start + 4 : start + 10] == b"Exif\0\0":
                return data[start + 10 : end]
    elif data.startswith(_PNG):
        for name, start, end in _list_png_chunks(data):
            if name == b"eXIf":
                return data[start + 8 : end - 4].removeprefix(b"Exif\0\0")
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        for name, start, end in _list_webp_chunks(data):
            if name == b"EXIF":
                return data[start + 8 : end].removeprefix(b"Exif\0\0")
    elif is_tiff(data):
        return data
    return b""


def _list_jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment before the first scan."""
    start = 2
    while True:
        while data[start : start + 2] == b"\xff\xff":  # fill bytes
            start += 1
        if data[start : start + 1] != b"\xff" or data[start + 1] == 0xDA:
            return
        marker = data[start + 1]
        has_length = marker != 0x01 and not 0xD0 <= marker <= 0xD8
        end = start + 2 + (struct.unpack_from(">H", data, start + 2)[0] if has_length else 0)
        yield marker, start, end
        start = end


def _strip_jpeg(data: bytes) -> bytes:
    """Remove comments and application segments, except JFIF's and Adobe's, which defines the colour transform."""
    kept, tail_start = [data[:2]], 2
    for marker, start, end in _list_jpeg_segments(data):
        name = data[start + 4 : start + 9]
        is_metadata = marker == 0xFE or (0xE0 <= marker <= 0xEF and name not in (b"JFIF\0", b"Adobe"))
        if not is_metadata:
            kept.append(data[start:end])
        tail_start = end
    return b"".join([*kept, data[tail_start:]])


def _list_png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of each chunk."""
    start = len(_PNG)
    while start < len(data):
        (length,) = struct.unpack_from(">L", data, start)
        yield data[start + 4 : start + 8], start, start + 12 + length
        start += 12 + length


def _list_webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of each chunk."""
    start = 12
    while start < len(data):
        (length,) = struct.unpack_from("<L", data, start + 4)
        yield data[start : start + 4], start, start + 8 + length
        start += 8 + length + length % 2


def _strip_webp(data: bytes) -> bytes:
    kept = []
    for name, start, end in _list_webp_chunks(data):
        if name == b"VP8X":
            kept.append(
                data[start : start + 8] + bytes([data[start + 8] & ~_WEBP_METADATA_FLAGS]) + data[start + 9 : end]
            )
        elif name in _WEBP_PIXELS:
            kept.append(data[start : end + (end - start) % 2])
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<L", len(body)) + body
