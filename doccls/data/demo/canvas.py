"""Ink on paper: the few marks that every demo page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
Item = TypeVar("Item")

# Pages are drawn larger and averaged down: smooth strokes without an antialiased primitive for each.
SUPERSAMPLE = 2

BLACK: Colour = (32, 32, 36)
RED: Colour = (178, 44, 42)
BLUE: Colour = (36, 62, 138)
PAPERS: tuple[Colour, ...] = (
    (255, 255, 255), (250, 248, 240), (246, 238, 218), (238, 240, 244),
    (232, 232, 228), (244, 232, 232), (228, 240, 232), (216, 208, 188),
)  # fmt: skip
INKS: tuple[Colour, ...] = (BLACK, BLACK, (58, 58, 62), (40, 44, 84), (70, 52, 44))
ACCENTS: tuple[Colour, ...] = (
    (38, 84, 150), (168, 52, 48), (36, 116, 92), (206, 122, 32),
    (98, 66, 140), (28, 122, 140), (72, 76, 84), (146, 104, 28),
)  # fmt: skip

WORDS = tuple(
    """
    archive ledger copper harbour lantern quarterly motion paper signal garden process window margin summer figure
    method northern engine record winter common letter bridge orchard measure stable valley simple notice index
    drawer survey amber report output carbon storage river pencil budget meeting silver station column policy island
    canvas the of and to a in for with on by from that is as at it we our this
    """.split()  # noqa: SIM905 - a list of sixty quoted words reads worse
)
NOUNS = tuple(word for word in WORDS if len(word) > 4)


def roll(rng: np.random.Generator, low: int, high: int) -> int:
    """Return a whole number from `low` up to, but without, `high`."""
    return int(rng.integers(low, high))


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """Return one of `items`, each as likely as the others."""
    return items[roll(rng, 0, len(items))]


def prose(rng: np.random.Generator, letters: int) -> str:
    """Return running words, at most `letters` characters long (but always one word)."""
    text = " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=letters // 4 + 2))
    return text[: max(text.rfind(" ", 0, letters + 1), text.find(" "))]


def title(rng: np.random.Generator, count: int) -> str:
    """Return `count` nouns in title case."""
    return " ".join(pick(rng, NOUNS).capitalize() for _ in range(count))


def amount(rng: np.random.Generator, top: int) -> float:
    """Return a price from 1.00 up to `top`, in whole cents."""
    return roll(rng, 100, 100 * top) / 100


class Face(NamedTuple):
    """A typeface: OpenCV's fonts for regular and bold, or Pillow's own font where those are None."""

    regular: int | None
    bold: int | None
    slant: float = 0.0
    mono: bool = False


SANS = Face(cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX)
GROTESK = Face(None, None)
TYPEWRITER = Face(cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, mono=True)
LIGHT = Face(cv2.FONT_HERSHEY_SCRIPT_SIMPLEX, cv2.FONT_HERSHEY_SCRIPT_COMPLEX, slant=-0.15)


@lru_cache(maxsize=64)
def _pillow_font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("the demo pages need a Pillow that was built with FreeType")
    return font


@lru_cache(maxsize=1)
def _digit_masks() -> dict[str, list[Pixels]]:
    """Return scikit-learn's real handwritten digits by their name, each uint8 8 x 8 (255 is ink)."""
    flat, values = load_digits(return_X_y=True)
    masks = (np.asarray(flat).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return {str(value): list(masks[values == value]) for value in range(10)}


@lru_cache(maxsize=4096)
def _width_px(text: str, font: int, scale: float) -> int:
    return int(cv2.getTextSize(text, font, scale, 1)[0][0])


def _text_mask(text: str, face: Face, size_px: float, bold: bool) -> tuple[Pixels, int]:
    """Return the ink of one line (uint8 H x W, 255 is ink) and the row of its baseline."""
    base = round(size_px) + 2
    font = face.bold if bold else face.regular
    if font is None:
        pillow_font = _pillow_font(max(round(size_px), 4))
        image = Image.new("L", (int(pillow_font.getlength(text)) + base, base + base // 2))
        ImageDraw.Draw(image).text((1, base), text, 255, pillow_font, anchor="ls", stroke_width=0.3 if bold else 0)
        mask = np.array(image)
    else:
        scale, advance = size_px / 29, 0.62 * size_px
        width = advance * len(text) if face.mono else _width_px(text, font, scale)
        mask = np.zeros((base + base // 2, int(width) + base), np.uint8)
        for i, part in enumerate(text if face.mono else [text]):
            left = (i + 0.5) * advance - _width_px(part, font, scale) / 2 if face.mono else 0
            cv2.putText(mask, part, (1 + round(left), base), font, scale, (255,), 1, cv2.LINE_AA)
    if face.slant:
        shear = np.array([[1, -face.slant, face.slant * base], [0, 1, 0]])
        mask = cv2.warpAffine(mask, shear, mask.shape[::-1]).astype(np.uint8)
    used = np.flatnonzero(mask.any(axis=0))
    return mask[:, : int(used[-1]) + 2 if used.size else 1], base


class Canvas:
    """A sheet of paper. Lengths are in hundredths of its longest side; y grows downwards.

    `width` and `height` are the sheet's sides in that unit, so the larger is 100; `em` is the size of its body text.
    """

    def __init__(
        self, rng: np.random.Generator, aspect: float, size_px: int, *, paper: Colour | None = None,
        ink: Colour | None = None,
    ) -> None:  # fmt: skip
        """Lay out an empty sheet whose width is `aspect` times its height and whose longest side is `size_px`."""
        self.rng = rng
        self.width, self.height = (100.0, 100 / aspect) if aspect > 1 else (100 * aspect, 100.0)
        self.size_px = size_px
        self.scale = SUPERSAMPLE * size_px / 100
        self.paper = paper or pick(rng, PAPERS)
        self.ink = ink or pick(rng, INKS)
        self.accent = pick(rng, ACCENTS)
        face = pick(rng, (SANS, SANS, SANS, GROTESK, TYPEWRITER, LIGHT))
        self.face = face._replace(slant=0.2) if rng.random() < 0.12 else face
        self.em = float(rng.uniform(1.6, 2.3))
        self.margin = float(rng.uniform(5, 12)) * self.width / 100
        shape = (max(round(self.height * self.scale), 1), max(round(self.width * self.scale), 1), 3)
        self.pixels: Pixels = np.full(shape, self.paper, np.uint8)

    def shade(self, amount: float, colour: Colour | None = None) -> Colour:
        """Return the paper's colour mixed with `amount` (0 to 1) of `colour` (the ink where None)."""
        over = self.ink if colour is None else colour
        red, green, blue = (round(p + (c - p) * amount) for p, c in zip(self.paper, over, strict=True))
        return red, green, blue

    def _px(self, *points: tuple[float, float]) -> NDArray[np.int32]:
        return np.rint(np.array(points) * self.scale).astype(np.int32)

    def _pen_px(self, width: float) -> int:
        return max(round(width * self.scale), 1)

    def _stamp(self, mask: Pixels, left: int, top: int, colour: Colour) -> None:
        """Blend `colour` in where `mask` has ink; what falls outside the sheet is lost."""
        rows, columns = self.pixels.shape[:2]
        mask = mask[max(-top, 0) : max(rows - top, 0), max(-left, 0) : max(columns - left, 0)]
        top, left = max(top, 0), max(left, 0)
        under = self.pixels[top : top + mask.shape[0], left : left + mask.shape[1]]
        share = mask[..., None].astype(np.float32) / 255
        under[:] = np.rint(under + (np.array(colour, np.float32) - under) * share).astype(np.uint8)

    def text(
        self, x: float, y: float, text: str, size: float | None = None, *, bold: bool = False, anchor: str = "left",
        ink: Colour | None = None, face: Face | None = None, fit: float | None = None,
    ) -> float:  # fmt: skip
        """Write one line with its baseline at `y`, and return its width.

        `anchor` (left, middle, right) says which point of the line `x` is; `fit` stretches or squeezes it to a width.
        """
        mask, base = _text_mask(text, face or self.face, (size or self.em) * self.scale, bold)
        if fit is not None:
            mask = cv2.resize(mask, (max(round(fit * self.scale), 1), mask.shape[0])).astype(np.uint8)
        width = float(mask.shape[1] / self.scale)
        left = x - width * {"left": 0.0, "middle": 0.5, "right": 1.0}[anchor]
        self._stamp(mask, round(left * self.scale), round(y * self.scale) - base, ink or self.ink)
        return width

    def paragraph(
        self, x: float, y: float, width: float, lines: int, size: float | None = None, *, justify: bool = True,
        lead: float = 1.45, ink: Colour | None = None,
    ) -> float:  # fmt: skip
        """Write `lines` lines of prose from the first baseline `y`; return the baseline that would come next."""
        size = size or self.em
        letters = max(int(width / (size * (0.62 if self.face.mono else 0.5))), 4)
        for line in range(lines):
            last = line == lines - 1
            text = prose(self.rng, max(int(letters * self.rng.uniform(0.3, 0.9)), 4) if last else letters)
            text = (text.capitalize() if line == 0 else text) + ("." if last else "")
            full = justify and not last and not self.face.mono
            if y < self.height + size:  # What would lie below the sheet costs time and shows nothing.
                self.text(x, y, text, size, ink=ink, fit=width if full else None)
            y += size * lead
        return y

    def rule(self, x0: float, y0: float, x1: float, y1: float, pen: float = 0.15, ink: Colour | None = None) -> None:
        """Draw a straight line."""
        start, end = self._px((x0, y0), (x1, y1)).tolist()
        cv2.line(self.pixels, start, end, ink or self.ink, self._pen_px(pen), cv2.LINE_AA)

    def dashes(self, x0: float, x1: float, y: float, dash: float = 1.0) -> None:
        """Draw a level dashed line."""
        for x in np.arange(x0, x1 - dash / 2, 2 * dash):
            self.rule(float(x), y, float(min(x + dash, x1)), y)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, *, fill: Colour | None = None, ink: Colour | None = None,
        pen: float = 0.15,
    ) -> None:  # fmt: skip
        """Draw a rectangle: filled where `fill` is given, otherwise its outline."""
        start, end = self._px((x0, y0), (x1, y1)).tolist()
        cv2.rectangle(self.pixels, start, end, fill or ink or self.ink, -1 if fill else self._pen_px(pen), cv2.LINE_AA)

    def curve(self, points: Sequence[tuple[float, float]], pen: float = 0.25, ink: Colour | None = None) -> None:
        """Draw a line through `points`."""
        cv2.polylines(self.pixels, [self._px(*points)], False, ink or self.ink, self._pen_px(pen), cv2.LINE_AA)

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        """Fill the shape inside `points`."""
        cv2.fillPoly(self.pixels, [self._px(*points)], fill, cv2.LINE_AA)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, *, fill: Colour | None = None, ink: Colour | None = None,
        pen: float = 0.15, turn_deg: float = 0, arc_deg: tuple[float, float] = (0, 360),
    ) -> None:  # fmt: skip
        """Draw an ellipse, or the wedge of it between two angles: filled where `fill` is given, else its outline."""
        centre, radii = self._px((x, y), (rx, ry)).tolist()
        colour, thickness = fill or ink or self.ink, -1 if fill else self._pen_px(pen)
        cv2.ellipse(self.pixels, centre, radii, turn_deg, *arc_deg, colour, thickness, cv2.LINE_AA)

    def digits(self, x: float, y: float, number: str, size: float, *, ink: Colour = BLUE, pitch: float = 0.75) -> None:
        """Write `number` by hand with its baseline at `y`; characters other than digits are left blank."""
        side_px = max(round(size * self.scale), 4)
        for i, digit in enumerate(number):
            if not digit.isdigit():
                continue
            raw = pick(self.rng, _digit_masks()[digit]).astype(np.float32)
            smooth = cv2.resize(raw, (side_px, side_px), interpolation=cv2.INTER_CUBIC)
            # A steep ramp turns the soft eight-pixel grey into the firm edge of a pen stroke.
            mask = np.clip((smooth - 110) * 3.2, 0, 255).astype(np.uint8)
            wobble = self.rng.uniform(-0.06, 0.06) * size
            left, top = x + i * pitch * size, y - size + wobble
            self._stamp(mask, round(left * self.scale), round(top * self.scale), ink)

    def scribble(self, x: float, y: float, width: float, size: float, *, ink: Colour = BLUE, pen: float = 0.2) -> None:
        """Write something unreadable by hand (a name, a signature) with its baseline at `y`."""
        loops = max(width / (float(self.rng.uniform(0.45, 0.7)) * size), 2)
        t = np.linspace(0, 1, int(loops * 12) + 8)
        turn = 2 * np.pi * (loops * t + 0.5 * np.interp(t, np.linspace(0, 1, 9), self.rng.uniform(-1, 1, 9)))
        # A height for each loop: mostly small, now and then tall, as l, h and f are among the small letters.
        heights = self.rng.choice([0.22, 0.3, 0.38, 0.75, 1.0], int(loops) + 2, p=[0.3, 0.25, 0.2, 0.13, 0.12])
        heights[0] = 1.15
        rise = size * np.interp(t * loops, np.arange(heights.size), heights) * (0.5 - 0.5 * np.cos(turn))
        along = width * t + 0.35 * rise - float(self.rng.uniform(0.08, 0.2)) * size * np.sin(turn)
        self.curve([(x + float(dx), y - float(dy)) for dx, dy in zip(along, rise, strict=True)], pen, ink)

    def finish(self) -> Pixels:
        """Return the sheet as uint8 H x W x 3 RGB with its longest side `size_px`."""
        size = (max(round(self.width * self.size_px / 100), 1), max(round(self.height * self.size_px / 100), 1))
        small: np.ndarray = cv2.resize(self.pixels, size, interpolation=cv2.INTER_AREA)
        return small.astype(np.uint8)
