"""Kinds of page that are seen: charts, slides, cards, code, music."""

import numpy as np

from doccls.data.demo.canvas import ACCENTS, BLACK, SANS, TYPEWRITER, Canvas, Colour, pick, prose, roll, title
from doccls.data.demo.stationery import PORTRAIT, invent_date, take_sheet

DARK: tuple[Colour, ...] = ((30, 32, 40), (24, 40, 60), (44, 34, 52), (36, 50, 46), (52, 52, 54))
PALE: Colour = (232, 234, 228)
SYNTAX: tuple[Colour, ...] = ((86, 140, 196), (196, 120, 60), (110, 150, 80), (160, 90, 160))
CARDS: tuple[Colour, ...] = ((214, 226, 236), (238, 222, 208), (214, 232, 216), (232, 220, 236), (240, 236, 214))
SKINS: tuple[Colour, ...] = ((222, 184, 154), (176, 128, 98), (120, 84, 64))
HAIR: tuple[Colour, ...] = ((58, 44, 36), (34, 32, 34), (128, 92, 56), (150, 148, 146))
CLOTHES: tuple[Colour, ...] = ((62, 72, 92), (92, 62, 56), (52, 84, 70))
CARD_NAMES = ("IDENTITY CARD", "STAFF CARD", "STUDENT CARD", "LIBRARY CARD")
NAMES = ("page", "row", "count", "total", "queue", "node", "left", "index", "value", "ink")


def draw_chart(rng: np.random.Generator, size_px: int) -> Canvas:
    c = take_sheet(rng, size_px, wide=0.6)
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


def draw_slide(rng: np.random.Generator, size_px: int) -> Canvas:
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
        value = (title(rng, 2), invent_date(c), f"{roll(rng, 10000000, 90000000)}")[i]
        c.text(fx, base - 0.5 * unit, label, 3 * unit, ink=c.accent, face=SANS)
        c.text(fx, base + 4.5 * unit, value, 4.6 * unit, ink=BLACK, face=SANS, bold=i == 0)
    for i, code in enumerate((f"ID{roll(rng, 10**11, 10**12)}", title(rng, 2).upper().replace(" ", "<<"))):
        line = code.ljust(30, "<")[:30]
        c.text(x + 4 * unit, y + (54 + 6 * i) * unit, line, 4.4 * unit, ink=BLACK, face=TYPEWRITER, fit=92 * unit)
    c.box(x, y, x + width, y + height, ink=(120, 120, 124))


def draw_id_card(rng: np.random.Generator, size_px: int) -> Canvas:
    if rng.random() < 0.45:
        # A copied sheet with the card somewhere on it, as offices keep them.
        c = take_sheet(rng, size_px)
        width = rng.uniform(0.55, 0.8) * c.width
        x = rng.uniform(0.05, 0.95) * (c.width - width)
        y = rng.uniform(4, 24 if rng.random() < 0.5 else c.height - width / 1.586 - 4)
        _card(c, x, y, width)
        if y < 24:
            y += width / 1.586 + 8
            c.text(c.margin, y, f"Copy seen on {invent_date(c)}")
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


def draw_code_listing(rng: np.random.Generator, size_px: int) -> Canvas:
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


def draw_music_score(rng: np.random.Generator, size_px: int) -> Canvas:
    c = take_sheet(rng, size_px, wide=0.2)
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
