"""The kinds of page: first text documents (letters, forms, ...), then graphical ones (charts, music, ...)."""

from itertools import pairwise, product
from random import Random

import cv2
import numpy as np

from doccls.demo.canvas import GREY, RED, SANS, SUPERSAMPLE, TYPEWRITER, WHITE, Canvas, Pixels, box, oval, palette

CODE = ["for {0} in {1}:", "if {0} > {2}:", "while {0} != {1}:", "{0} = {1} + {2}", "{0}, {1} = {1}, {0}", "return {0}"]
CODE += ["{0}.append({1}[{2}])", "# the {0} of every {1}", "{1}.{0} = {2}", "{0} += {1}.{0}", "{1}.remove({0}, {2})"]


def _draw_letterhead(c: Canvas, rng: Random) -> None:
    """Draw a sender's logo and name, and an address below."""
    x, name = rng.choice(((c.right - 3, f"*{c.title(2)}"), (c.left + 3, f"||*{c.title(2)}")))
    c.fill(oval(x, c.y, 3, 3, corners=rng.choice((3, 4, 6, 48))), c.accent)
    c.fill(oval(x, c.y, 1.3, 1.3), c.paper)
    c.rows(name, "", c.title(2), f"{rng.randrange(1, 99)} {c.title(1)} Road", f"{c.title(1)} Town", "")


def _draw_grid(c: Canvas, rng: Random, step: float, shares: list[float], rows: list[list[str]]) -> None:
    """Draw a table whose columns end at `shares` of the width and whose first row is a heading."""
    style, edges = rng.choice(("grid", "rules", "stripes", "open")), [c.left + (c.right - c.left) * s for s in shares]
    for number, row in enumerate(rows):
        if style == "stripes" and number % 2 == 0:
            c.fill(box(c.left, c.y, c.right - c.left, step), c.tint)
        if style in ("grid", "rules") or number < 2:
            c.stroke([(c.left, c.y), (c.right, c.y)], 0.1 if number > 1 else 0.25)
        for column, cell in enumerate(row):
            x, anchor = (edges[column] - 0.6, 1) if column else (c.left + 0.6, 0)
            c.text(x, c.y + 0.7 * step, cell if number else f"*{cell}", anchor=anchor)
        for edge in (c.left, *edges) if style == "grid" else ():
            c.stroke([(edge, c.y), (edge, c.y + step)], 0.1)
        c.y += step
    c.stroke([(c.left, c.y), (c.right, c.y)], 0.25)
    c.y += 2 * c.em


def draw_letter(c: Canvas, rng: Random) -> None:
    indent, end = rng.choice(("", "||")), rng.uniform(0.45, 0.7) * c.height
    _draw_letterhead(c, rng)
    c.rows(f"{indent}{rng.randrange(1, 29)} May {rng.randrange(1990, 2026)}", "", f"Dear {c.title(1)},", "")
    while c.y < end:
        c.paragraph(rng.randrange(2, 7), c.left, c.right - c.left)
    c.rows(indent + rng.choice(("Yours sincerely,", "With kind regards,", "Yours faithfully,")))
    c.scribble(c.right - 17 if indent else c.left + 1, c.y + 3, rng.uniform(12, 16), 3.2)
    c.rows("", "", "", indent + c.title(2))


def draw_invoice(c: Canvas, rng: Random) -> None:
    _draw_letterhead(c, rng)
    c.rows(f"*INVOICE||No. {rng.randrange(10000, 90000)}", f"{c.title(2)}||Due {rng.randrange(10, 29)}.04.24", "")
    sales = [(rng.randrange(1, 12), rng.uniform(1, 160)) for _ in range(rng.randrange(3, 11))]
    rows = [[c.prose(20), str(count), f"{price:.2f}", f"{count * price:.2f}"] for count, price in sales]
    head, total = ["Description", "Qty", "Price", "Amount"], sum(count * price for count, price in sales)
    _draw_grid(c, rng, rng.uniform(1.7, 2.2) * c.em, [0.52, 0.66, 0.83, 1], [head, *rows])
    c.rows(f"|Subtotal|{total:.2f}", f"|Tax 20%|{total / 5:.2f}", "", f"|*TOTAL|*${1.2 * total:.2f}")
    c.paragraph(2, c.left, 0.6 * c.width)


