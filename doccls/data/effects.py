"""Defects of scanned and photographed pages, one function each, on OpenCV and NumPy.

Each function takes a page (height, width, 3) uint8 RGB, a strength from 0 to 1 that scales the magnitude, and a
generator, and returns a page of the same shape. Lengths are relative to the side, except for the grain of noise and the
blocks of JPEG, and the number of draws does not depend on it. So a page has the same defects in the same places at
every size. The functions may change the page that they are given.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

Effect = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

_NOISE_SIDE_PX = 512
_NOISE_SD = 24.0  # of the noise field, whose values are stored around 128
_SHEET_LINES = 6  # of print, on a sheet that covers part of the page
_GAIN_PX = 24  # side of the coarse map of light, which is smooth
_PAPERS = ((1.0, 1.0, 1.0), (0.95, 0.96, 1.0), (1.0, 0.97, 0.88), (1.0, 0.93, 0.8), (0.95, 1.0, 0.95))  # RGB


# --- the sheet and its light -----------------------------------------------------------------------------------------


def show_through(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Let the back of the sheet show through: the mirrored page, faint and blurred, multiplied onto it."""
    share = strength * rng.uniform(0.08, 0.3)
    back = cv2.blur(page[:, ::-1], (3, 3))
    faint = cv2.addWeighted(back, share, back, 0.0, 255.0 * (1 - share))
    shown: np.ndarray = cv2.multiply(page, faint, scale=1 / 255)
    return shown


