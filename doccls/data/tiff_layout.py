"""How a TIFF's page stores its samples, as its tags state it."""

import struct
from dataclasses import dataclass

from doccls.data.tiff import (
    BITS,
    COMPRESSION,
    EXTRA_SAMPLES,
    FILL_ORDER,
    GDAL_NODATA,
    HEIGHT,
    MAX_SAMPLE,
    MAX_SAMPLES_PER_PIXEL,
    PLANAR,
    PREDICTOR,
    SAMPLE_FORMAT,
    SAMPLES,
    TILE_HEIGHT,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    Tiff,
)

_PREDICTED = (5, 8, 32946, 34925, 50000)  # the compressions that heed the predictor: LZW, Deflate, LZMA, Zstandard


@dataclass(frozen=True)
class SampleLayout:
    """How a TIFF's page stores its samples."""

    order: str  # "<" or ">"
    width_px: int
    height_px: int
    bits: int  # per sample
    samples: int  # per pixel
    sample_format: int  # 1 unsigned, 2 signed, 3 float
    photometric: int  # 0 grey whose zero is white, 1 grey whose zero is black, 2 RGB, ...
    extra: tuple[int, ...]  # samples beside the colours: 0 unspecified, 1 premultiplied alpha, 2 alpha
    compression: int
    predictor: int
    is_planar: bool  # each sample of the pixel in strips of its own
    tile_width_px: int | None  # None for strips
    tile_height_px: int | None
    fill_order: int  # 2 for bytes whose bits are reversed
    stated_white: int | None  # MaxSampleValue
    nodata: float | None  # the sample that marks missing data, possibly NaN

    @property
    def padded_width_px(self) -> int:
        """The width of a row of the page's tiles."""
        tile = self.tile_width_px or self.width_px
        return -(-self.width_px // tile) * tile


def read_layout(data: bytes) -> SampleLayout | None:
    """Return the layout of a TIFF's page; None if a tag that states it is missing or contradicts another."""
    try:
        tiff = Tiff(data)
        ifd = tiff.find_page()
        first = {tag: (tiff.read_integers(ifd, tag, 1) or (None,))[0] for tag in ifd.entries}
        bits = tiff.read_integers(ifd, BITS, MAX_SAMPLES_PER_PIXEL) or (1,)
        formats = tiff.read_integers(ifd, SAMPLE_FORMAT, MAX_SAMPLES_PER_PIXEL) or (1,)
        extra = tiff.read_integers(ifd, EXTRA_SAMPLES, MAX_SAMPLES_PER_PIXEL)
        photometric = tiff.read_photometric(ifd)
        nodata = tiff.read_number(ifd, GDAL_NODATA)
    except (struct.error, ValueError):
        return None
    width, height, samples = first.get(WIDTH), first.get(HEIGHT), first.get(SAMPLES) or 1
    compression = first.get(COMPRESSION) or 1
    tile_width = first.get(TILE_WIDTH) if TILE_OFFSETS in ifd.entries else None
    if not width or not height or len(set(bits)) > 1 or len(set(formats)) > 1:
        return None
    return SampleLayout(
        order=tiff.order,
        width_px=width,
        height_px=height,
        bits=bits[0],
        samples=samples,
        sample_format=1 if formats[0] in (0, 4) else formats[0],  # 4: undefined; 0 isn't allowed, but written
        photometric=photometric,
        extra=extra,
        compression=compression,
        predictor=(first.get(PREDICTOR) or 1) if compression in _PREDICTED else 1,
        is_planar=first.get(PLANAR) == 2 and samples > 1,
        tile_width_px=tile_width or None,
        tile_height_px=first.get(TILE_HEIGHT) if tile_width else None,
        fill_order=first.get(FILL_ORDER) or 1,
        stated_white=first.get(MAX_SAMPLE),
        nodata=nodata,
    )
