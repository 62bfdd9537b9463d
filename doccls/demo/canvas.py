"""Ink on paper: the marks and the invented words that every demo page is made of."""

from collections.abc import Sequence
from random import Random

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
Ink = Colour | None  # None: the sheet's default.
Points = Sequence[tuple[float, float]] | NDArray[np.float64]  # (x, y)

SUPERSAMPLE = 2  # Pages are drawn larger and averaged down, which smooths every stroke.
# Typefaces: OpenCV's fonts for regular and bold. All letters of the typewriter have the width PITCH at size 1.
SANS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX)
ITALIC = (cv2.FONT_HERSHEY_SCRIPT_SIMPLEX, cv2.FONT_HERSHEY_SCRIPT_COMPLEX)
TYPEWRITER, PITCH = (cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX), 0.62
WORDS = """archive ledger copper harbour lantern quarterly motion paper signal garden process window margin summer
figure method northern engine record winter common letter bridge orchard measure stable valley simple notice index
drawer survey amber the of and to a in for with on by from that is as at it we our this""".split()  # noqa: SIM905
NOUNS = WORDS[: WORDS.index("the")]
# Handwritten digits: the corners that each stroke passes, numbered like the keys of a telephone.
DIGITS = ("24862", "428", "136479", "136597", "14639", "314697", "347964", "138", "1375931", "631469")


def palette(codes: str) -> list[Colour]:
    """Return the colours that hexadecimal codes stand for."""
    return [(red, green, blue) for red, green, blue in map(bytes.fromhex, codes.split())]


BLACK, GREY, WHITE, RED, BLUE = palette("202024 a0a4ac f4f4f0 b22c2a 243e8a")
PAPERS = palette("ffffff faf8f0 f6eeda eef0f4 e8e8e4 f4e8e8 e4f0e8 d8d0bc")
DARK_PAPERS = palette("1e2028 18283c 2c2234 24322e 343436")
INKS = palette("202024 202024 3a3a3e 282c54 46342c")
ACCENTS = palette("265496 a83430 24745c ce7a20 62428c 1c7a8c 484c54 92681c")
TINTS = palette("c8d8e4 ecd8c4 cce2ce dccce4 e4dcb8 d4d6da")


def box(x: float, y: float, width: float, height: float) -> Points:
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]


def oval(x: float, y: float, rx: float, ry: float, arc_deg: tuple[int, int] = (0, 360), corners: int = 48) -> Points:
    angle = np.radians(np.linspace(*arc_deg, corners + 1) - 90)
    return list(zip(x + rx * np.cos(angle), y + ry * np.sin(angle), strict=True))


