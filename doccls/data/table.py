"""CSV files as tables of text: read exactly as written, or refused with the line and what to do."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from doccls.data.messages import format_examples
from doccls.errors import UserError

# A column of text may hold entire pages; unpaired quotation marks are found at the end of the file.
csv.field_size_limit(sys.maxsize)

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_MAX_COLUMNS_SHOWN = 20
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"PK\x03\x04", b"PK\x05\x06")
_OTHER_FORMATS = {
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"PAR1": "a Parquet file",
    b"version https://git-lfs": "a Git LFS pointer (fetch the file with `git lfs pull`)",
}
_UNPACK = "unpack it, or name the CSV file itself"
_SAVE = 'save the table as CSV in UTF-8 (in Excel: Save As, "CSV UTF-8 (Comma delimited)")'
_UNCLOSED = 'close the quotation mark ("), or write it as two ("") within a quoted cell'


@dataclass(frozen=True, eq=False)
class Table:
    """A table of text. Only the columns that the reader was asked for have cells."""

    columns: tuple[str, ...]  # the names of all columns, in order
    cells: Mapping[str, Sequence[str]]  # each requested column that exists -> its n cells, as written
    lines_N: np.ndarray  # (n,) int64: the line of the file on which each row begins, from 1
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines_N)


class _TableError(ValueError):
    """The file is not a table that can be read as written; the caller adds which file."""


def read_table(path: Path, key: str, columns: Iterable[str]) -> Table:
    """Read the CSV file at `path` with every cell as text, so that an ID `NA` or `007` stays as written.

    Its content shows whether the file is compressed (gzip, bzip2, xz, or a zip archive of one file). Its text is UTF-8,
    or UTF-16 with a byte order mark.

    Args:
        path: The file.
        key: The config key or option that names it, for messages.
        columns: The columns to read; their cells must not contain line breaks. Those that don't exist are left out.

    Raises:
        UserError: the file can't be read, its text is not a table, or its quotation marks are not paired.
    """
    try:
        return parse_table(decode_text(decompress(path.read_bytes())), columns)
    except OSError as error:
        raise UserError(f"{key}: can't read {path}: {error.strerror or error}") from error
    except _TableError as error:
        raise UserError(f"{key}: can't read {path}: {error}") from error


def require_columns(table: Table, path: Path, names: Mapping[str, str]) -> None:
    """Check that the table has the column that each config key names, and at least one row.

    Raises:
        UserError: it doesn't.
    """
    missing = [f"{key} = {column!r}" for key, column in names.items() if column not in table.columns]
    if missing:
        shown = [repr(name[:80]) for name in table.columns[:_MAX_COLUMNS_SHOWN]]
        others = len(table.columns) - len(shown)
        present = ", ".join(shown) + (f" and {others} more" if others else "")
        raise UserError(
            f"{path}: no such column: {', '.join(missing)}; its first line, the header, has: {present}"
            f"{_describe_other_separator(table.columns)}"
        )
    if not len(table):
        raise UserError(f"{path}: no rows")


def decompress(data: bytes) -> bytes:
    """Return the file's content, decompressed if it is compressed.

    Raises:
        ValueError: the archive is damaged, encrypted, or doesn't hold exactly one file.
    """
    try:
        content = _decompress_once(data)
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        if isinstance(error, _TableError):
            raise
        kind = "zip archive or Excel workbook (xlsx)" if data.startswith(b"PK") else "compressed file"
        raise _TableError(f"a damaged or incomplete {kind} ({error}): copy or download it again") from error
    for start, name in _OTHER_FORMATS.items():
        if content.startswith(start):
            raise _TableError(f"{name}, not text: {_UNPACK}")
    if content[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise _TableError("a web page (HTML), such as the error page of a failed download: download the table again")
    if content[257:262] == b"ustar":
        raise _TableError(f"a tar archive, not text: {_UNPACK}")
    if content is not data and content.startswith(_COMPRESSED):
        raise _TableError(f"compressed twice: {_UNPACK}")
    return content


def _decompress_once(data: bytes) -> bytes:
    gzipped, bzipped, xzipped, zipped, empty_zip = _COMPRESSED
    if data.startswith(gzipped):
        return gzip.decompress(data)
    if data.startswith(bzipped):
        return bz2.decompress(data)
    if data.startswith(xzipped):
        return lzma.decompress(data)
    return _unzip(data) if data.startswith((zipped, empty_zip)) else data


def _unzip(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if "[Content_Types].xml" in names:
            raise _TableError(f"an Excel workbook (xlsx), not text: {_SAVE}")
        if len(names) != 1:
            shown = ", ".join(map(repr, names[:5]))
            raise _TableError(f"a zip archive of {len(names)} files ({shown}), not of one: {_UNPACK}")
        return archive.read(names[0])


def decode_text(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one.

    Raises:
        ValueError: another encoding, or a binary file.
    """
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise _TableError(f"an Excel workbook (xls), not text: {_SAVE}")
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise _TableError(f"UTF-32 text: {_SAVE}")
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = _count_lines(data[: error.start].decode(encoding, "replace"))
        name = encoding.upper()
        raise _TableError(f"line {line}: byte {data[error.start]:#04x} is not {name} text: {_SAVE}") from error
    if "\0" in text:
        line = _count_lines(text[: text.index("\0")])
        raise _TableError(f"line {line}: a NUL character: binary data, or UTF-16 without a byte order mark: {_SAVE}")
    return text


