"""Damage to pages, as scanners, phones and folders full of mixed files do it: turned, mirrored, skewed, badly lit, ...

`damage_page` is a pure function of the page, the strength and a stream of random numbers. It makes the damaged copy on
which a fold is also validated (`valid.damage`), and the damaged pages among the training pages (`augment.damage_prob`);
the two have streams of their own. The order is that of a photo: page, geometry, light, lens, sensor, file.

Lengths are relative to the side of the result, so a page has the same defects in the same places at every size. The
grain of noise is a pixel and JPEG's block eight, so these two are milder at larger sizes. Each defect has a
probability, and most have a magnitude: both are multiplied by the strength, from 0 (nothing but scaling) to 1.
"""

import math

import cv2
import numpy as np

from doccls.data import effects
from doccls.data.images import shrink_page

STRENGTHS = {"light": 0.5, "scan": 1.0}  # of the levels of `valid.damage`
_WHITE = (255, 255, 255)
# Probabilities at full strength. A change of these, of the geometry or of an effect needs a new
# `config.schema.DAMAGE_VERSION`.
_PAPER_DEFECTS: tuple[tuple[float, effects.Effect], ...] = (
    (0.15, effects.show_through),
    (0.5, effects.recolour),
)
_PHOTO_DEFECTS: tuple[tuple[float, effects.Effect], ...] = (
    (0.15, effects.lay_sheet),
    (0.25, effects.turn_grey),
    (0.5, effects.shade),
    (0.25, effects.cast_shadow),
    (0.35, effects.blur),
    (0.4, effects.add_noise),
    (0.25, effects.sprinkle),
    (0.2, effects.occlude),
    (0.25, effects.compress),
)


def damage_page(page: np.ndarray, size_px: int, strength: float, stream: np.random.SeedSequence) -> np.ndarray:
    """Return a damaged copy of a page.

    Args:
        page: (height, width, 3) uint8 RGB, without padding.
        size_px: side of the result.
        strength: from 0 to 1.
        stream: the source of all random numbers; equal streams damage a page alike.

    Returns:
        (size_px, size_px, 3) uint8, the page fitted into a square with a border of any shade.
    """
    rng = np.random.Generator(np.random.PCG64(stream))
    # From a larger page, the bilinear filter of the warp would skip pixels.
    page = shrink_page(page, min(max(page.shape[:2]), math.ceil(size_px * 5 / 4)))
    page = _apply(_PAPER_DEFECTS, page, strength, rng)
    page = _warp(page, size_px, strength, rng)
    return _apply(_PHOTO_DEFECTS, page, strength, rng)


def _apply(
    defects: tuple[tuple[float, effects.Effect], ...], page: np.ndarray, strength: float, rng: np.random.Generator
) -> np.ndarray:
    for prob, defect in defects:
        if rng.random() < prob * strength:
            page = defect(page, strength, rng)
    return page


# --- geometry --------------------------------------------------------------------------------------------------------


def _warp(page: np.ndarray, size_px: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Turn, mirror, stretch, tilt and place the page in one pass over the pixels."""
    height, width = page.shape[:2]
    corners_42 = _draw_corners(height, width, strength, rng)
    corners_42 = _fit(corners_42, size_px, strength, rng)
    source_42 = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32) - 0.5
    matrix = cv2.getPerspectiveTransform(source_42, (corners_42 - 0.5).astype(np.float32))
    border = _draw_border(strength, rng)
    size, mode = (size_px, size_px), cv2.BORDER_CONSTANT
    warped: np.ndarray = cv2.warpPerspective(
        page, matrix, size, flags=cv2.INTER_LINEAR, borderMode=mode, borderValue=border
    )
    return warped


def _draw_corners(height: int, width: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return the page's corners (4, 2) after stretching, tilting, mirroring and turning it about the origin."""
    half_w, half_h = width / 2, height / 2
    corners = np.array([[-half_w, -half_h], [half_w, -half_h], [half_w, half_h], [-half_w, half_h]])
    if rng.random() < 0.3 * strength:
        corners *= np.exp(strength * rng.uniform(-0.12, 0.12, 2))  # stretched
    if rng.random() < 0.3 * strength:
        corners += strength * rng.uniform(-0.07, 0.07, (4, 2)) * [width, height]  # tilted
    if rng.random() < 0.35 * strength:
        corners[:, 0] *= -1  # mirrored
    turns = int(rng.integers(0, 4)) if rng.random() < 0.7 * strength else 0
    angle = 90.0 * turns + _draw_angle(strength, rng)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    rotated: np.ndarray = corners @ np.array([[cos, sin], [-sin, cos]])
    return rotated


def _draw_angle(strength: float, rng: np.random.Generator) -> float:
    """Return a free rotation in degrees: mostly small, sometimes that of a page thrown onto the scanner."""
    kind = rng.random()
    if kind < 0.04 * strength:
        return float(rng.uniform(-180, 180))
    limit = 35.0 if kind < 0.3 * strength else 8.0
    return float(strength * rng.uniform(-limit, limit)) if kind < 0.75 * strength else 0.0


def _fit(corners_42: np.ndarray, size_px: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Scale and shift the corners so that the page fills the frame, with a margin or, rarely, cropped."""
    low, high = corners_42.min(axis=0), corners_42.max(axis=0)
    scale = size_px / float((high - low).max())
    if rng.random() < 0.5 * strength:
        scale *= 1 + strength * float(rng.uniform(-0.15, 0.08))
    free = size_px - scale * (high - low)
    shift = rng.uniform(0.5 - 0.5 * strength, 0.5 + 0.5 * strength, 2)
    fitted: np.ndarray = scale * (corners_42 - low) + free * shift
    return fitted


def _draw_border(strength: float, rng: np.random.Generator) -> tuple[int, ...]:
    """Return the colour around the page: white, black, or any grey or colour."""
    kind = rng.random()
    if kind >= 0.65 * strength:
        return _WHITE
    if kind < 0.2 * strength:
        return (0, 0, 0)
    grey = int(rng.integers(20, 235))
    if kind < 0.55 * strength:
        return (grey, grey, grey)
    return tuple(int(np.clip(grey + shift, 0, 255)) for shift in rng.integers(-50, 51, 3))
