"""Samples of more than 8 bits, signed and float samples: read from a TIFF, and other samples that Pillow can't read.

Pillow and OpenCV each read some of these kinds, and clip or wrap others. So Pillow only decompresses: it reads the
page's bytes as if each were a pixel, and NumPy takes them for what the tags say.
"""

import io
import re

import cv2
import numpy as np
from PIL import Image

from doccls.data.formats import ImageError
from doccls.data.scaling import scale_to_8_bits
from doccls.data.tiff import (
    BITS,
    COLOUR_MAP,
    EXTRA_SAMPLES,
    GDAL_NODATA,
    PHOTOMETRIC,
    PLANAR,
    PREDICTOR,
    SAMPLE_FORMAT,
    SAMPLES,
    STRIP_BYTES,
    STRIP_OFFSETS,
    TILE_BYTES,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    Tiff,
)
from doccls.data.tiff_layout import SampleLayout

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_LETTERS = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}
_KINDS = {_UNSIGNED: "unsigned", _SIGNED: "signed", _FLOAT: "float"}
# Compressions of plain bytes: none, LZW, Deflate (two numbers), PackBits, LZMA, Zstandard.
_BYTE_COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 50000)
_COMPRESSIONS = {
    1: "no compression", 2: "CCITT", 3: "CCITT fax 3", 4: "CCITT fax 4", 5: "LZW", 6: "old-style JPEG", 7: "JPEG",
    8: "Deflate", 32773: "PackBits", 32946: "Deflate", 34925: "LZMA", 50000: "Zstandard",
    33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC", 34892: "lossy JPEG",
    50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_PHOTOMETRICS = {
    0: "grey, zero is white", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "Lab",
    32803: "camera sensor", 34892: "linear raw",
}  # fmt: skip
_PNM_HEADER = re.compile(rb"P[2356](?:(?:\s|#[^\n]*\n)+\d+){2}(?:\s|#[^\n]*\n)+(\d{1,5})\s")
_READABLE_BITS = {_UNSIGNED: (*range(1, 17), 32, 64), _SIGNED: (8, 16, 32, 64), _FLOAT: (16, 32, 64)}
_MAX_SAMPLES = 8  # per pixel
_ALPHAS = (1, 2)  # of ExtraSamples: premultiplied, or not
_BLOCK_BYTES = 2**22  # of decompressed rows that are interpreted at a time


def is_grey_or_rgb(layout: SampleLayout) -> bool:
    """Return whether `read_wide_page` knows the page's colours."""
    return layout.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)


def is_wide(layout: SampleLayout) -> bool:
    """Return whether Pillow can't read the page's samples, or not without loss; False for all ordinary pages."""
    if not is_grey_or_rgb(layout):
        return False
    if layout.sample_format != _UNSIGNED or layout.bits not in (1, 2, 4, 8):
        return True
    is_planar_with_extra = layout.is_planar and layout.samples != 3
    is_reversed_negative = layout.fill_order == 2 and layout.photometric == _WHITE_IS_ZERO
    return (is_planar_with_extra or is_reversed_negative) and _is_readable(layout) and layout.bits == 8


def describe_layout(layout: SampleLayout) -> str:
    """Describe a TIFF's page in words, for an error message."""
    kind = _KINDS.get(layout.sample_format, "complex")
    colours = _PHOTOMETRICS.get(layout.photometric, f"photometric interpretation {layout.photometric}")
    compression = _COMPRESSIONS.get(layout.compression, f"compression {layout.compression}")
    return f"{layout.bits}-bit {kind} samples, {layout.samples} per pixel ({colours}), {compression}"


def read_wide_page(data: bytes, layout: SampleLayout) -> Image.Image:
    """Return a page for which `is_grey_or_rgb` as an 8-bit image of mode L, LA, La, RGB, RGBA or RGBa.

    Raises:
        ImageError: samples that this function can't read, or not finite. Decoders raise other exceptions too.
    """
    if not _is_readable(layout):
        raise ImageError(f"a TIFF of an unsupported kind: {describe_layout(layout)}")
    colours, white = _count_colours(layout), layout.stated_white
    alpha = _find_alpha(layout)
    values = read_samples(data, layout, [*range(colours), *([] if alpha is None else [alpha])])
    page = scale_to_8_bits(values[..., :colours], layout.bits, white, layout.nodata)
    if layout.photometric == _WHITE_IS_ZERO:
        page = 255 - page
    mode = "RGB" if colours == 3 else "L"
    if alpha is not None:
        page = np.dstack([page, scale_to_8_bits(values[..., colours], layout.bits, white)])
        mode += "a" if layout.extra[alpha - colours :][:1] == (1,) else "A"
    height, width = page.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(page).tobytes())


