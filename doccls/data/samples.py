"""Samples of more than 8 bits, signed and float samples: read from a TIFF, and scaled to 8 bits by one rule.

Pillow and OpenCV each read some of these kinds, and clip or wrap others. So Pillow only decompresses: it reads the
page's bytes as if each were a pixel, and NumPy takes them for what the tags say.
"""

import io
import re

import cv2
import numpy as np
from PIL import Image

from doccls.data.formats import ImageError
from doccls.data.tiff import (
    BITS,
    COLOUR_MAP,
    EXTRA_SAMPLES,
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
    SampleLayout,
    Tiff,
)

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
_SIGNIFICANT_BITS = (8, 10, 12, 14, 16)  # of scanners and cameras, in samples of 16 bits or more


def is_grey_or_rgb(layout: SampleLayout) -> bool:
    """Return whether `read_wide_page` knows the page's colours."""
    return layout.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)


def is_wide(layout: SampleLayout) -> bool:
    """Return whether Pillow can't read the page's samples, or not without loss; False for all ordinary pages."""
    return is_grey_or_rgb(layout) and (layout.sample_format != _UNSIGNED or layout.bits not in (1, 2, 4, 8))


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
    colours = 3 if layout.photometric == _RGB else 1
    if not _is_readable(layout, colours):
        raise ImageError(f"a TIFF of an unsupported kind: {describe_layout(layout)}")
    values = read_samples(data, layout)
    white = layout.stated_white
    page = scale_to_8_bits(values[..., :colours], layout.bits, white)
    if layout.photometric == _WHITE_IS_ZERO:
        page = 255 - page
    mode = "RGB" if colours == 3 else "L"
    alpha = layout.extra[0] if layout.extra else 2 if layout.samples == 4 and colours == 3 else 0
    if alpha in (1, 2) and layout.samples > colours:
        page = np.dstack([page, scale_to_8_bits(values[..., colours], layout.bits, white)])
        mode += "a" if alpha == 1 else "A"
    height, width = page.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(page).tobytes())


def _is_readable(layout: SampleLayout, colours: int) -> bool:
    is_predictor_known = (
        layout.predictor == 1
        or (layout.predictor == 2 and layout.bits in (8, 16, 32, 64))
        or (layout.predictor == 3 and layout.sample_format == _FLOAT)
    )
    return (
        is_predictor_known
        and layout.bits in _READABLE_BITS.get(layout.sample_format, ())
        and layout.compression in _BYTE_COMPRESSIONS
        and colours <= layout.samples <= _MAX_SAMPLES
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


def read_deep_page(data: bytes, bits: int) -> Image.Image | None:
    """Return a file of more than 8 bits per sample as an 8-bit image of mode L, RGB or RGBA; None if OpenCV can't.

    Raises:
        ImageError: see `scale_to_8_bits`.
    """
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        return None
    if values.ndim == 2:
        return Image.fromarray(scale_to_8_bits(values, bits))
    page = scale_to_8_bits(values[..., 2::-1], bits)
    if values.shape[2] == 4:
        page = np.dstack([page, scale_to_8_bits(values[..., 3], bits)])
    return Image.fromarray(np.ascontiguousarray(page))


def read_samples(data: bytes, layout: SampleLayout) -> np.ndarray:
    """Return a page's samples, (height, width, samples), in the machine's byte order."""
    planes = layout.samples if layout.is_planar else 1
    values = [_read_plane(data, layout, plane) for plane in range(planes)]
    return values[0] if planes == 1 else np.dstack(values)


def _read_plane(data: bytes, layout: SampleLayout, plane: int) -> np.ndarray:
    """Return (height, width, n): all samples of a chunky page, or one of a planar one."""
    samples = 1 if layout.is_planar else layout.samples
    block_px = layout.tile_width_px or layout.width_px
    blocks = -(-layout.width_px // block_px)
    block_bytes = -(-block_px * samples * layout.bits // 8)
    replaced: dict[int, tuple[int, ...]] = {
        WIDTH: (blocks * block_bytes,), BITS: (8,), PHOTOMETRIC: (1,), SAMPLES: (1,),
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
    with Image.open(io.BytesIO(tiff.strip(replaced)), formats=("TIFF",)) as image:
        raw = np.asarray(image).reshape(layout.height_px, blocks, block_bytes)
    values = _undo_predictor(_interpret(raw, layout, block_px * samples), layout, samples)
    return values.reshape(layout.height_px, blocks * block_px, samples)[:, : layout.width_px]


def _interpret(raw: np.ndarray, layout: SampleLayout, count: int) -> np.ndarray:
    """Return the `count` samples in each block's row of bytes: (height, blocks, count), in the machine's byte order."""
    if layout.predictor == 3:  # the row's most significant bytes come first, then the next ones, in any byte order
        size = layout.bits // 8
        planes = _accumulate(raw, 1 if layout.is_planar else layout.samples).reshape(*raw.shape[:2], size, count)
        return (
            np.ascontiguousarray(planes.swapaxes(2, 3)).view(f">f{size}").reshape(*raw.shape[:2], count).astype("=f8")
        )
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


def scale_to_8_bits(values: np.ndarray, bits: int, stated_white: int | None = None) -> np.ndarray:
    """Scale samples to uint8, linearly, by a range that holds them all: nothing is clipped.

    With a negative sample, black is the smallest and white the largest. Else black is 0, and white is

    - of packed samples of fewer than 16 bits: the largest value of their type;
    - of wider integers: `stated_white` if that is plausible, else the smallest of 2^8-1, 2^10-1, 2^12-1, 2^14-1 and
      2^16-1 that holds the largest sample, since scanners store 10 to 14 bits in 16; above that, the largest sample;
    - of floats: 1, 255 or the largest sample, the smallest that holds all.

    Raises:
        ImageError: samples that are not finite numbers.
    """
    if not values.size:
        return np.zeros(values.shape, np.uint8)
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite(highest - lowest):
        raise ImageError("the image has pixels that are not finite numbers")
    black, white = 0.0, _find_white(values.dtype, bits, highest, stated_white)
    if lowest < 0:
        black, white = lowest, highest if highest > lowest else lowest + 1
    if values.dtype.kind == "u" and white == 65535 and values.ndim == 3 and values.shape[2] == 3:
        return (values >> 8).astype(np.uint8)  # as Pillow reads colours of 16 bits
    if values.dtype == np.uint16:  # a table takes a fraction of the time and memory
        page: np.ndarray = _scale(np.arange(int(highest) + 1), black, white)[values]
        return page
    return _scale(values, black, white)


def _scale(values: np.ndarray, black: float, white: float) -> np.ndarray:
    shades: np.ndarray = np.rint((values.astype(np.float64) - black) * (255.0 / (white - black))).astype(np.uint8)
    return shades


def _find_white(kind: np.dtype, bits: int, highest: float, stated_white: int | None) -> float:
    if kind.kind == "f":
        return 1.0 if highest <= 1 else max(255.0, highest)
    largest = float(2 ** (bits - (kind.kind == "i")) - 1)
    if bits < 16:
        return largest
    if stated_white is not None and max(255.0, highest) <= stated_white <= largest:
        return float(stated_white)
    whites = (min(2.0**significant - 1, largest) for significant in _SIGNIFICANT_BITS)
    return next((white for white in whites if highest <= white), highest)