def _count_lines(text: str) -> int:
    """Return the number of the line on which the text ends."""
    return len(_LINE_BREAK.split(text))


def parse_table(text: str, columns: Iterable[str]) -> Table:
    """Parse CSV text. Blank lines are skipped, but counted, as are those within quoted cells.

    Raises:
        ValueError: no header, columns with one name, rows with another number of cells than the header, quotation marks
            that are not paired, or line breaks in the cells of `columns`.
    """
    rows = _iterate_rows(text)
    first = next(rows, None)
    if first is None:
        raise _TableError("the file is empty: its first line must name the columns")
    header = first.cells
    _check_header(first)
    picked: list[tuple[int, list[str]]] = [
        (header.index(name), []) for name in dict.fromkeys(columns) if name in header
    ]
    used = {position for position, _ in picked}
    lines: list[int] = []
    wrong_widths: list[_Row] = []
    broken: list[str] = []
    multi_line: list[tuple[_Row, int]] = []
    for row in rows:
        if len(row.cells) != len(header):
            wrong_widths.append(row)
            continue
        if row.end > row.start:
            for position in row.find_line_breaks():
                if position in used:
                    broken.append(f"{row.describe()}: column {header[position]!r}")
                else:
                    multi_line.append((row, position))
        lines.append(row.start)
        for position, cells in picked:
            cells.append(row.cells[position])
    known = {position: _Known.describe(cells) for position, cells in picked}
    harmless: list[str] = []
    for row, position in multi_line:
        is_wrong = _holds_rows(row.cells[position], position, len(header), known)
        (broken if is_wrong else harmless).append(f"{row.describe()}: column {header[position]!r}")
    problems = [_describe_widths(header, wrong_widths, len(lines))] if wrong_widths else []
    if broken:
        heading = f"quoted cells with line breaks, where none may be or where whole rows are within; {_UNCLOSED}"
        problems.append(format_examples(heading, broken))
    if problems:
        raise _TableError("\n".join(problems))
    warnings = (format_examples("quoted cells with line breaks", harmless),) if harmless else ()
    cells_of = {header[position]: cells for position, cells in picked}
    return Table(tuple(header), cells_of, np.asarray(lines, dtype=np.int64), warnings)


