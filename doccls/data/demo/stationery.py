"""What several kinds of page share: sheets, letterheads, addresses, dates, ruled grids."""

import numpy as np

from doccls.data.demo.canvas import Canvas, pick, roll, title

PORTRAIT = (0.707, 0.707, 0.773, 0.82)
LANDSCAPE = (1.333, 1.414, 1.6, 1.778)


def take_sheet(rng: np.random.Generator, size_px: int, wide: float = 0.0) -> Canvas:
    """Return an empty sheet of ordinary paper, which lies on its long side with probability `wide`."""
    return Canvas(rng, pick(rng, LANDSCAPE[:2] if rng.random() < wide else PORTRAIT), size_px)


def draw_logo(c: Canvas, x: float, y: float, size: float) -> None:
    if c.rng.random() < 0.5:
        c.ellipse(x, y, size, size, fill=c.accent)
        c.ellipse(x, y, size / 2, size / 2, fill=c.paper)
    else:
        c.polygon([(x - size, y + size), (x, y - size), (x + size, y + size)], c.accent)


def write_address(c: Canvas, x: float, y: float, anchor: str = "left") -> float:
    """Write an invented name and address and return the baseline below it."""
    street, town = f"{roll(c.rng, 1, 99)} {title(c.rng, 1)} Road", f"{title(c.rng, 1)} {roll(c.rng, 10000, 90000)}"
    for line in (title(c.rng, 2), street, town):
        c.text(x, y, line, anchor=anchor)
        y += 1.4 * c.em
    return y


def invent_date(c: Canvas) -> str:
    return f"{roll(c.rng, 1, 29)} {pick(c.rng, ('March', 'May', 'June', 'October'))} {roll(c.rng, 1990, 2026)}"


def draw_grid(c: Canvas, x: list[float], y0: float, step: float, rows: int, style: int) -> None:
    """Rule a table with columns between `x`: full grid (0), level rules only (1), stripes (2), three rules (3)."""
    end = y0 + rows * step
    if style == 2:
        for row in range(1, rows, 2):
            c.box(x[0], y0 + row * step, x[-1], y0 + (row + 1) * step, fill=c.shade(0.13, c.accent))
    for row in range(rows + 1):
        if style < 2 or row in (0, 1, rows):
            c.rule(x[0], y0 + row * step, x[-1], y0 + row * step, 0.25 if row in (0, 1, rows) else 0.1)
    for column in x if style == 0 else []:
        c.rule(column, y0, column, end, 0.1)