class Canvas:
    """A sheet of paper, measured in hundredths of its longest side; `y` is the baseline of the next line."""

    def __init__(self, rng: Random, size_px: int, aspect: float, dark: bool) -> None:
        """Lay out an empty sheet whose width is `aspect` times its height and whose longest side is `size_px`."""
        self.rng, self.scale = rng, SUPERSAMPLE * size_px / 100
        self.width, self.height = min(100.0, 100 * aspect), min(100.0, 100 / aspect)
        self.paper, self.ink = (rng.choice(DARK_PAPERS), WHITE) if dark else (rng.choice(PAPERS), rng.choice(INKS))
        self.accents = [(r + 40 * dark, g + 40 * dark, b + 40 * dark) for r, g, b in rng.sample(ACCENTS, len(ACCENTS))]
        self.accent, self.tint, self.handwriting = self.accents[0], rng.choice(TINTS), rng.choice((BLUE, BLACK))
        self.face, self.em = rng.choice((SANS, SANS, SANS, ITALIC, TYPEWRITER)), rng.uniform(1.6, 2.3)
        margin = self.width * rng.uniform(0.04, 0.1)
        self.left, self.right, self.y = margin, self.width - margin, rng.uniform(6, 11)
        height_px, width_px = round(self.height * size_px / 100), round(self.width * size_px / 100)
        self.pixels: Pixels = np.full((SUPERSAMPLE * height_px, SUPERSAMPLE * width_px, 3), self.paper, np.uint8)

    def title(self, count: int) -> str:
        """Return `count` nouns in title case."""
        return " ".join(self.rng.choices(NOUNS, k=count)).title()

    def prose(self, letters: float) -> str:
        """Return a phrase of at most `letters` letters, but at least one word."""
        text = " ".join(self.rng.choices(WORDS, k=int(letters) // 4 + 2))
        return text[: max(text.rfind(" ", 0, int(letters) + 1), text.find(" "))].capitalize()

    def stroke(self, points: Points, pen: float = 0.15, ink: Ink = None) -> None:
        """Draw a line through `points`, `pen` wide."""
        px = np.rint(np.array(points) * self.scale).astype(np.int32)
        cv2.polylines(self.pixels, [px], False, ink or self.ink, max(round(pen * self.scale), 1), cv2.LINE_AA)

    def fill(self, points: Points, ink: Ink = None) -> None:
        """Fill the shape inside `points`."""
        px = np.rint(np.array(points) * self.scale).astype(np.int32)
        cv2.fillPoly(self.pixels, [px], ink or self.ink, cv2.LINE_AA)

    def text(self, x: float, y: float, text: str, size: float = 0, anchor: float = 0, ink: Ink = None) -> None:
        """Write a line on baseline `y`, bold if it starts with *, with `anchor` of its width (0 to 1) left of `x`."""
        size_px, font = (size or self.em) * self.scale, self.face[1] if text[:1] == "*" else self.face[0]
        spans = list(text.lstrip("*")) if self.face == TYPEWRITER else [text.lstrip("*")]
        widths = [cv2.getTextSize(span, font, size_px / 29, 1)[0][0] for span in spans]
        step = PITCH * size_px if self.face == TYPEWRITER else sum(widths)
        for i, (span, width) in enumerate(zip(spans, widths, strict=True)):
            origin = round(x * self.scale + (i + 0.5 - anchor * len(spans)) * step - width / 2), round(y * self.scale)
            cv2.putText(self.pixels, span, origin, font, size_px / 29, ink or self.ink, 1, cv2.LINE_AA)

    def rows(self, *rows: str) -> None:
        """Write rows of left|middle|right, in which * marks headings: large, bold and coloured."""
        for row in rows:
            for column, cell in enumerate(row.split("|")):
                size, ink = (1.8 * self.em, self.accent) if cell[:1] == "*" else (self.em, None)
                self.text((self.left, self.width / 2, self.right)[column], self.y, cell, size, column / 2, ink)
            self.y += self.em * (2.1 if "*" in row else 1.45)

    def paragraph(self, lines: int, x: float, width: float) -> None:
        """Write lines of prose between `x` and `x + width`, the last of them shorter."""
        letters = width / self.em / (PITCH if self.face == TYPEWRITER else 0.5)
        for line in range(1, lines + 1):
            text = self.prose(letters) if line < lines else self.prose(letters * self.rng.uniform(0.3, 0.9)) + "."
            self.text(x, self.y, text if line == 1 else text.lower())
            self.y += (1.4 if line < lines else 1.9) * self.em

    def digits(self, x: float, y: float, number: int, size: float, ink: Ink = None) -> None:
        """Write a number by hand with its baseline at `y`."""
        for digit in str(number):
            corners = np.array([divmod(int(key) - 1, 3)[::-1] for key in DIGITS[int(digit)]], float)
            corners += [[self.rng.gauss(0, 0.12), self.rng.gauss(0, 0.12)] for _ in corners]
            self.stroke(corners * (0.25 * size, 0.5 * size) + (x, y - size), 0.1 * size, ink or self.handwriting)
            x += 0.75 * size

    def scribble(self, x: float, y: float, width: float, size: float) -> None:
        """Write something unreadable by hand (a name, a signature) with its baseline at `y`."""
        loops = max(int(width / (self.rng.uniform(0.45, 0.7) * size)), 2)
        t = np.linspace(0, loops, 12 * loops)
        heights = [1.15, *self.rng.choices((0.22, 0.3, 0.38, 0.75, 1.0), (6, 5, 4, 3, 2), k=loops)]
        rise = size * np.interp(t, range(loops + 1), heights) * (0.5 - 0.5 * np.cos(2 * np.pi * t))
        along = width / loops * t + 0.35 * rise - 0.14 * size * np.sin(2 * np.pi * t)
        self.stroke(list(zip(x + along, y - rise, strict=True)), 0.2, self.handwriting)
