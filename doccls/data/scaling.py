"""The one rule by which samples of any depth and kind are scaled to 8 bits."""

from collections.abc import Callable

import numpy as np

from doccls.data.formats import ImageError

_SIGNIFICANT_BITS = (8, 10, 12, 14, 16)  # of scanners and cameras, in samples of 16 bits or more
_NO_DATA = 1e30  # float samples of this magnitude mark pixels without data, as those of -3.4e38 that GDAL writes
_BLOCK_SAMPLES = 2**20  # that are scaled at a time
_SMALLEST_RANGE = 1e-300  # 255 divided by a smaller one is no number


def scale_to_8_bits(
    values: np.ndarray, bits: int, stated_white: int | None = None, nodata: float | None = None
) -> np.ndarray:
    """Scale samples to uint8, linearly, by a range that holds them all: nothing is clipped.

    Samples that mark missing data are black and don't count: `nodata`, and floats of a magnitude of at least 1e30. With
    a negative sample, black is the smallest and white the largest. Else black is 0, and white is

    - of packed samples of fewer than 16 bits: the largest value of their type;
    - of wider integers: `stated_white` if that is plausible, else the smallest of 2^8-1, 2^10-1, 2^12-1, 2^14-1 and
      2^16-1 (of signed 16-bit samples 2^15-1) that holds the largest sample, since scanners store 10 to 14 bits in 16;
      above that, the largest sample;
    - of floats: 1 if no sample is larger, 255 if the largest is from 128 to 255, else the largest.

    Raises:
        ImageError: samples that are not finite numbers.
    """
    if not values.size:
        return np.zeros(values.shape, np.uint8)
    values = _blacken_missing(values, nodata)
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite(highest - lowest):
        raise ImageError("the image has pixels that are not finite numbers")
    black, white = 0.0, _find_white(values.dtype, bits, highest, stated_white)
    if lowest < 0:
        black, white = lowest, highest
        if highest - lowest < _SMALLEST_RANGE:
            return np.zeros(values.shape, np.uint8)
    if values.dtype.kind == "u" and white == 65535 and values.ndim == 3 and values.shape[2] == 3:
        return (values >> 8).astype(np.uint8)  # as Pillow reads colours of 16 bits
    if values.dtype == np.uint16:  # a table takes a fraction of the time and memory
        table = _scale(np.arange(int(highest) + 1), black, white)
        return _convert_rows(values, lambda rows: table[rows])
    return _convert_rows(values, lambda rows: _scale(rows, black, white))


def _blacken_missing(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """Return the samples, those that mark missing data replaced by the smallest other one, or by 0 if that is less."""
    if nodata is None and values.dtype.kind != "f":
        return values
    missing = np.zeros(values.shape, bool)
    with np.errstate(over="ignore"):  # a number that the samples' type can't hold is none of them
        if values.dtype.kind == "f":
            missing = ((values >= _NO_DATA) | (values <= -_NO_DATA)) & np.isfinite(values)
        if nodata is not None:
            missing |= np.isnan(values) if np.isnan(nodata) else values == nodata
    return np.where(missing, values[~missing].min(initial=0), values) if missing.any() else values


def _convert_rows(values: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Convert samples to uint8 in blocks of rows, since wider numbers take many times the page's memory."""
    page = np.empty(values.shape, np.uint8)
    rows = max(1, _BLOCK_SAMPLES * len(values) // values.size)
    for start in range(0, len(values), rows):
        page[start : start + rows] = convert(values[start : start + rows])
    return page


def _scale(values: np.ndarray, black: float, white: float) -> np.ndarray:
    shades = values.astype(np.float64)
    shades -= black
    shades *= 255.0 / (white - black)
    return np.rint(shades, out=shades).astype(np.uint8)


def _find_white(kind: np.dtype, bits: int, highest: float, stated_white: int | None) -> float:
    if kind.kind == "f":
        return 1.0 if highest <= 1 else 255.0 if 128 <= highest <= 255 else highest
    largest = float(2 ** (bits - (kind.kind == "i")) - 1)
    if bits < 16:
        return largest
    if stated_white is not None and max(255.0, highest) <= stated_white <= largest:
        return float(stated_white)
    whites = (min(2.0**significant - 1, largest) for significant in _SIGNIFICANT_BITS)
    return next((white for white in whites if highest <= white), highest)
