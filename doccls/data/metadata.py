"""Image metadata: orientation, and stripping of everything that pixels don't need.

Parsed from the raw bytes without ever raising: malformed metadata counts as absent. Libraries that interpret all of it
reject intact pages for one tag of the wrong type. Sources: EXIF 2.32, PNG (W3C, third edition), the WebP container
(RFC 9649).
"""

import re
import struct
from collections.abc import Iterator

from doccls.data.tiff import ORIENTATION, Tiff, is_tiff

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA_FLAGS = 0b0010_1100  # in a VP8X chunk: ICC profile, EXIF, XMP
_AVIF_EXIF = re.compile(rb"(infe.{8,10})Exif", re.DOTALL)  # the entry that gives an item this type


def read_orientation(data: bytes) -> int:
    """Return the image file's EXIF or TIFF orientation, 1 to 8; 1 (upright) if it is absent or malformed.

    In a TIFF it is that of the page. Cameras that store a thumbnail first state it once, beside the thumbnail.
    """
    try:
        tiff = Tiff(_find_exif(data))
        ifds = ([tiff.find_page()] if is_tiff(data) else []) + [tiff.read_ifd(tiff.first)]
        values = [tiff.read_integer(ifd, ORIENTATION) for ifd in ifds]
    except (struct.error, ValueError):
        return 1
    return next((value for value in values if value is not None and 1 <= value <= 8), 1)


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
            return Tiff(data).strip()
        if data[4:8] == b"ftyp":
            return _AVIF_EXIF.sub(rb"\1skip", data)
    except (struct.error, ValueError):
        pass
    return data


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


def read_jpeg_depth(data: bytes) -> int | None:
    """Return a JPEG's bits per sample; None of another file, or where no frame header is found."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        frames = (start for kind, start, _ in _list_jpeg_segments(data) if kind in _JPEG_FRAMES)
        return next((data[start + 4] for start in frames), None)
    except (struct.error, IndexError):
        return None


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