def draw_receipt(c: Canvas, rng: Random) -> None:
    c.accent, c.face, c.em = c.ink, rng.choice((TYPEWRITER, TYPEWRITER, SANS)), c.width / rng.uniform(17, 22)
    dashes, goods = "|" + "-" * 22, ("bread", "milk", "tea", "pens", "apples", "soup")
    c.rows(f"|*{c.title(1).upper()}", f"|{c.title(1)} St {rng.randrange(99)}", f"|Tel {rng.randrange(9999)}", dashes)
    prices = [rng.uniform(1, 40) for _ in range(rng.randrange(3, int((c.height - c.y) / (1.45 * c.em)) - 8))]
    c.rows(*(f"{rng.randrange(1, 4)} {rng.choice(goods)}||{price:.2f}" for price in prices), dashes)
    total, cash = sum(prices), 50 * (sum(prices) // 50 + 1)
    c.rows(f"*TOTAL||*{total:.2f}", f"CASH||{cash:.2f}", f"CHANGE||{cash - total:.2f}", dashes, "|THANK YOU")
    for x in np.arange(c.left, c.right - 1, 1.1):
        c.fill(box(x, c.y, rng.choice((0.3, 0.5, 0.9)), 3 * c.em))


def draw_form(c: Canvas, rng: Random) -> None:
    c.rows(f"Form {rng.randrange(10, 99)}||*{rng.choice(('APPLICATION', 'REGISTRATION', 'CLAIM FORM', 'REQUEST'))}")
    height, labels = rng.uniform(4.6, 6), ("Surname", "Given name", "Date of birth", "Street", "City", "Phone")
    while c.y < c.height - 1.9 * height:
        if c.y < 15 or rng.random() < 0.22:
            c.fill(box(c.left, c.y, c.right - c.left, 2.4), c.accent)
            c.text(c.left + 1, c.y + 1.8, f"*{c.title(2)}", ink=c.paper)
            c.y += 2.4
        columns = rng.randrange(1, 4)
        width, base = (c.right - c.left) / columns, c.y + height - 0.8
        for x in np.linspace(c.left, c.right, columns, endpoint=False):
            kind = rng.choice(("name", "number", "choice", "empty"))
            c.stroke(box(x, c.y, width, height))
            c.text(x + 0.6, c.y + 1.5, rng.choice(labels), 0.85 * c.em)
            if kind == "name":
                c.scribble(x + 1.2, base, width * rng.uniform(0.3, 0.6), 2.2)
            for cell in np.arange(x + 1, x + min(width - 2, 16), 1.65) if kind == "number" else ():
                c.stroke(box(cell, base - 2.7, 1.65, 2.7), 0.1)
                c.digits(cell + 0.5, base - 0.4, rng.randrange(10), 2)
            for option in np.arange(x + 1, x + width - 8, 9) if kind == "choice" else ():
                c.stroke(box(option, base - 1.8, 1.8, 1.8))
                c.text(option + 2.3, base - 0.3, rng.choice(("Yes", "No", "Other", "New")), 0.85 * c.em)
                if rng.random() < 0.5:
                    c.stroke([(option, base - 1), (option + 0.7, base), (option + 2.2, base - 2.4)], 0.3, c.handwriting)
        c.y += height
    c.text(c.left, c.height - 3, "Signature ______________")
    c.scribble(c.left + 12, c.height - 3, 14, 2.8)


def draw_table(c: Canvas, rng: Random) -> None:
    count, first, top, step = rng.randrange(4, 9), rng.uniform(0.18, 0.26), 10 ** rng.randrange(2, 5), 1.9 * c.em
    c.em = min(c.em, c.width / count / 5)
    c.rows(f"Table {rng.randrange(1, 20)}. {c.prose(26)}")
    rows = [["", *map(str, rng.sample(range(2010, 2024), count))]]
    for _ in range(int((c.height - c.y - rng.uniform(8, 24)) / step)):
        rows.append([c.title(1)[:9], *(str(rng.randrange(top) / 10) for _ in range(count))])
    _draw_grid(c, rng, step, [first + (1 - first) * i / count for i in range(count + 1)], rows)
    c.rows(f"Source: {c.prose(34)}")


def draw_exam_sheet(c: Canvas, rng: Random) -> None:
    c.stroke(oval(c.right - 5, c.y, 5, 4), 0.35, RED)
    c.digits(c.right - 8, c.y + 2.3, rng.randrange(10, 100), 4.6, RED)
    c.rows(rng.choice(("*EXAM", "*FINAL TEST", "*QUIZ", "*Examination")), "Name _____________________")
    c.scribble(c.left + 4 * c.em, c.y - 1.5 * c.em, 14, 2.2)
    c.y, number = c.y + 5, 0
    if rng.random() < 0.5:
        rows, columns = np.arange(c.y, c.height - 5, rng.uniform(2.8, 3.6)), rng.randrange(1, 4)
        for number, (y, x) in enumerate(product(rows, np.linspace(c.left, c.right, columns, endpoint=False)), 1):
            c.text(x, y + 0.6, f"{number}.", 1.8)
            for option in range(5):
                c.stroke(oval(x + 5 + 2.7 * option, y, 1, 1))
            c.fill(oval(x + 5 + 2.7 * rng.randrange(5), y, 1, 1))
        return
    while c.y < c.height - 12:
        number += 1
        c.text(c.left, c.y, f"*{number}.")
        c.stroke([(c.right - 5, c.y - 1), (c.right - 3.5, c.y + 1), (c.right, c.y - rng.choice((4, -3)))], 0.4, RED)
        c.paragraph(rng.randrange(1, 3), c.left + 4, c.right - c.left - 12)
        if rng.random() < 0.6:
            chosen_y = c.y + (1.45 * rng.randrange(4) - 0.3) * c.em
            c.stroke(oval(c.left + c.em, chosen_y, 1.2 * c.em, c.em), 0.25, c.handwriting)
            c.rows(*(f"({letter})  {c.prose(20)}" for letter in "abcd"), "")
        else:
            c.digits(c.left + 6, c.y + 2.4, rng.randrange(1000, 10000), 3)
            c.rows("", "", "_" * 30, "")


def draw_article(c: Canvas, rng: Random) -> None:
    c.face, c.em, columns = SANS if c.face == TYPEWRITER else c.face, rng.uniform(1.35, 1.75), rng.choice((2, 2, 3))
    width, end, figure = (c.right - c.left + 3) / columns - 3, c.height - rng.uniform(6, 10), rng.randrange(-2, columns)
    if rng.random() < 0.65:
        c.rows(f"|*{c.title(3)}", f"|{c.title(2)}, {c.title(2)}", "")
        c.paragraph(rng.randrange(2, 6), c.left + 7, c.right - c.left - 14)
    top = c.y
    for column in range(columns):
        x, c.y = c.left + column * (width + 3), top
        while c.y < end:
            if column == figure and c.y > top + 12:
                c.fill(box(x, c.y, width, 13), c.tint)
                c.fill(oval(x + width / 2, c.y + 6.5, 5, 4), c.accent)
                c.y, figure = c.y + 16, -1
            if rng.random() < 0.3:
                c.text(x, c.y, f"*{rng.randrange(1, 6)}  {c.title(2)}")
                c.y += 1.8 * c.em
            c.paragraph(min(rng.randrange(4, 12), int((end - c.y) / (1.4 * c.em)) + 1), x, width)


def draw_chart(c: Canvas, rng: Random) -> None:
    kind, series = rng.choice(("bars", "bars", "lines", "dots", "pie")), rng.randrange(1, 4)
    count, cuts = 16 if kind == "dots" else rng.randrange(4, 9), [0, *sorted(rng.sample(range(15, 346), 7)), 360]
    left, top, width, height = 0.16 * c.width, 0.17 * c.height, 0.76 * c.width, rng.uniform(0.45, 0.69) * c.height
    slot, bottom, middle = width / count, top + height, (c.width / 2, top + height / 2)
    c.rows(f"|*{c.title(3)}")
    for tick in range(0, 101, 20) if kind != "pie" else ():
        c.stroke([(left - 0.8, bottom - tick / 100 * height), (left + width, bottom - tick / 100 * height)], 0.1)
        c.text(left - 1.3, bottom - tick / 100 * height + 0.4 * c.em, str(tick), anchor=1)
    for s, colour in enumerate(c.accents if kind == "pie" else c.accents[:series]):
        shares = np.clip(rng.uniform(0.3, 0.7) + np.cumsum([rng.gauss(0.01, 0.12) for _ in range(count)]), 0.06, 0.97)
        points = [(left + (i + 0.5) * slot, bottom - share * height) for i, share in enumerate(shares.tolist())]
        if kind == "pie":
            c.fill([middle, *oval(*middle, 0.4 * height, 0.4 * height, (cuts[s], cuts[s + 1]))], colour)
        elif kind == "lines":
            c.stroke(points, 0.5, colour)
        for x, y in points if kind != "pie" else ():
            bar = box(x + (s / series - 0.5) * 0.8 * slot, y, 0.72 * slot / series, bottom - y)
            c.fill(bar if kind == "bars" else oval(x, y, 0.7, 0.7), colour)
            c.text(x, bottom + 1.4 * c.em, str(int((x - left) / slot) + 1), anchor=0.5)
        x = left + width * s / (8 if kind == "pie" else series)
        c.fill(box(x, bottom + 4 * c.em, 1.5, 1.5), colour)
        c.text(x + 2, bottom + 4 * c.em + 1.5, c.title(1)[: 4 if kind == "pie" else 9])


def draw_slide(c: Canvas, rng: Random) -> None:
    banner, size, art = rng.random() < 0.4, rng.uniform(2.6, 3.6), rng.randrange(4)
    c.fill(box(0, 0, c.width, 0.24 * c.height) if banner else box(0, 0, rng.choice((0, 2)), c.height), c.accent)
    c.text(c.left + 1, 0.17 * c.height, f"*{c.title(2)}", 5.5, ink=WHITE if banner else c.ink)
    c.y, corners, letters = 0.36 * c.height, rng.choice((3, 4, 48)), (84 if art == 3 else 42) / (0.6 * size)
    while c.y < 0.84 * c.height:
        c.fill(oval(c.left + 0.8, c.y - 0.35 * size, 0.8, 0.8, corners=corners), c.accent)
        for _ in range(rng.randrange(1, 3)):
            c.text(c.left + 3, c.y, c.prose(letters), size)
            c.y += 1.35 * size
        c.y += 0.7 * size
    for i, colour in enumerate(c.accents[:3] if art < 3 else ()):
        x, y, unit = 0.6 * c.width, (0.34 + 0.18 * i) * c.height, 0.12 * c.height
        hill = [(x, 0.8 * c.height), (x + 8 + 9 * i, y), (x + 34, 0.8 * c.height)]
        c.fill((box(x, y, 30, unit), oval(x + 9 + 9 * (i % 2), y + 0.5 * unit, unit, unit), hill)[art], colour)
        c.text(x + 15, y + 0.65 * unit, c.title(1), 2.6, anchor=0.5, ink=WHITE)


def draw_id_card(c: Canvas, rng: Random) -> None:
    unit, c.face = rng.uniform(0.006, 0.009) * min(c.width, 1.586 * c.height), SANS  # The card is 100 x 63 units.
    x, y = rng.uniform(0.1, 0.9) * (c.width - 100 * unit), rng.uniform(0.1, 0.9) * (c.height - 63 * unit)
    photo_x, text_x = rng.choice(((x + 17 * unit, x + 36 * unit), (x + 83 * unit, x + 5 * unit)))
    c.fill(box(x, y, 100 * unit, 63 * unit), c.tint)
    c.fill(box(x, y, 100 * unit, 13 * unit), c.accent)
    c.fill(box(photo_x - 13 * unit, y + 17 * unit, 26 * unit, 31 * unit), WHITE)
    c.fill(oval(photo_x, y + 48 * unit, 11 * unit, 9 * unit, (-90, 90)), c.accents[1])
    c.fill(oval(photo_x, y + 28.5 * unit, 7.2 * unit, 9 * unit))
    c.fill(oval(photo_x, y + 31 * unit, 6 * unit, 8 * unit), rng.choice(palette("deb89a b08062 785440")))
    name, number = c.title(2), rng.randrange(10**7, 10**8)
    c.text(x + 4 * unit, y + 9.5 * unit, f"*{rng.choice(('IDENTITY', 'STAFF', 'STUDENT'))} CARD", 7 * unit, ink=WHITE)
    for i, value in enumerate((f"*{name}", f"{rng.randrange(1, 29)} May {rng.randrange(1950, 2010)}", f"No. {number}")):
        c.text(text_x, y + (24 + 10 * i) * unit, value, 4.6 * unit)
    c.face = TYPEWRITER
    for i, code in enumerate((f"ID<{number}<", name.upper().replace(" ", "<<"))):
        c.text(x + 4 * unit, y + (54 + 6 * i) * unit, code.ljust(30, "<"), 4.9 * unit)


def draw_code_listing(c: Canvas, rng: Random) -> None:
    number, numbered, coloured, depth = rng.randrange(1, 300), rng.random() < 0.6, rng.random() < 0.6, 0
    c.face, c.em = TYPEWRITER, rng.uniform(1.8, 2.8)
    while c.y < c.height - 4:
        a, b = c.title(1).lower()[:6], c.title(1).lower()
        line = rng.choice(CODE).format(a, b, rng.randrange(99)) if depth else f"def {a}_{b}({b}, {a}):"
        head, tone = line.split(" ")[0], rng.choice(c.accents) if coloured and rng.random() < 0.5 else c.ink
        indent = " " * (4 * depth + 5 * numbered)
        c.text(c.left, c.y, f"{number:3}" if numbered else "", ink=GREY)
        c.text(c.left, c.y, indent + line, ink=tone if head == "#" else c.ink)
        c.text(c.left, c.y, f"*{indent}{head}" if line[-1] == ":" else indent + head, ink=tone)
        deeper = depth + (line[-1] == ":") - (rng.random() < 0.2)
        depth = 0 if head == "return" else min(max(deeper, 1), 4)
        c.y, number = c.y + (1.4 if depth else 2.8) * c.em, number + 1


def draw_music_score(c: Canvas, rng: Random) -> None:
    gap, sung = rng.uniform(0.95, 1.35), rng.random() < 0.4
    c.rows(f"|*{c.title(2)}", f"||{c.title(2)}", "", "")
    for y in np.arange(c.y, c.height - 7 * gap, rng.uniform(11.5, 13.5) * gap):
        for line in range(5):
            c.stroke([(c.left, y + line * gap), (c.right, y + line * gap)], 0.1)
        x, turns = c.left + 2.2 * gap, np.arange(0.25, 1.6, 0.05)
        clef = zip(x + gap * turns * np.cos(7 * turns), y + gap * (3 - turns * np.sin(7 * turns)), strict=True)
        c.stroke([*clef, (x + 0.4 * gap, y - gap), (x, y + 5.4 * gap)], 0.3)
        for start, end in pairwise(np.linspace(c.left + 5 * gap, c.right, rng.randrange(4, 7))):
            c.stroke([(end, y), (end, y + 4 * gap)], 0.2)
            heights = [y + rng.randrange(9) * gap / 2 for _ in range(rng.randrange(2, 5))]
            beam, half_step = rng.choice((0, min(heights) - 2.8 * gap)), (end - start) / len(heights) / 2
            for i, height in enumerate(heights):
                stem = start + (2 * i + 1) * half_step + 0.6 * gap
                c.fill(oval(stem - 0.6 * gap, height, 0.66 * gap, 0.46 * gap))
                c.stroke([(stem, height), (stem, beam or height - 3 * gap)])
            if beam:
                c.fill(box(start + half_step + 0.6 * gap, beam, end - start - 2 * half_step, 0.5 * gap))
        if sung:
            c.text(c.left + 6 * gap, y + 7.5 * gap, c.prose((c.right - c.left) / (0.6 * c.em)))


KINDS = {draw.__name__.removeprefix("draw_"): draw for draw in (
    draw_letter, draw_invoice, draw_receipt, draw_form, draw_table, draw_chart, draw_slide, draw_id_card,
    draw_code_listing, draw_exam_sheet, draw_article, draw_music_score,
)}  # fmt: skip
CLASSES = tuple(KINDS)
# Aspect ratios (width / height) of the kinds that are not always in portrait format.
ASPECTS = dict.fromkeys(("table", "chart", "id_card", "code_listing", "music_score"), (0.707, 0.773, 1.333, 1.414))
ASPECTS |= {"receipt": (0.4, 0.45, 0.5, 0.6), "slide": (1.333, 1.414, 1.6, 1.778)}


def draw_page(class_name: str, rng: np.random.Generator, size_px: int) -> Pixels:
    """Draw one clean page as uint8 H x W x 3 RGB with longest side `size_px`; `rng` decides everything else.

    Raises:
        KeyError: `class_name` is not in `CLASSES`.
        ValueError: `size_px` is under 32, too small for any writing.
    """
    if size_px < 32:
        raise ValueError(f"size_px must be at least 32, got {size_px}")
    random, aspects = Random(rng.bytes(16)), ASPECTS.get(class_name, (0.707, 0.773, 0.82))
    dark = class_name in ("chart", "slide", "code_listing") and random.random() < 0.35
    canvas = Canvas(random, size_px, random.choice(aspects), dark)
    KINDS[class_name](canvas, random)
    page: Pixels = cv2.resize(canvas.pixels, None, fx=1 / SUPERSAMPLE, fy=1 / SUPERSAMPLE, interpolation=cv2.INTER_AREA)
    return page
