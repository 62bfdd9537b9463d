"""The kinds of document: each function draws one page of its kind on a sheet of its own choosing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from doccls.data.demo.canvas import (
    ACCENTS,
    BLACK,
    BLUE,
    RED,
    SANS,
    TYPEWRITER,
    Canvas,
    Colour,
    Pixels,
    amount,
    pick,
    prose,
    roll,
    title,
)

# Like real collections: mostly A4 and letter paper, now and then a cropped or wider sheet.
PORTRAIT = (0.707, 0.707, 0.773, 0.82)
LANDSCAPE = (1.333, 1.414, 1.6, 1.778)
DARK: tuple[Colour, ...] = ((30, 32, 40), (24, 40, 60), (44, 34, 52), (36, 50, 46), (52, 52, 54))
PALE: Colour = (232, 234, 228)
SYNTAX: tuple[Colour, ...] = ((86, 140, 196), (196, 120, 60), (110, 150, 80), (160, 90, 160))
CARDS: tuple[Colour, ...] = ((214, 226, 236), (238, 222, 208), (214, 232, 216), (232, 220, 236), (240, 236, 214))
SKINS: tuple[Colour, ...] = ((222, 184, 154), (176, 128, 98), (120, 84, 64))
HAIR: tuple[Colour, ...] = ((58, 44, 36), (34, 32, 34), (128, 92, 56), (150, 148, 146))
CLOTHES: tuple[Colour, ...] = ((62, 72, 92), (92, 62, 56), (52, 84, 70))

GOODS = ("bread", "milk", "tea", "pens", "apples", "stamps", "paper", "soup")
FIELDS = ("Surname", "Given name", "Date of birth", "Street", "City", "Phone", "Reference")
CARD_NAMES = ("IDENTITY CARD", "STAFF CARD", "STUDENT CARD", "LIBRARY CARD")
NAMES = ("page", "row", "count", "total", "queue", "node", "left", "index", "value", "ink")


def _sheet(rng: np.random.Generator, size_px: int, wide: float = 0.0) -> Canvas:
    """Return an empty sheet of ordinary paper, which lies on its long side with probability `wide`."""
    return Canvas(rng, pick(rng, LANDSCAPE[:2] if rng.random() < wide else PORTRAIT), size_px)


def _logo(c: Canvas, x: float, y: float, size: float) -> None:
    if c.rng.random() < 0.5:
        c.ellipse(x, y, size, size, fill=c.accent)
        c.ellipse(x, y, size / 2, size / 2, fill=c.paper)
    else:
        c.polygon([(x - size, y + size), (x, y - size), (x + size, y + size)], c.accent)


def _address(c: Canvas, x: float, y: float, anchor: str = "left") -> float:
    """Write an invented name and address and return the baseline below it."""
    street, town = f"{roll(c.rng, 1, 99)} {title(c.rng, 1)} Road", f"{title(c.rng, 1)} {roll(c.rng, 10000, 90000)}"
    for line in (title(c.rng, 2), street, town):
        c.text(x, y, line, anchor=anchor)
        y += 1.4 * c.em
    return y


def _date(c: Canvas) -> str:
    return f"{roll(c.rng, 1, 29)} {pick(c.rng, ('March', 'May', 'June', 'October'))} {roll(c.rng, 1990, 2026)}"


def _draw_letter(rng: np.random.Generator, size_px: int) -> Canvas:
    c = _sheet(rng, size_px)
    left, right, y = c.margin, c.width - c.margin, rng.uniform(7, 13)
    head = roll(rng, 0, 4)
    if head == 0:
        c.text(c.width / 2, y, title(rng, 2), 2 * c.em, bold=True, anchor="middle", ink=c.accent)
        c.rule(left, y + 2, right, y + 2, ink=c.accent)
        y += 6
    elif head == 1:
        _logo(c, left + 3, y, 2.6)
        c.text(left + 8, y + 1, title(rng, 2), 1.7 * c.em, bold=True)
        y += 8
    elif head == 2:
        y = _address(c, right, y, "right") + 1
    x_close = left + pick(rng, (0, 0.45)) * (right - left)
    c.text(x_close, y, _date(c))
    y = _address(c, left, y + 3 * c.em) + 1.5 * c.em
    c.text(left, y, f"Dear {title(rng, 1)},")
    y += 2.2 * c.em
    justify, room = rng.random() < 0.4, c.height - 20
    for _ in range(roll(rng, 2, 5)):
        if y < room - 4 * c.em:
            y = c.paragraph(left, y, right - left, roll(rng, 2, 7), justify=justify) + 0.9 * c.em
    c.text(x_close, y, pick(rng, ("Yours sincerely,", "With kind regards,", "Yours faithfully,")))
    c.scribble(x_close + 1, y + 4.6, rng.uniform(12, 20), rng.uniform(2.6, 3.8), ink=pick(rng, (BLUE, BLACK)))
    c.text(x_close, y + 7.6, title(rng, 2))
    return c


def _grid(c: Canvas, x: list[float], y0: float, step: float, rows: int, style: int) -> None:
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


def _draw_invoice(rng: np.random.Generator, size_px: int) -> Canvas:
    c = _sheet(rng, size_px)
    left, right, y = c.margin, c.width - c.margin, rng.uniform(8, 12)
    word, swap = pick(rng, ("INVOICE", "Invoice", "INVOICE")), rng.random() < 0.5
    c.text(left if swap else right, y, word, 2.4 * c.em, bold=True, anchor="left" if swap else "right", ink=c.accent)
    _logo(c, (right - 3) if swap else (left + 3), y - 1, 2.5)
    y += 6
    below = _address(c, left, y)
    for i, label in enumerate(("Invoice no.", "Date", "Due")):
        value = f"{roll(rng, 10000, 90000)}" if i == 0 else f"{roll(rng, 1, 29):02d}.0{i + 3}.24"
        c.text(right - 13, y + 1.4 * c.em * i, label, anchor="right", bold=True)
        c.text(right, y + 1.4 * c.em * i, value, anchor="right")
    c.text(left, below + c.em, "Bill to", bold=True)
    y = _address(c, left, below + 2.4 * c.em) + rng.uniform(0, 4)
    rows, step, total = roll(rng, 4, 10), rng.uniform(1.7, 2.2) * c.em, 0.0
    x = [left, *(left + (right - left) * share for share in (0.52, 0.66, 0.83)), right]
    dark_head = rng.random() < 0.5
    _grid(c, x, y, step, rows, roll(rng, 0, 4))
    if dark_head:
        c.box(left, y, right, y + step, fill=c.accent)
    for i, label in enumerate(("Description", "Qty", "Price", "Amount")):
        place = (x[0] + 0.8, "left") if i == 0 else (x[i + 1] - 0.8, "right")
        c.text(place[0], y + 0.7 * step, label, anchor=place[1], bold=True, ink=c.paper if dark_head else None)
    for row in range(1, rows):
        base = y + (row + 0.7) * step
        c.text(x[0] + 0.8, base, prose(rng, int((x[1] - x[0]) / (0.66 * c.em))))
        count, price = roll(rng, 1, 12), amount(rng, 160)
        total += count * price
        for i, value in enumerate((str(count), f"{price:.2f}", f"{count * price:.2f}")):
            c.text(x[i + 2] - 0.8, base, value, anchor="right")
    y += (rows + 1.2) * step
    for i, (label, share) in enumerate((("Subtotal", 1.0), ("Tax 20%", 0.2), ("TOTAL", 1.2))):
        c.text(x[3] - 1, y + 1.6 * c.em * i, label, anchor="right", bold=i == 2)
        c.text(right - 0.8, y + 1.6 * c.em * i, f"${total * share:.2f}", anchor="right", bold=i == 2)
    c.rule(x[2], y + 3.7 * c.em, right, y + 3.7 * c.em, 0.3)
    c.paragraph(left, y + 7 * c.em, (right - left) * 0.7, 2, 0.8 * c.em)
    return c


def _draw_receipt(rng: np.random.Generator, size_px: int) -> Canvas:
    c = Canvas(rng, rng.uniform(0.4, 0.62), size_px)
    c.face = pick(rng, (TYPEWRITER, TYPEWRITER, SANS))
    c.em = c.width / rng.uniform(17, 22)
    left, right, middle, y = 0.08 * c.width, 0.92 * c.width, c.width / 2, rng.uniform(6, 10)
    c.text(middle, y, title(rng, 1).upper(), 1.7 * c.em, bold=True, anchor="middle", face=SANS)
    for line in (f"{roll(rng, 9, 99)} {title(rng, 1)} St", f"Tel 555-{roll(rng, 1000, 9999)}"):
        y += 1.5 * c.em
        c.text(middle, y, line, anchor="middle")
    y += 1.5 * c.em
    c.dashes(left, right, y)
    tail, total = 13 * c.em, 0.0
    while y + tail < c.height - 8 and (y < 40 or rng.random() < 0.93):
        y += 1.5 * c.em
        price = amount(rng, 40)
        total += price
        c.text(left, y, f"{roll(rng, 1, 4)} {pick(rng, GOODS)}")
        c.text(right, y, f"{price:.2f}", anchor="right")
    c.dashes(left, right, y + c.em)
    y += 3.2 * c.em
    c.text(left, y, "TOTAL", 1.5 * c.em, bold=True)
    c.text(right, y, f"{total:.2f}", 1.5 * c.em, bold=True, anchor="right")
    cash = 50 * (total // 50 + 1)
    for label, value in (("CASH", cash), ("CHANGE", cash - total)):
        y += 1.7 * c.em
        c.text(left, y, label)
        c.text(right, y, f"{value:.2f}", anchor="right")
    c.dashes(left, right, y + c.em)
    c.text(middle, y + 3 * c.em, pick(rng, ("THANK YOU", "Thank you!", "SEE YOU SOON")), anchor="middle")
    x, y = left + 1, y + 4 * c.em
    while x < right - 2:
        bar = pick(rng, (0.3, 0.5, 0.9))
        c.box(x, y, x + bar, y + 3 * c.em, fill=c.ink)
        x += bar + pick(rng, (0.4, 0.7))
    return c


def _draw_form(rng: np.random.Generator, size_px: int) -> Canvas:
    c = _sheet(rng, size_px)
    c.face, c.margin = (SANS if c.face.mono else c.face), min(c.margin, 6)
    left, right, y = c.margin, c.width - c.margin, rng.uniform(6, 9)
    pen, size = pick(rng, (BLUE, BLACK)), 0.85 * c.em
    c.text(left, y, f"Form {roll(rng, 10, 99)}-{pick(rng, 'ABCD')}", bold=True)
    heading = pick(rng, ("APPLICATION", "REGISTRATION", "CLAIM FORM", "REQUEST"))
    c.text(right, y, heading, 1.6 * c.em, bold=True, anchor="right")
    y += 3
    height, section = rng.uniform(4.6, 6), 1
    while y < c.height - 1.9 * height:
        if section == 1 or rng.random() < 0.22:
            c.box(left, y, right, y + 2.4, fill=c.accent if c.accent[0] < 120 else c.ink)
            c.text(left + 1, y + 1.8, f"{section}. {title(rng, 2)}", bold=True, ink=c.paper)
            y, section = y + 2.4, section + 1
        columns = roll(rng, 1, 4)
        for i in range(columns):
            x, width = left + (right - left) * i / columns, (right - left) / columns
            c.box(x, y, x + width, y + height)
            c.text(x + 0.6, y + 1.5, pick(rng, FIELDS), size)
            kind, base = roll(rng, 0, 4), y + height - 0.8
            if kind == 0:
                c.scribble(x + 1.2, base, width * rng.uniform(0.3, 0.6), 2.2, ink=pen)
            elif kind == 1:
                count = max(int((width - 2) / 2.4), 2)
                for cell in range(count):
                    c.box(x + 1 + 2.3 * cell, base - 2.3, x + 3.3 + 2.3 * cell, base, pen=0.1)
                number = "".join(map(str, rng.integers(10, size=min(count, 8))))
                c.digits(x + 1.1, base - 0.1, number, 2.2, ink=pen, pitch=1.045)
            elif kind == 2:
                for option in range(max(int(width / 9), 1)):
                    at = x + 1 + 9 * option
                    c.box(at, base - 1.8, at + 1.8, base)
                    c.text(at + 2.3, base - 0.3, pick(rng, ("Yes", "No", "Other", "New")), size)
                    if rng.random() < 0.5:
                        c.curve([(at - 0.2, base - 1), (at + 0.7, base), (at + 2.2, base - 2.4)], 0.3, pen)
        y += height
    c.text(left, c.height - 3.2, "Signature", size)
    c.rule(left + 9, c.height - 3, left + 34, c.height - 3)
    c.scribble(left + 12, c.height - 3.2, 14, 2.8, ink=pen)
    return c


def _draw_table(rng: np.random.Generator, size_px: int) -> Canvas:
    c = _sheet(rng, size_px, wide=0.35)
    c.margin = min(c.margin, 6)
    left, right, y = c.margin, c.width - c.margin, rng.uniform(5, 8)
    c.text(left, y, f"Table {roll(rng, 1, 20)}. {prose(rng, 26).capitalize()}", 1.1 * c.em, bold=True)
    columns, step = roll(rng, 5, 10), rng.uniform(1.6, 2.3) * c.em
    rows = int((c.height - y - rng.uniform(6, 22)) / step)
    first = rng.uniform(0.16, 0.26)
    x = [left, *(left + (right - left) * float(share) for share in np.linspace(first, 1, columns))]
    size = min(c.em, (x[2] - x[1]) / 4.2)
    _grid(c, x, y + 1.5, step, rows, roll(rng, 0, 4))
    if rng.random() < 0.3:
        c.box(left, y + 1.5, right, y + 1.5 + step, fill=c.shade(0.25))
    digits, heads = roll(rng, 2, 5), rng.permutation(np.arange(2010, 2024)).astype(str).tolist()
    for row in range(rows):
        base = y + 1.5 + (row + 0.7) * step
        c.text(left + 0.6, base, title(rng, 1)[: int((x[1] - left) / (0.65 * c.em))], min(size, c.em), bold=row == 0)
        for column in range(1, columns):
            value = heads[column] if row == 0 else f"{roll(rng, 0, 10**digits) / 10:.1f}"
            c.text(x[column + 1] - 0.5, base, value, size, anchor="right", bold=row == 0)
    c.text(left, y + 1.5 + rows * step + 2, "Source: " + prose(rng, 34), 0.8 * c.em)
    return c


def _draw_chart(rng: np.random.Generator, size_px: int) -> Canvas:
    c = _sheet(rng, size_px, wide=0.6)
    if rng.random() < 0.15:
        c = Canvas(rng, 1.414, size_px, paper=pick(rng, DARK), ink=PALE)
    kind, size = roll(rng, 0, 5), 1.2 * c.em
    left, right, top, bottom = 0.16 * c.width, 0.92 * c.width, 0.17 * c.height, rng.uniform(0.6, 0.86) * c.height
    c.text(c.width / 2, 0.1 * c.height, title(rng, 3), 1.5 * c.em, bold=True, anchor="middle")
    lift = 40 if c.ink == PALE else 0  # The accents are too dark for dark paper.
    colours = [
        (r + lift, g + lift, b + lift) for r, g, b in (ACCENTS[i] for i in rng.permutation(len(ACCENTS)).tolist())
    ]
    series, count = roll(rng, 1, 4), roll(rng, 4, 9)
    if kind == 0:
        radius, cuts = 0.42 * min(right - left, bottom - top), np.sort(rng.uniform(0, 360, count - 1)).round()
        for i, arc in enumerate(zip([0.0, *cuts.tolist()], [*cuts.tolist(), 360.0], strict=True)):
            c.ellipse(c.width / 2, (top + bottom) / 2, radius, radius, fill=colours[i % 8], arc_deg=arc)
        series = count
    else:
        for tick in np.linspace(0, 1, 6):
            y = bottom - float(tick) * (bottom - top)
            c.rule(left - 0.8, y, right if kind % 2 else left, y, 0.1, c.shade(0.5))
            c.text(left - 1.3, y + 0.4 * size, f"{100 * tick:.0f}", size, anchor="right")
        c.rule(left, top, left, bottom, 0.3)
        c.rule(left, bottom, right, bottom, 0.3)
        slot = (right - left) / count
        for i in range(count):
            label = str(2011 + i) if slot > 3 * size else str(i + 1)
            c.text(left + (i + 0.5) * slot, bottom + 1.3 * size, label, size, anchor="middle")
        for s in range(series):
            level = np.clip(0.5 + np.cumsum(rng.normal(0.03, 0.14, count)), 0.08, 0.97)
            points = [(left + (i + 0.5) * slot, bottom - float(v) * (bottom - top)) for i, v in enumerate(level)]
            if kind in (1, 2):
                bar = 0.75 * slot / series
                for x, y in points:
                    c.box(x + (s - series / 2) * bar, y, x + (s - series / 2 + 0.92) * bar, bottom, fill=colours[s])
            elif kind == 3:
                c.curve(points, 0.5, colours[s])
                for x, y in points:
                    c.ellipse(x, y, 0.8, 0.8, fill=colours[s])
            else:
                for u, v in rng.normal((0.2 + 0.3 * s, 0.5), (0.12, 0.18), (40, 2)).clip(0.02, 0.98).tolist():
                    c.ellipse(left + u * (right - left), bottom - v * (bottom - top), 0.6, 0.6, fill=colours[s])
    c.text(c.width / 2, bottom + 3.4 * size, title(rng, 1), size, anchor="middle")
    for s in range(series):
        x = left + (right - left) * s / series
        c.box(x, bottom + 4.4 * size, x + 1.5, bottom + 4.4 * size + 1.5, fill=colours[s % 8])
        c.text(x + 2, bottom + 4.4 * size + 1.5, title(rng, 1)[: 24 // series + 1], size)
    if bottom < 0.68 * c.height and c.height > c.width:
        c.paragraph(left, bottom + 9 * size, right - left, 4)
    return c


def _draw_slide(rng: np.random.Generator, size_px: int) -> Canvas:
    dark = rng.random() < 0.45
    paper, ink = (pick(rng, DARK), PALE) if dark else (None, None)
    c = Canvas(rng, pick(rng, (1.333, 1.6, 1.778)), size_px, paper=paper, ink=ink)
    size, left, y = rng.uniform(2.6, 3.6), rng.uniform(6, 9), 0.17 * c.height
    banner = rng.random() < 0.4
    if banner:
        c.box(0, 0, c.width, 0.24 * c.height, fill=c.accent)
    elif rng.random() < 0.5:
        c.box(0, 0, 2, c.height, fill=c.accent)
    c.text(left, y, title(rng, roll(rng, 2, 4)), rng.uniform(5, 6.5), bold=True, ink=PALE if banner else None)
    art, mark = roll(rng, 0, 4), roll(rng, 0, 3)
    room = c.width - 2 * left if art == 0 else 0.5 * c.width - left
    y = 0.36 * c.height
    while y < 0.84 * c.height:
        for part in range(roll(rng, 1, 3)):
            line = prose(rng, int(room / (0.55 * size)))
            if part == 0 and mark == 0:
                c.ellipse(left + 0.8, y - 0.35 * size, 0.7, 0.7, fill=c.accent if not dark else c.ink)
            elif part == 0 and mark == 1:
                c.box(left, y - 0.6 * size, left + 1.3, y - 0.6 * size + 1.3, fill=c.accent if not dark else c.ink)
            elif part == 0:
                c.rule(left, y - 0.35 * size, left + 1.6, y - 0.35 * size, 0.4)
            c.text(left + 3, y, line if part else line.capitalize(), size)
            y += 1.35 * size
        y += 0.7 * size
    x, top = 0.58 * c.width, 0.34 * c.height
    if art == 1:
        for i in range(3):
            at = top + i * 0.17 * c.height
            c.box(x, at, x + 30, at + 0.1 * c.height, fill=ACCENTS[i])
            c.text(x + 15, at + 0.07 * c.height, title(rng, 1), 2.6, anchor="middle", ink=PALE)
            if i < 2:
                c.rule(x + 15, at + 0.1 * c.height, x + 15, at + 0.17 * c.height, 0.4)
    elif art == 2:
        # A picture of hills under a sun.
        c.box(x, top, x + 34, 0.8 * c.height, fill=(150, 186, 214))
        c.ellipse(x + 25, top + 6, 3, 3, fill=(244, 214, 120))
        c.polygon([(x, 0.8 * c.height), (x, top + 14), (x + 11, top + 7), (x + 34, 0.8 * c.height)], (84, 128, 92))
        near = [(x + 10, 0.8 * c.height), (x + 26, top + 12), (x + 34, top + 16), (x + 34, 0.8 * c.height)]
        c.polygon(near, (58, 96, 80))
    elif art == 3:
        for i, shift in enumerate((0, 11)):
            c.ellipse(x + 11 + shift, 0.56 * c.height, 10, 10, ink=ACCENTS[i + 1], pen=0.8)
            c.text(x + 6 + 2.1 * shift, 0.57 * c.height, title(rng, 1)[:7], 2.2, anchor="middle")
    c.text(c.width - 3, c.height - 2, str(roll(rng, 2, 40)), 1.8, anchor="right")
    c.text(left, c.height - 2, title(rng, 2), 1.5)
    return c


def _card(c: Canvas, x: float, y: float, width: float) -> None:
    """Draw an identity card: portrait, fields, and the two coded lines."""
    rng, height, unit = c.rng, width / 1.586, width / 100
    c.box(x, y, x + width, y + height, fill=pick(rng, CARDS))
    for wave in range(7):
        along = np.linspace(0, 1, 40)
        rise = y + height * (0.2 + 0.1 * wave) + 3 * unit * np.sin(7 * along + wave)
        c.curve([(x + float(a) * width, float(r)) for a, r in zip(along, rise, strict=True)], 0.1, (190, 196, 204))
    c.box(x, y, x + width, y + 13 * unit, fill=c.accent)
    c.text(x + 4 * unit, y + 9.5 * unit, pick(rng, CARD_NAMES), 7 * unit, bold=True, ink=PALE, face=SANS)
    flip = rng.random() < 0.35
    px, fx, top = (x + (70 if flip else 4) * unit), x + (5 if flip else 36) * unit, y + 17 * unit
    c.box(px, top, px + 26 * unit, top + 31 * unit, fill=pick(rng, ((246, 246, 244), (196, 208, 220))))
    c.ellipse(px + 13 * unit, top + 31 * unit, 11 * unit, 9 * unit, fill=pick(rng, CLOTHES), arc_deg=(180, 360))
    c.ellipse(px + 13 * unit, top + 11.5 * unit, 7.2 * unit, 9 * unit, fill=pick(rng, HAIR))
    c.ellipse(px + 13 * unit, top + 14 * unit, 6 * unit, 8 * unit, fill=pick(rng, SKINS))
    for i, label in enumerate(("Name", "Born", "No.")):
        base = top + (5 + 10 * i) * unit
        value = (title(rng, 2), _date(c), f"{roll(rng, 10000000, 90000000)}")[i]
        c.text(fx, base - 0.5 * unit, label, 3 * unit, ink=c.accent, face=SANS)
        c.text(fx, base + 4.5 * unit, value, 4.6 * unit, ink=BLACK, face=SANS, bold=i == 0)
    for i, code in enumerate((f"ID{roll(rng, 10**11, 10**12)}", title(rng, 2).upper().replace(" ", "<<"))):
        line = code.ljust(30, "<")[:30]
        c.text(x + 4 * unit, y + (54 + 6 * i) * unit, line, 4.4 * unit, ink=BLACK, face=TYPEWRITER, fit=92 * unit)
    c.box(x, y, x + width, y + height, ink=(120, 120, 124))


def _draw_id_card(rng: np.random.Generator, size_px: int) -> Canvas:
    if rng.random() < 0.45:
        # A copied sheet with the card somewhere on it, as offices keep them.
        c = _sheet(rng, size_px)
        width = rng.uniform(0.55, 0.8) * c.width
        x = rng.uniform(0.05, 0.95) * (c.width - width)
        y = rng.uniform(4, 24 if rng.random() < 0.5 else c.height - width / 1.586 - 4)
        _card(c, x, y, width)
        if y < 24:
            y += width / 1.586 + 8
            c.text(c.margin, y, f"Copy seen on {_date(c)}")
            c.scribble(c.margin, y + 6, 16, 3)
    else:
        c = Canvas(rng, pick(rng, (1.333, 1.5, 1.586, 0.9)), size_px)
        width = rng.uniform(0.74, 0.9) * min(c.width, 1.586 * c.height)
        _card(c, (c.width - width) / 2, rng.uniform(0.1, 0.9) * (c.height - width / 1.586), width)
    return c


def _code_line(rng: np.random.Generator, depth: int) -> tuple[str, int]:
    """Return one line of invented code and the depth of the line after it."""
    a, b, n = pick(rng, NAMES), pick(rng, NAMES), roll(rng, 2, 99)
    if depth == 0:
        return f"def {a}_{b}({b}, {pick(rng, NAMES)}):", 1
    opens = (f"for {a} in {b}:", f"if {a} > {n}:", f"while {a} != {b}:")
    plain = (f"{a} = {b} + {n}", f"{a}.append({b}[{n}])", f"{a}, {b} = {b}, {a}", f"# {prose(rng, 24)}")
    if depth < 4 and rng.random() < 0.3:
        return pick(rng, opens), depth + 1
    return (f"return {a}", 0) if rng.random() < 0.15 else (pick(rng, plain), max(depth - int(rng.random() < 0.25), 1))


def _draw_code_listing(rng: np.random.Generator, size_px: int) -> Canvas:
    dark = rng.random() < 0.4
    paper, ink = (pick(rng, DARK), PALE) if dark else (None, None)
    c = Canvas(rng, pick(rng, (*PORTRAIT, 1.0, 1.333)), size_px, paper=paper, ink=ink)
    numbered, coloured = rng.random() < 0.6, bool(dark or rng.random() < 0.4)
    size = rng.uniform(1.8, 2.8)
    x, y, depth = rng.uniform(3, 7) + (3.2 * size if numbered else 0), rng.uniform(5, 9), 0
    if rng.random() < 0.35:
        c.text(x, y, f"/* {pick(rng, NAMES)}.src    page {roll(rng, 1, 30)} */", size, face=TYPEWRITER)
        y += 3 * size
    number, last = roll(rng, 1, 300), c.height - rng.uniform(4, 24)
    while y < last:
        if numbered:
            c.text(x - 1.3 * size, y, str(number), size, anchor="right", face=TYPEWRITER, ink=c.shade(0.55))
        line, after = _code_line(rng, depth)
        at = x + depth * 4 * 0.62 * size
        tone = pick(rng, SYNTAX) if coloured and (line[0] == "#" or rng.random() < 0.35) else c.ink
        head, _, rest = line.partition(" ")
        c.text(at, y, head, size, face=TYPEWRITER, ink=tone, bold=not coloured and line[-1] == ":")
        if rest:
            after_head = at + (len(head) + 1) * 0.62 * size
            c.text(after_head, y, rest, size, face=TYPEWRITER, ink=tone if line[0] == "#" else c.ink)
        y, number = y + 1.4 * size * (2 if after == 0 else 1), number + 1
        depth = after
    return c


def _draw_exam_sheet(rng: np.random.Generator, size_px: int) -> Canvas:
    c = _sheet(rng, size_px)
    left, right, y = c.margin, c.width - c.margin, rng.uniform(6, 9)
    c.text(left, y, pick(rng, ("EXAM", "FINAL TEST", "QUIZ", "Examination")), 1.7 * c.em, bold=True)
    c.text(left, y + 4, "Name", bold=True)
    c.rule(left + 6, y + 4.3, left + 30, y + 4.3)
    c.scribble(left + 7, y + 4, 14, 2.2)
    c.ellipse(right - 5, y + 0.5, 5, 4, ink=RED, pen=0.35)
    c.digits(right - 8.4, y + 3, str(roll(rng, 10, 100)), 4.6, ink=RED)
    y += 9
    if rng.random() < 0.5:
        # Bubbles, in one to three columns.
        columns, options, step = roll(rng, 1, 4), roll(rng, 4, 6), rng.uniform(2.8, 3.6)
        rows, width = int((c.height - y - 5) / step), (right - left) / columns
        gap = min((width - 5) / options, 4.5)
        for column in range(columns):
            for row in range(rows):
                x, base = left + column * width, y + row * step
                c.text(x + 2.6, base + 0.6, f"{column * rows + row + 1}.", 1.8, anchor="right")
                chosen = roll(rng, 0, options)
                for option in range(options):
                    at = x + 5 + option * gap
                    if option == chosen:
                        c.ellipse(at, base, 1.05, 1.05, fill=(70, 70, 78))
                    else:
                        c.ellipse(at, base, 1.05, 1.05)
                        c.text(at, base + 0.5, "ABCDE"[option], 1.4, anchor="middle", face=SANS)
        return c
    number = 1
    while y < c.height - 12:
        c.text(left, y, f"{number}.", bold=True)
        y = c.paragraph(left + 4, y, right - left - 12, roll(rng, 1, 3))
        if rng.random() < 0.6:
            chosen = roll(rng, 0, 4)
            for option in range(4):
                c.text(left + 5, y, f"({'abcd'[option]})  {prose(rng, 20)}")
                if option == chosen:
                    c.ellipse(left + 5 + 0.6 * c.em, y - 0.3 * c.em, 1.1 * c.em, 0.95 * c.em, ink=BLUE, pen=0.25)
                y += 1.5 * c.em
        else:
            c.digits(left + 6, y + 2.4, "".join(map(str, rng.integers(10, size=4))), 3)
            for _ in range(2):
                y += 2.7
                c.rule(left + 4, y, right - 8, y, 0.1)
            y += 1.5 * c.em
        if rng.random() < 0.6:
            c.curve([(right - 5, y - 5), (right - 3.5, y - 3), (right, y - 8)], 0.4, RED)
        else:
            c.digits(right - 5, y - 3, str(roll(rng, 0, 10)), 3.4, ink=RED)
        y, number = y + 1.4 * c.em, number + 1
    return c


def _draw_article(rng: np.random.Generator, size_px: int) -> Canvas:
    c = _sheet(rng, size_px)
    c.face, c.em = (SANS if c.face.mono else c.face), rng.uniform(1.35, 1.75)
    columns = pick(rng, (2, 2, 3))
    gap, top = 3.0, rng.uniform(6, 10)
    c.margin = min(c.margin, 7)
    width = (c.width - 2 * c.margin - gap * (columns - 1)) / columns
    if rng.random() < 0.65:
        c.text(c.width / 2, top, title(rng, 3), 2.1 * c.em, bold=True, anchor="middle")
        c.text(c.width / 2, top + 3.4, f"{title(rng, 2)}, {title(rng, 2)}", anchor="middle")
        top = c.paragraph(c.margin + 7, top + 7, c.width - 2 * c.margin - 14, roll(rng, 2, 6), 0.9 * c.em) + 2.5
    else:
        c.text(c.margin, 4.5, title(rng, 2), 0.9 * c.em)
        c.rule(c.margin, 5.3, c.width - c.margin, 5.3, 0.1)
        top = max(top, 8)
    end, figure = c.height - rng.uniform(6, 10), roll(rng, -2, columns)
    for column in range(columns):
        x, y = c.margin + column * (width + gap), top
        while y < end:
            if column == figure and y > top + 12:
                c.box(x, y, x + width, y + 13, fill=c.shade(0.2))
                c.ellipse(x + width / 2, y + 6.5, 5, 4, fill=c.shade(0.45))
                c.text(x, y + 15.5, "Figure 1. " + prose(rng, int(width)), 0.85 * c.em)
                y, figure = y + 19, -1
            if rng.random() < 0.3:
                c.text(x, y, f"{roll(rng, 1, 6)}  {title(rng, 2)}", 1.15 * c.em, bold=True)
                y += 2.2 * c.em
            lines = min(roll(rng, 4, 12), int((end - y) / (1.35 * c.em)) + 1)
            y = c.paragraph(x, y, width, max(lines, 1), lead=1.35) + 0.4 * c.em
    c.text(c.width / 2, c.height - 3, str(roll(rng, 2, 400)), anchor="middle")
    return c


def _staff(c: Canvas, left: float, right: float, y: float, gap: float) -> None:
    """Draw one staff of music whose top line is at `y`: clef, bars, and notes with stems and beams."""
    rng = c.rng
    for line in range(5):
        c.rule(left, y + line * gap, right, y + line * gap, 0.1)
    t = np.linspace(0, 1, 40)
    angle, reach = 9.5 * t, gap * (0.25 + 1.3 * t)
    curl = zip(reach * np.cos(angle), reach * np.sin(angle), strict=True)
    clef = [(left + 2.2 * gap + float(dx), y + 3 * gap - float(dy)) for dx, dy in curl]
    c.curve([*clef, (left + 2.6 * gap, y - gap), (left + 2.2 * gap, y + 5.4 * gap)], 0.3)
    bars = roll(rng, 3, 6)
    step = (right - left - 5 * gap) / bars
    for bar in range(bars):
        x0 = left + 5 * gap + bar * step
        c.rule(x0 + step, y, x0 + step, y + 4 * gap, 0.2)
        count = roll(rng, 2, 5)
        pitch = np.clip(rng.integers(0, 9) + np.cumsum(rng.integers(-2, 3, count)), -1, 9)
        heads = [(x0 + (i + 0.6) * step / count, y + float(p) * gap / 2) for i, p in enumerate(pitch)]
        beamed = rng.random() < 0.5
        beam = min(head[1] for head in heads) - 2.8 * gap
        for x, at in heads:
            c.ellipse(x, at, 0.66 * gap, 0.46 * gap, turn_deg=-20, fill=c.ink)
            c.rule(x + 0.6 * gap, at, x + 0.6 * gap, beam if beamed else at - 3 * gap, 0.15)
        if beamed:
            c.rule(heads[0][0] + 0.6 * gap, beam, heads[-1][0] + 0.6 * gap, beam, 0.5 * gap)


def _draw_music_score(rng: np.random.Generator, size_px: int) -> Canvas:
    c = _sheet(rng, size_px, wide=0.2)
    left, right, gap = min(c.margin, 8), c.width - min(c.margin, 8), rng.uniform(0.95, 1.35)
    y, words, pair = rng.uniform(7, 10), rng.random() < 0.4, rng.random() < 0.4
    if rng.random() < 0.8:
        c.text(c.width / 2, y, title(rng, 2), 1.8 * c.em, bold=True, anchor="middle")
        c.text(right, y + 3.5, title(rng, 2), 0.9 * c.em, anchor="right")
        y += 9
    step, row = gap * (rng.uniform(12.5, 14) if words else rng.uniform(9.5, 12.5)), 0
    while y < c.height - 7 * gap:
        _staff(c, left, right, y, gap)
        if words:
            c.text(left + 6 * gap, y + 7.5 * gap, prose(rng, int((right - left) / (0.6 * c.em))), 0.9 * c.em)
        if pair and row % 2 == 0 and y + step < c.height - 7 * gap:
            c.rule(left, y, left, y + step + 4 * gap, 0.4)
        y, row = y + step, row + 1
    return c


DRAWINGS: Final[dict[str, Callable[[np.random.Generator, int], Canvas]]] = {
    "letter": _draw_letter,
    "invoice": _draw_invoice,
    "receipt": _draw_receipt,
    "form": _draw_form,
    "table": _draw_table,
    "chart": _draw_chart,
    "slide": _draw_slide,
    "id_card": _draw_id_card,
    "code_listing": _draw_code_listing,
    "exam_sheet": _draw_exam_sheet,
    "article": _draw_article,
    "music_score": _draw_music_score,
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