def _count_colours(layout: SampleLayout) -> int:
    return 3 if layout.photometric == _RGB else 1


def _find_alpha(layout: SampleLayout) -> int | None:
    """Return which sample of each pixel is its alpha: the first one that is stated, or the fourth of an RGB page."""
    colours = _count_colours(layout)
    kinds = layout.extra or ((2,) if colours == 3 and layout.samples == 4 else ())
    alphas = (colours + index for index, kind in enumerate(kinds) if kind in _ALPHAS)
    return next((alpha for alpha in alphas if alpha < layout.samples), None)


def _is_readable(layout: SampleLayout) -> bool:
    is_predictor_known = (
        layout.predictor == 1
        or (layout.predictor == 2 and layout.bits in (8, 16, 32, 64))
        or (layout.predictor == 3 and layout.sample_format == _FLOAT)
    )
    return (
        is_predictor_known
        and layout.bits in _READABLE_BITS.get(layout.sample_format, ())
        and layout.compression in _BYTE_COMPRESSIONS
        and _count_colours(layout) <= layout.samples <= _MAX_SAMPLES
    )


def find_lost_bits(data: bytes, image: Image.Image) -> int | None:
    """Return the bits per sample of a file whose samples Pillow reads with loss; None of all others.

    - PNG of 16-bit colours: Pillow drops their lower bytes, in which a scan of 10 to 14 bits has most of its shades.
    - JPEG 2000 of more than 8 bits: Pillow wraps white to black in colours, and moves grey to 16 bits.
    - PPM of 16 bits, likewise.
    """
    if image.format == "PNG" and data[24] == 16 and image.mode in ("RGB", "RGBA", "LA"):
        colours = np.asarray(image)[..., : 1 if image.mode == "LA" else 3]
        return 16 if colours.max(initial=0) < 64 else None
    if image.format == "JPEG2000":
        start = data.find(b"\xff\x4f\xff\x51")  # the codestream: SOC and SIZ
        bits = (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 8
        return bits if bits > 8 else None
    if image.format == "PPM":
        header = _PNM_HEADER.match(data)
        return 16 if header and int(header[1]) == 65535 else None
    return None


def read_short_palette(data: bytes) -> list[int] | None:
    """Return the palette of a TIFF (R, G, B, R, ...) if its 16-bit entries hold 8 bits, as of old writers; else None.

    As in libtiff, a palette without any entry above 255 is of this kind. Pillow takes it for black.
    """
    tiff = Tiff(data)
    values = tiff.read_integers(tiff.find_page(), COLOUR_MAP)
    if not values or len(values) % 3 or max(values) > 255:
        return None
    third = len(values) // 3
    return [values[colour * third + entry] for entry in range(third) for colour in range(3)]


def read_deep_page(data: bytes, bits: int) -> Image.Image | None:
    """Return a file of more than 8 bits per sample as an 8-bit image of mode L, RGB or RGBA; None if OpenCV can't.

    Raises:
        ImageError: see `scale_to_8_bits`.
    """
    if data[:2] in (b"P2", b"P3"):  # OpenCV wants a line break behind the last number
        data += b"\n"
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        return None
    if values.ndim == 2:
        return Image.fromarray(scale_to_8_bits(values, bits))
    page = scale_to_8_bits(values[..., 2::-1], bits)
    if values.shape[2] == 4:
        page = np.dstack([page, scale_to_8_bits(values[..., 3], bits)])
    return Image.fromarray(np.ascontiguousarray(page))


def read_samples(data: bytes, layout: SampleLayout, kept: list[int]) -> np.ndarray:
    """Return those samples of each pixel that `kept` lists, (height, width, kept), in the machine's byte order."""
    if not layout.is_planar:
        return _read_plane(data, layout, 0, kept)
    first = _read_plane(data, layout, kept[0], [0])
    values = np.empty((*first.shape[:2], len(kept)), first.dtype)
    values[..., :1] = first
    for index, plane in enumerate(kept[1:], start=1):
        values[..., index : index + 1] = _read_plane(data, layout, plane, [0])
    return values


def _read_plane(data: bytes, layout: SampleLayout, plane: int, kept: list[int]) -> np.ndarray:
    """Return the `kept` samples of a chunky page's only plane, or the only one of a planar page's: (height, width, n).

    The rows are interpreted in blocks, so that a page takes little more memory than its bytes and its kept samples.
    """
    samples = 1 if layout.is_planar else layout.samples
    block_px = layout.tile_width_px or layout.width_px
    blocks = -(-layout.width_px // block_px)
    block_bytes = -(-block_px * samples * layout.bits // 8)
    replaced: dict[int, tuple[int, ...]] = {
        WIDTH: (blocks * block_bytes,), BITS: (8,), PHOTOMETRIC: (1,), SAMPLES: (1,), GDAL_NODATA: (),
        PLANAR: (), PREDICTOR: (), SAMPLE_FORMAT: (), EXTRA_SAMPLES: (), COLOUR_MAP: (),
    }  # fmt: skip
    if layout.tile_width_px:
        replaced[TILE_WIDTH] = (block_bytes,)
    tiff = Tiff(data)
    if layout.is_planar:
        ifd = tiff.find_page()
        for tag in (STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES):
            parts = tiff.read_integers(ifd, tag)
            count = len(parts) // layout.samples
            if parts:
                replaced[tag] = parts[plane * count : (plane + 1) * count]
    rows = max(1, _BLOCK_BYTES // (blocks * block_bytes))
    page: np.ndarray | None = None
    with Image.open(io.BytesIO(tiff.strip(replaced)), formats=("TIFF",)) as image:
        for top in range(0, layout.height_px, rows):
            bottom = min(top + rows, layout.height_px)
            raw = np.asarray(image.crop((0, top, blocks * block_bytes, bottom))).reshape(-1, blocks, block_bytes)
            values = _undo_predictor(_interpret(raw, layout, block_px * samples), layout, samples)
            values = values.reshape(bottom - top, blocks * block_px, samples)[:, : layout.width_px]
            if page is None:
                page = np.empty((layout.height_px, layout.width_px, len(kept)), values.dtype)
            for index, sample in enumerate(kept):
                page[top:bottom, :, index] = values[..., sample]
    assert page is not None
    return page


def _interpret(raw: np.ndarray, layout: SampleLayout, count: int) -> np.ndarray:
    """Return the `count` samples in each block's row of bytes: (height, blocks, count), in the machine's byte order."""
    if layout.predictor == 3:  # the row's most significant bytes come first, then the next ones, in any byte order
        size = layout.bits // 8
        planes = _accumulate(raw, 1 if layout.is_planar else layout.samples).reshape(*raw.shape[:2], size, count)
        values = np.ascontiguousarray(planes.swapaxes(2, 3)).view(f">f{size}").reshape(*raw.shape[:2], count)
        return values.astype(f"=f{size}")
    if layout.bits in (8, 16, 32, 64):
        # Differences are taken of whole numbers, floats too.
        letter = "u" if layout.predictor == 2 else _LETTERS[layout.sample_format]
        kind = np.dtype(f"{layout.order}{letter}{layout.bits // 8}")
        return np.ascontiguousarray(raw).view(kind).astype(kind.newbyteorder("="))
    bits = np.unpackbits(raw, axis=2, count=count * layout.bits).reshape(*raw.shape[:2], count, layout.bits)
    values = np.zeros(bits.shape[:3], np.uint16)
    for bit in range(layout.bits):  # the most significant one first, in any byte order
        values <<= 1
        values |= bits[..., bit]
    return values


def _undo_predictor(values: np.ndarray, layout: SampleLayout, samples: int) -> np.ndarray:
    """Undo horizontal differencing."""
    if layout.predictor != 2:
        return values
    return _accumulate(values, samples).view(f"={_LETTERS[layout.sample_format]}{values.dtype.itemsize}")


def _accumulate(values: np.ndarray, samples: int) -> np.ndarray:
    """Add up each sample along its row, (rows, blocks, row), wrapping as the values' type does."""
    pixels = values.reshape(*values.shape[:2], -1, samples)
    return np.cumsum(pixels, axis=2, dtype=values.dtype).reshape(values.shape)
