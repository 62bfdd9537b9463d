"""All kinds of document, by name."""

from collections.abc import Callable
from typing import Final

import numpy as np

from doccls.data.demo.canvas import Canvas, Pixels
from doccls.data.demo.figure_pages import draw_chart, draw_code_listing, draw_id_card, draw_music_score, draw_slide
from doccls.data.demo.text_pages import (
    draw_article,
    draw_exam_sheet,
    draw_form,
    draw_invoice,
    draw_letter,
    draw_receipt,
    draw_table,
)

DRAWINGS: Final[dict[str, Callable[[np.random.Generator, int], Canvas]]] = {
    "letter": draw_letter,
    "invoice": draw_invoice,
    "receipt": draw_receipt,
    "form": draw_form,
    "table": draw_table,
    "chart": draw_chart,
    "slide": draw_slide,
    "id_card": draw_id_card,
    "code_listing": draw_code_listing,
    "exam_sheet": draw_exam_sheet,
    "article": draw_article,
    "music_score": draw_music_score,
}
CLASSES: Final[tuple[str, ...]] = tuple(DRAWINGS)


def draw_page(class_name: str, rng: np.random.Generator, size_px: int) -> Pixels:
    """Draw one clean page of a class, everything about it decided by `rng`.

    Returns uint8 H x W x 3 RGB whose longest side is `size_px` pixels. Raises KeyError for a name not in `CLASSES`, and
    ValueError where `size_px` is under 32, too small for any writing.
    """
    if size_px < 32:
        raise ValueError(f"size_px must be at least 32, got {size_px}")
    return DRAWINGS[class_name](rng, size_px).finish()
