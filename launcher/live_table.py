"""The live view as lines for a terminal of a given size; pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, set_cell_size

from launcher.ledger import format_duration
from launcher.progress import FoldProgress, Progress, describe_totals
from launcher.status import State

_GAP = "  "
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.,-~=+#"
_MIN_LAST, _MAX_TREND, _MIN_RUN, _MAX_RUN = 8, 30, 12, 28
_NARROW = ("left", "best F1", "epoch")  # the columns that go, in this order, where even short run names leave no room
_COLOURS = {State.DONE: "32", State.FAILED: "31", State.LOST: "31", State.STOPPED: "33", State.UNKNOWN: "33"}
_DIM, _BOLD = "2", "1"
# Which folds are shown first if not all have room.
_ORDER = (
    State.RUNNING, State.FAILED, State.LOST, State.STOPPED, State.UNKNOWN, State.WAITING, State.DONE, State.MISSING,
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """What the terminal can show."""

    has_colour: bool = False
    has_bars: bool = True  # the block characters of the trend


@dataclass(frozen=True)
class _Column:
    header: str
    render: Callable[[FoldProgress], str]
    is_number: bool = False
    rank: int = 0  # the columns with the highest ranks are left out first where the terminal is narrow; 0: never


_COLUMNS = (
    _Column("run", lambda fold: _shorten(fold.run, _MAX_RUN)),
    _Column("fold", lambda fold: str(fold.fold), is_number=True),
    _Column("state", lambda fold: _render_state(fold)),
    _Column("on", lambda fold: fold.slot, rank=1),
    _Column("epoch", lambda fold: _render_count(fold.epoch, fold.epochs), is_number=True),
    _Column("step", lambda fold: _render_count(fold.step, fold.steps), is_number=True, rank=4),
    _Column("img/s", lambda fold: _render_images(fold.images_per_s), is_number=True, rank=3),
    _Column("best F1", lambda fold: "" if fold.best is None else f"{fold.best:.4f}", is_number=True),
    _Column("left", lambda fold: _render_left(fold.left_s), is_number=True),
    _Column("restarts", lambda fold: str(fold.restarts or ""), is_number=True, rank=2),
)


def render_live(
    progress: Progress, width: int | None = None, height: int | None = None, style: Style | None = None
) -> list[str]:
    """Render the totals and a row for each fold, within so many columns and lines; None is no limit.

    Columns that hold nothing are left out, and so are, where the terminal is narrow, the less important ones; the names
    of runs become short there. Where it is low, running and failed folds are shown, and the last line counts the
    others.
    """
    style = style or Style()
    totals = describe_totals(progress)
    room = None if height is None else max(1, height - 2)
    folds, hidden = _choose_folds(progress.folds, room)
    columns = _choose_columns(folds, width)
    rows = [[column.header for column in columns], *([column.render(fold) for column in columns] for fold in folds)]
    sizes = [max(cell_len(row[number]) for row in rows) for number in range(len(columns))]
    used = sum(sizes) + len(_GAP) * len(sizes)
    last_size = None if width is None else width - used
    trend = "macro-F1 by epoch" if last_size is None or last_size >= len("macro-F1 by epoch") else "macro-F1"
    lines = [_paint(_fit(totals, width), _BOLD, style)]
    lines.append(_paint(_fit(_join(rows[0], columns, sizes, trend, last_size), width), _DIM, style))
    for fold, cells in zip(folds, rows[1:], strict=True):
        line = _fit(_join(cells, columns, sizes, _render_last(fold, last_size, style), last_size), width)
        lines.append(_paint_state(line, fold, columns, sizes, style))
    if hidden:
        lines.append(_fit(f"... and {', '.join(f'{count} {state}' for state, count in hidden)}", width))
    return lines if height is None else lines[: max(1, height)]


def _choose_folds(
    folds: Sequence[FoldProgress], room: int | None
) -> tuple[list[FoldProgress], list[tuple[State, int]]]:
    """Return the folds to show, and the number of the others in each state."""
    if room is None or len(folds) <= room:
        return list(folds), []
    ranked = sorted(range(len(folds)), key=lambda number: (_ORDER.index(folds[number].state), number))
    shown, others = ranked[: room - 1], [folds[number].state for number in ranked[room - 1 :]]
    return [folds[number] for number in shown], [(state, others.count(state)) for state in _ORDER if state in others]


def _choose_columns(folds: Sequence[FoldProgress], width: int | None) -> list[_Column]:
    columns = [
        column
        for column in _COLUMNS
        if column.header in ("fold", "state") or any(column.render(fold) for fold in folds)
    ]
    if width is None:
        return columns
    while _measure(columns, folds) + _MIN_LAST > width:
        removed = max(columns, key=lambda column: column.rank)
        if not removed.rank:
            break
        columns.remove(removed)
    if _measure(_shorten_runs(columns, folds, 0, _MIN_RUN), folds) + _MIN_LAST <= width:
        return _shorten_runs(columns, folds, width - _MIN_LAST, _MIN_RUN)
    for header in _NARROW:
        if _measure(_shorten_runs(columns, folds, 0, _MIN_RUN), folds) - len(_GAP) > width:
            columns = [column for column in columns if column.header != header]
    return _shorten_runs(columns, folds, width + len(_GAP), 1)


def _shorten_runs(columns: list[_Column], folds: Sequence[FoldProgress], width: int, least: int) -> list[_Column]:
    """Return the columns with the names of runs so short, but not below `least`, that all fit with their gaps."""
    if columns[0].header != "run" or (excess := _measure(columns, folds) - width) <= 0:
        return columns
    size = max(least, _measure(columns[:1], folds) - len(_GAP) - excess)
    return [replace(columns[0], header="run"[:size], render=lambda fold: _shorten(fold.run, size)), *columns[1:]]


def _measure(columns: Sequence[_Column], folds: Sequence[FoldProgress]) -> int:
    """Return the width of the columns with the gaps behind them."""
    sizes = [max(cell_len(text) for text in (column.header, *map(column.render, folds))) for column in columns]
    return sum(sizes) + len(_GAP) * len(sizes)


def _join(
    cells: Sequence[str], columns: Sequence[_Column], sizes: Sequence[int], last: str, last_size: int | None
) -> str:
    padded = [
        " " * (size - cell_len(text)) + text if column.is_number else text + " " * (size - cell_len(text))
        for text, column, size in zip(cells, columns, sizes, strict=True)
    ]
    has_last = last_size is None or last_size >= _MIN_LAST
    return _GAP.join([*padded, last] if has_last else padded).rstrip()


def _render_last(fold: FoldProgress, size: int | None, style: Style) -> str:
    """Return the fold's problem or, without one, the scores of its epochs as bars."""
    if fold.remark:
        return fold.remark if fold.remark.isprintable() else repr(fold.remark)
    return render_bars(fold.scores, _MAX_TREND if size is None else min(size, _MAX_TREND), style.has_bars)