def turn_grey(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Remove the colour."""
    grey: np.ndarray = cv2.cvtColor(cv2.cvtColor(page, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return grey


def recolour(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Darken and tint the paper and lighten the ink: a linear map per channel."""
    tint = np.array(_PAPERS[int(rng.integers(len(_PAPERS)))])
    ink = strength * rng.uniform(0, 70)
    paper = (255 - strength * rng.uniform(0, 110)) * (1 - strength * (1 - tint))
    table = ink + (paper - ink) * np.arange(256)[:, None] / 255
    recoloured: np.ndarray = cv2.LUT(page, np.clip(np.rint(table), 0, 255).astype(np.uint8)[None])
    return recoloured


def shade(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Darken the page towards one side, along a fold, or away from a lamp."""
    across, along = _draw_axes(rng)
    kind, depth = int(rng.integers(3)), strength * rng.uniform(0.15, 0.6)
    if kind == 0:
        dark = (across + 1) / 2
    elif kind == 1:
        dark = np.exp(-(((across - rng.uniform(-0.8, 0.8)) / rng.uniform(0.15, 0.5)) ** 2))
    else:
        dark = np.minimum(1, ((across - rng.uniform(-0.6, 0.6)) ** 2 + (along - rng.uniform(-0.6, 0.6)) ** 2) / 2)
    return _multiply(page, 1 - depth * dark)


def cast_shadow(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Cast the shadow of a hand or phone, with a straight or round edge."""
    across, along = _draw_axes(rng)
    if rng.random() < 0.5:
        distance = across - rng.uniform(-0.5, 0.7)
    else:
        distance = rng.uniform(0.4, 0.9) - np.hypot(across - rng.choice((-1, 1)), along - rng.uniform(-1, 1))
    softness = rng.uniform(0.05, 0.3)
    dark = np.clip(distance / softness + 0.5, 0, 1)
    return _multiply(page, 1 - strength * rng.uniform(0.25, 0.6) * dark)


def _draw_axes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return two perpendicular coordinates of the coarse map in a random direction, about -1 to 1 each."""
    line = np.linspace(-1, 1, _GAIN_PX)
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * line + sin * line[:, None], cos * line[:, None] - sin * line


def _multiply(page: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Multiply the page by a coarse map of values up to 1."""
    coarse = np.rint(255 * np.clip(gain, 0, 1)).astype(np.uint8)
    fine = cv2.resize(coarse, page.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    darkened: np.ndarray = cv2.multiply(page, cv2.cvtColor(fine, cv2.COLOR_GRAY2RGB), scale=1 / 255)
    return darkened


def lay_sheet(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Lay another sheet over one edge of the page: paper with a dark edge and a few lines of print."""
    edge, depth = int(rng.integers(4)), strength * rng.uniform(0.05, 0.3)
    tilt, paper, ink = strength * rng.uniform(-0.12, 0.12), int(rng.integers(150, 256)), int(rng.integers(0, 100))
    starts, ends = rng.uniform(0, 0.4, _SHEET_LINES).tolist(), rng.uniform(0.5, 1, _SHEET_LINES).tolist()

    def place(along: float, offset: float) -> tuple[int, int]:
        """Return the pixel at the fraction `along` of the sheet's edge, `offset` sides inside the sheet."""
        x, y = along, 1 - depth + tilt * (along - 0.5) + offset
        for _ in range(edge):
            x, y = y, 1 - x
        return round(x * page.shape[1]), round(y * page.shape[0])

    corners = np.array([place(0, 0), place(1, 0), place(1, 1), place(0, 1)], np.int32)
    thickness = max(1, round(max(page.shape[:2]) / 200))
    cv2.fillConvexPoly(page, corners, (paper,) * 3, cv2.LINE_AA)
    cv2.line(page, place(0, 0), place(1, 0), (paper // 2,) * 3, thickness, cv2.LINE_AA)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
        offset = 0.04 * number
        cv2.line(page, place(start, offset), place(end, offset), (ink,) * 3, thickness, cv2.LINE_AA)
    return page


# --- lens, sensor and file -------------------------------------------------------------------------------------------


def blur(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Blur the page: out of focus, moved during the exposure, or stored at a lower resolution."""
    height, width = page.shape[:2]
    side, kind = max(height, width), int(rng.integers(3))
    blurred: np.ndarray
    if kind == 0:
        blurred = cv2.GaussianBlur(page, (0, 0), max(0.4, strength * side * rng.uniform(0.002, 0.006)))
    elif kind == 1:
        blurred = cv2.filter2D(page, -1, _draw_motion(max(2.0, strength * side * rng.uniform(0.006, 0.025)), rng))
    else:
        share = 1 - strength * rng.uniform(0.3, 0.65)
        small = cv2.resize(page, (math.ceil(share * width), math.ceil(share * height)), interpolation=cv2.INTER_AREA)
        blurred = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    return blurred


def _draw_motion(length_px: float, rng: np.random.Generator) -> np.ndarray:
    """Return the kernel of a straight movement in a random direction."""
    side = 2 * math.ceil(length_px / 2) + 1
    angle, centre, scale = rng.uniform(0, math.pi), side // 2, 16
    offset = np.array([math.cos(angle), math.sin(angle)]) * length_px / 2
    start, end = (np.rint((centre + sign * offset) * scale).astype(int).tolist() for sign in (-1, 1))
    kernel = np.zeros((side, side), np.uint8)
    cv2.line(kernel, start, end, 255, 1, cv2.LINE_AA, shift=4)
    weights: np.ndarray = kernel.astype(np.float32) / max(1.0, float(kernel.sum()))
    return weights


def add_noise(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Add sensor noise with a standard deviation of up to 20 of 255: grey, or in colour."""
    height, width = page.shape[:2]
    factor, is_coloured = strength * rng.uniform(3, 20) / _NOISE_SD, rng.random() < 0.3
    field = _make_noise(max(height, width))
    offsets = rng.integers(0, _NOISE_SIDE_PX, (3 if is_coloured else 1, 2)).tolist()
    windows = [field[y : y + height, x : x + width] for y, x in offsets]
    noise = cv2.merge(windows if is_coloured else 3 * windows)
    noisy: np.ndarray = cv2.addWeighted(page, 1.0, noise, factor, -128 * factor)
    return noisy


@lru_cache(maxsize=2)
def _make_noise(side_px: int) -> np.ndarray:
    """Return normal noise, of which windows of up to side_px are cut: drawing it anew takes ten times as long."""
    rng = np.random.Generator(np.random.PCG64(0))
    tile = np.clip(np.rint(rng.normal(128, _NOISE_SD, (_NOISE_SIDE_PX, _NOISE_SIDE_PX))), 0, 255).astype(np.uint8)
    field: np.ndarray = cv2.copyMakeBorder(tile, 0, side_px, 0, side_px, cv2.BORDER_WRAP)
    return field


def sprinkle(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Set up to 1.5 % of the pixels to black or white (salt and pepper)."""
    height, width = page.shape[:2]
    count = round(height * width * strength * rng.uniform(0.001, 0.015))
    # A generator of their own: the later draws of `rng` must not depend on the number of pixels.
    grains = np.random.Generator(np.random.PCG64(int(rng.integers(2**32))))
    rows, columns = grains.integers(0, height, count), grains.integers(0, width, count)
    page[rows, columns] = 0
    page[rows[: count // 2], columns[: count // 2]] = 255
    return page


def occlude(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Cover a part of the page, as a finger, a note or a stamp does."""
    height, width = page.shape[:2]
    for _ in range(int(rng.integers(1, 3))):
        half_w, half_h = (max(height, width) * strength * rng.uniform(0.03, 0.125, 2)).astype(int).tolist()
        x, y = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        shade = int(rng.integers(0, 256)) if rng.random() < 0.5 else 0
        cv2.rectangle(page, (x - half_w, y - half_h), (x + half_w, y + half_h), (shade,) * 3, cv2.FILLED)
    return page


def compress(page: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Store the page as a JPEG file of low quality."""
    quality = round(95 - strength * rng.uniform(25, 75))
    encoded = cv2.imencode(".jpg", page, (cv2.IMWRITE_JPEG_QUALITY, quality))[1]  # channels swapped, and swapped back
    compressed: np.ndarray | None = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert compressed is not None
    return compressed
