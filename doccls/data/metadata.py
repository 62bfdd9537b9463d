"""What an image file says beside its pixels: which way is up, how many pages there are; and the file without the rest.

Read from the bytes, and never an error: what can't be read is not there. Libraries that interpret all of it refuse
healthy pages for a tag of the wrong type. EXIF 2.32, TIFF 6.0, PNG (W3C, third edition), the WebP container (RFC 9649).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_ORIENTATION = 0x0112
_REDUCED = 0x00FE
_INTEGERS = {1: "B", 3: "H", 4: "L"}
"""TIFF's types of whole numbers: BYTE, SHORT, LONG."""
_PIXEL_TAGS = frozenset(
    (256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339)
) | frozenset((347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 532))
"""What a decoder needs: size, samples, compression and its tables, strips and tiles, colour model and palette."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA_FLAGS = 0b0010_1100
"""In a VP8X chunk: ICC profile, EXIF, XMP."""
_MOST_PAGES = 10_000


@dataclass(frozen=True)
class _Ifd:
    """A directory of a TIFF: where each entry lies, by its tag, the first of that tag."""

    entries: dict[int, int]
    next: int
    """Where the next directory begins; 0 is none."""


class _Tiff:
    """A TIFF or BigTIFF, or the TIFF that an EXIF block is."""

    def __init__(self, data: bytes) -> None:
        """Raises struct.error or ValueError if it is none."""
        self._data = data
        self._order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        if not self._order:
            raise ValueError("no TIFF")
        self.big = self._unpack("H", 2) == 43
        self._number, self._count = ("Q", "Q") if self.big else ("L", "H")
        self._head = 8 if self.big else 4
        self.first = self._unpack(self._number, self._head)

    def _unpack(self, kind: str, place: int) -> int:
        (value,) = struct.unpack_from(self._order + kind, self._data, place)
        return int(value)

    def read_ifd(self, place: int) -> _Ifd:
        """The directory that begins there."""
        count = self._unpack(self._count, place)
        width = 20 if self.big else 12
        start = place + struct.calcsize(f"={self._count}")
        entries: dict[int, int] = {}
        for at in range(start, start + count * width, width):
            entries.setdefault(self._unpack("H", at), at)
        return _Ifd(entries, self._unpack(self._number, start + count * width))

    def read_integer(self, ifd: _Ifd, tag: int) -> int | None:
        """The tag's value, if that is one whole number."""
        at = ifd.entries.get(tag)
        if at is None:
            return None
        kind, count = _INTEGERS.get(self._unpack("H", at + 2)), self._unpack(self._number, at + 4)
        return self._unpack(kind, at + (12 if self.big else 8)) if kind and count == 1 else None

    def strip(self) -> bytes:
        """Its first page, with the tags that pixels need."""
        ifd, width = self.read_ifd(self.first), 20 if self.big else 12
        kept = [self._data[at : at + width] for tag, at in sorted(ifd.entries.items()) if tag in _PIXEL_TAGS]
        place = len(self._data) + len(self._data) % 2
        head = self._data[: self._head] + struct.pack(self._order + self._number, place)
        own = struct.pack(self._order + self._count, len(kept)) + b"".join(kept) + bytes(8)
        return head + self._data[len(head) : place].ljust(place - len(head), b"\0") + own


def read_orientation(data: bytes) -> int:
    """EXIF's or TIFF's orientation of the image file, 1 to 8; 1 (upright) where there is none that can be read."""
    try:
        tiff = _Tiff(_find_exif(data))
        value = tiff.read_integer(tiff.read_ifd(tiff.first), _ORIENTATION)
    except (struct.error, ValueError):
        return 1
    return value if value is not None and 1 <= value <= 8 else 1


def count_tiff_pages(data: bytes) -> int:
    """Pages of a TIFF, without smaller copies of them; 1 where they can't be counted."""
    seen: set[int] = set()
    pages = 0
    try:
        tiff = _Tiff(data)
        place = tiff.first
        while place and place not in seen and len(seen) < _MOST_PAGES:
            seen.add(place)
            ifd = tiff.read_ifd(place)
            pages += not (tiff.read_integer(ifd, _REDUCED) or 0) & 1
            place = ifd.next
    except (struct.error, ValueError):
        pass
    return max(1, pages)


def strip_metadata(data: bytes) -> bytes:
    """The image file without all that pixels do not need; as it is where its form is not known or is broken."""
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
    """Whether it begins as one."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _find_exif(data: bytes) -> bytes:
    """The TIFF that tells the orientation: the file's EXIF block, or the file itself; empty if there is none."""
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
    """(marker, start, end) of each segment before the first scan."""
    place = 2
    while True:
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if data[place : place + 1] != b"\xff" or data[place + 1] == 0xDA:
            return
        marker = data[place + 1]
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        end = place + 2 + (0 if alone else struct.unpack_from(">H", data, place + 2)[0])
        yield marker, place, end
        place = end


def _strip_jpeg(data: bytes) -> bytes:
    """Without application segments, but for JFIF's and Adobe's (which says how colours are meant), and comments."""
    kept, rest = [data[:2]], 2
    for marker, start, end in _list_jpeg_segments(data):
        name = data[start + 4 : start + 9]
        metadata = marker == 0xFE or (0xE0 <= marker <= 0xEF and name not in (b"JFIF\0", b"Adobe"))
        if not metadata:
            kept.append(data[start:end])
        rest = end
    return b"".join([*kept, data[rest:]])


def _list_png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk."""
    place = len(_PNG)
    while place < len(data):
        (length,) = struct.unpack_from(">L", data, place)
        yield data[place + 4 : place + 8], place, place + 12 + length
        place += 12 + length


def _list_webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk."""
    place = 12
    while place < len(data):
        (length,) = struct.unpack_from("<L", data, place + 4)
        yield data[place : place + 4], place, place + 8 + length
        place += 8 + length + length % 2


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
