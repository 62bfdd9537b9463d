"""Image formats by content: those that are read, and words for those that aren't. File names play no part."""

import re
from functools import cache

from PIL import Image

from doccls.errors import UserError

# Only the formats of IMAGE_EXTENSIONS: others (EPS, ...) start external programs. (Pillow opens MPO through JPEG.)
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "AVIF", "PPM")
_HEIF = "HEIF"  # the format that pillow-heif adds to Pillow
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2")
_AVIF_BRANDS = (b"avif", b"avis")
# Known formats that doccls doesn't read: the start of the file -> name.
_UNSUPPORTED = (
    (b"%PDF-", "a PDF"),
    (b"%!PS", "PostScript (EPS)"),
    (b"\xc5\xd0\xd3\xc6", "PostScript (EPS)"),
    (b"8BPS", "a Photoshop file (PSD)"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"AT&TFORM", "DjVu"),
    (b"\x97JB2\r\n\x1a\n", "JBIG2"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"SIMPLE  =", "FITS"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)"),
    (b"gimp xcf", "a GIMP file (XCF)"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"P7\n", "a PAM"),
    (b"FUJIFILMCCD-RAW", "a camera raw file"),
)
_OTHER_FILES = (
    (b"PK\3\4", "a ZIP archive or an office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
)
_SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml.*?\?>\s*|<!--.*?-->\s*|<!DOCTYPE svg.*?>\s*)*<(?:\w+:)?svg\b", re.S)
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)\b", re.I)


class ImageError(UserError):
    """An image file that can't be used; the message says why, the caller adds which."""


class MissingExtraError(ImageError):
    """An image file that an optional package would read."""


def is_heif(data: bytes) -> bool:
    """Return whether the data is a HEIF image other than AVIF, such as an iPhone's HEIC."""
    brands = _list_brands(data)
    return any(brand in _HEIF_BRANDS for brand in brands) and not any(brand in _AVIF_BRANDS for brand in brands)


def _list_brands(data: bytes) -> list[bytes]:
    """Return the brands of an ISO base media file, the major one first; none of another file."""
    if data[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(data[:4], "big"), len(data), 256)
    return [data[8:12], *(data[offset : offset + 4] for offset in range(16, end, 4))]


def choose_formats(data: bytes) -> tuple[str, ...]:
    """Return the formats that Pillow may take the data for.

    Raises:
        MissingExtraError: a HEIC, and the extra that reads it isn't installed.
    """
    if not is_heif(data):
        return FORMATS
    if not _register_heif():
        raise MissingExtraError("a HEIC image, which needs pillow-heif: pip install 'doccls[heic]'")
    return (_HEIF,)


@cache
def _register_heif() -> bool:
    """Add HEIF to Pillow's formats; return whether pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return _HEIF in Image.OPEN


def name_unsupported(data: bytes) -> str | None:
    """Name the file's format if it is one of images or pages that doccls doesn't read."""
    for start, name in _UNSUPPORTED:
        if data.startswith(start):
            return name
    if data[128:132] == b"DICM":
        return "DICOM"
    if _SVG.match(data[:4096]):
        return "an SVG"
    if b"%PDF-" in data[:1024]:
        return "a PDF"
    if data[4:8] == b"ftyp":
        return "a camera raw file (CR3)" if data[8:12] == b"crx " else "a video or another media file (MP4)"
    return None


def name_other_file(data: bytes) -> str | None:
    """Name the kind of a file that is no image at all, where that helps."""
    if _HTML.match(data[:256]):
        return "a web page (HTML), as a failed download leaves it"
    return next((name for start, name in _OTHER_FILES if data.startswith(start)), None)