class _Known(NamedTuple):
    """The values of a column in the rows that were read."""

    values: frozenset[str]
    is_distinct: bool  # most rows have a value of their own, as in a column of IDs
    has_spaces: bool

    @classmethod
    def describe(cls, cells: Sequence[str]) -> "_Known":
        values = frozenset(cells)
        return cls(values, 2 * len(values) > len(cells), any(" " in value for value in values))

    def is_like(self, cell: str) -> bool:
        """Return whether the cell has one of the values or, if they are distinct, is written like them."""
        is_written_like = bool(cell) and cell == cell.strip() and (self.has_spaces or " " not in cell)
        return cell in self.values or (self.is_distinct and is_written_like)


class _Row(NamedTuple):
    """A row of the file, with the first and the last of its lines."""

    start: int
    end: int
    cells: list[str]

    def find_line_breaks(self) -> list[int]:
        """Return the positions of the cells with line breaks."""
        return [position for position, cell in enumerate(self.cells) if _LINE_BREAK.search(cell)]

    def describe(self) -> str:
        return f"line {self.start}" + (f" (to line {self.end})" if self.end > self.start else "")


def _iterate_rows(text: str) -> Iterator[_Row]:
    """Yield each row that is not blank.

    Raises:
        ValueError: quotation marks are not paired.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for cells in reader:
            if cells and (len(cells) > 1 or cells[0].strip()):
                yield _Row(start, reader.line_num, cells)
            start = reader.line_num + 1
    except csv.Error as error:
        is_open = "end of data" in str(error)
        reason = "a quoted cell that never ends" if is_open else "text after the closing quotation mark of a cell"
        raise _TableError(f"{_Row(start, reader.line_num, []).describe()}: {reason}: {_UNCLOSED}") from error


def _check_header(row: _Row) -> None:
    repeated = [name for name, count in Counter(row.cells).items() if count > 1 and name]  # no key can name ``
    if repeated:
        listed = "; ".join(
            f"{name!r} names columns {' and '.join(str(at) for at, other in enumerate(row.cells, 1) if other == name)}"
            for name in repeated[:_MAX_COLUMNS_SHOWN]
        )
        raise _TableError(f"{row.describe()}: duplicate column names: {listed}: rename or remove all but one")
    if row.find_line_breaks():
        raise _TableError(f"{row.describe()}: a column name with a line break: {_UNCLOSED}")


def _holds_rows(cell: str, position: int, width: int, known: Mapping[int, _Known]) -> bool:
    """Return whether a cell with line breaks looks like two stray quotation marks with rows between them.

    Without the marks, its lines would be the end of a row, complete rows, and the start of a row that ends in this
    column; and each of their cells in a used column would look like the `known` ones of that column.
    """
    first, *inner, last = _LINE_BREAK.split(cell)
    complete = [line.split(",") for line in inner if line.strip()]
    head, tail = first.split(","), last.split(",")
    if len(head) != width - position or len(tail) != position + 1 or any(len(cells) != width for cells in complete):
        return False
    hidden = [*enumerate(head[1:], position + 1), *enumerate(tail[:-1])]
    hidden += [pair for cells in complete for pair in enumerate(cells)]
    return all(known[at].is_like(cell) for at, cell in hidden if at in known)


def _describe_widths(header: Sequence[str], wrong: Sequence[_Row], right: int) -> str:
    """Describe the rows whose number of cells is not that of the header, beside `right` others."""
    lines = [f"{row.describe()}: {len(row.cells)} cells" for row in wrong]
    hint = ""
    if not right and len(header) == 1:
        hint = f" ({header[0][:80]!r}; must be the names of the columns, in line 1)"
    elif not right and all(len(row.cells) == len(header) + 1 and not row.cells[-1] for row in wrong):
        hint = " (every row ends with a comma, and the header doesn't)"
    hint += _describe_other_separator(header)
    return format_examples(f"rows with another number of cells than the header, which has {len(header)}{hint}", lines)


def _describe_other_separator(header: Sequence[str]) -> str:
    """Return a hint about a header that is a single cell because another character separates the columns."""
    separators = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    found = [name for mark, name in separators.items() if len(header) == 1 and mark in header[0]]
    return f" (separated by {found[0]}: save it with commas)" if found else ""