def render_bars(scores: Sequence[float], width: int, has_bars: bool = True) -> str:
    """Render the last scores as a bar each, from the lowest to the highest of them; equal ones are in the middle."""
    shown, levels = list(scores)[-width:] if width > 0 else [], _BARS if has_bars else _ASCII_BARS
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    if not span > 0:
        return levels[len(levels) // 2] * len(shown)
    return "".join(levels[round((score - low) / span * (len(levels) - 1))] for score in shown)


def _render_state(fold: FoldProgress) -> str:
    return fold.phase if fold.state is State.RUNNING and fold.phase in ("start", "validate", "stopping") else fold.state


def _render_count(done: int, total: int) -> str:
    if not done and not total:
        return ""
    return f"{done}/{total}" if total else str(done)


def _render_images(images_per_s: float | None) -> str:
    if images_per_s is None:
        return ""
    return f"{images_per_s:.1f}" if images_per_s < 10 else f"{images_per_s:.0f}"


def _render_left(left_s: float | None) -> str:
    return "" if left_s is None else format_duration(left_s)


def _cut(text: str, size: int) -> str:
    return text if cell_len(text) <= size else f"{set_cell_size(text, size - 1).rstrip()}~"


def _shorten(name: str, size: int) -> str:
    """Cut out the middle of a run's name: its end, such as the seed, often tells it from others."""
    if len(name) <= size:
        return name
    tail = size // 2
    return f"{name[: size - 1 - tail]}~{name[len(name) - tail :]}"


def _fit(line: str, width: int | None) -> str:
    return line if width is None else _cut(line, width)


def _paint_state(line: str, fold: FoldProgress, columns: Sequence[_Column], sizes: Sequence[int], style: Style) -> str:
    """Colour the state in the line, or dim the line of a fold that does nothing yet."""
    if fold.state in (State.WAITING, State.MISSING):
        return _paint(line, _DIM, style)
    number = [column.header for column in columns].index("state")
    start = sum(sizes[:number]) + len(_GAP) * number
    word = _render_state(fold)
    if fold.state not in _COLOURS or line.find(word, start) != start:
        return line
    return f"{line[:start]}{_paint(word, _COLOURS[fold.state], style)}{line[start + len(word) :]}"


def _paint(text: str, code: str, style: Style) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if style.has_colour and text else text
