"""Kinds of page that are read: letters, invoices, receipts, forms, tables, exams, articles."""

import numpy as np

from doccls.data.demo.canvas import BLACK, BLUE, RED, SANS, TYPEWRITER, Canvas, amount, pick, prose, roll, title
from doccls.data.demo.stationery import draw_grid, draw_logo, invent_date, take_sheet, write_address

GOODS = ("bread", "milk", "tea", "pens", "apples", "stamps", "paper", "soup")
FIELDS = ("Surname", "Given name", "Date of birth", "Street", "City", "Phone", "Reference")


def draw_letter(rng: np.random.Generator, size_px: int) -> Canvas:
    c = take_sheet(rng, size_px)
    left, right, y = c.margin, c.width - c.margin, rng.uniform(7, 13)
    head = roll(rng, 0, 4)
    if head == 0:
        c.text(c.width / 2, y, title(rng, 2), 2 * c.em, bold=True, anchor="middle", ink=c.accent)
        c.rule(left, y + 2, right, y + 2, ink=c.accent)
        y += 6
    elif head == 1:
        draw_logo(c, left + 3, y, 2.6)
        c.text(left + 8, y + 1, title(rng, 2), 1.7 * c.em, bold=True)
        y += 8
    elif head == 2:
        y = write_address(c, right, y, "right") + 1
    x_close = left + pick(rng, (0, 0.45)) * (right - left)
    c.text(x_close, y, invent_date(c))
    y = write_address(c, left, y + 3 * c.em) + 1.5 * c.em
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


def draw_invoice(rng: np.random.Generator, size_px: int) -> Canvas:
    c = take_sheet(rng, size_px)
    left, right, y = c.margin, c.width - c.margin, rng.uniform(8, 12)
    word, swap = pick(rng, ("INVOICE", "Invoice", "INVOICE")), rng.random() < 0.5
    c.text(left if swap else right, y, word, 2.4 * c.em, bold=True, anchor="left" if swap else "right", ink=c.accent)
    draw_logo(c, (right - 3) if swap else (left + 3), y - 1, 2.5)
    y += 6
    below = write_address(c, left, y)
    for i, label in enumerate(("Invoice no.", "Date", "Due")):
        value = f"{roll(rng, 10000, 90000)}" if i == 0 else f"{roll(rng, 1, 29):02d}.0{i + 3}.24"
        c.text(right - 13, y + 1.4 * c.em * i, label, anchor="right", bold=True)
        c.text(right, y + 1.4 * c.em * i, value, anchor="right")
    c.text(left, below + c.em, "Bill to", bold=True)
    y = write_address(c, left, below + 2.4 * c.em) + rng.uniform(0, 4)
    rows, step, total = roll(rng, 4, 10), rng.uniform(1.7, 2.2) * c.em, 0.0
    x = [left, *(left + (right - left) * share for share in (0.52, 0.66, 0.83)), right]
    dark_head = rng.random() < 0.5
    draw_grid(c, x, y, step, rows, roll(rng, 0, 4))
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


def draw_receipt(rng: np.random.Generator, size_px: int) -> Canvas:
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


def draw_form(rng: np.random.Generator, size_px: int) -> Canvas:
    c = take_sheet(rng, size_px)
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


def draw_table(rng: np.random.Generator, size_px: int) -> Canvas:
    c = take_sheet(rng, size_px, wide=0.35)
    c.margin = min(c.margin, 6)
    left, right, y = c.margin, c.width - c.margin, rng.uniform(5, 8)
    c.text(left, y, f"Table {roll(rng, 1, 20)}. {prose(rng, 26).capitalize()}", 1.1 * c.em, bold=True)
    columns, step = roll(rng, 5, 10), rng.uniform(1.6, 2.3) * c.em
    rows = int((c.height - y - rng.uniform(6, 22)) / step)
    first = rng.uniform(0.16, 0.26)
    x = [left, *(left + (right - left) * float(share) for share in np.linspace(first, 1, columns))]
    size = min(c.em, (x[2] - x[1]) / 4.2)
    draw_grid(c, x, y + 1.5, step, rows, roll(rng, 0, 4))
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


def draw_exam_sheet(rng: np.random.Generator, size_px: int) -> Canvas:
    c = take_sheet(rng, size_px)
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


def draw_article(rng: np.random.Generator, size_px: int) -> Canvas:
    c = take_sheet(rng, size_px)
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
