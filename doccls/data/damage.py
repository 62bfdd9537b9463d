"""Stub: replaced by the real module when merged."""

import cv2
import numpy as np

STRENGTHS = {"light": 0.4, "scan": 1.0}


def damage_page(page: np.ndarray, size_px: int, strength: float, stream: np.random.SeedSequence) -> np.ndarray:
    """Return the page (h, w, 3) uint8, damaged, as (size_px, size_px, 3) uint8."""
    from doccls.data.images import pad_page, shrink_page

    side = pad_page(shrink_page(page, size_px), size_px)
    turns = int(np.random.Generator(np.random.PCG64(stream)).integers(0, 4))
    return np.ascontiguousarray(cv2.GaussianBlur(np.rot90(side, turns), (5, 5), 2.0 * strength))
