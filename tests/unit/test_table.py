"""CSV files: read exactly as written, or refused with the line and what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doccls.data.table import Table, read_table, require_columns
from doccls.errors import UserError

PLAIN = "ID,target\na,0\nb,1\n"


def read(folder: Path, content: bytes | str, columns: tuple[str, ...] = ("ID", "target")) -> Table:
    path = folder / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, "data.train_csv", columns)


def reject(folder: Path, content: bytes | str) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, content)
    message = str(caught.value)
    assert message.startswith(f"data.train_csv: can't read {folder / 't.csv'}: ")
    return message


def list_rows(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*table.cells.values(), strict=True))


# --- cells and lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "rows", "lines"),
    [
        (PLAIN, [("a", "0"), ("b", "1")], [2, 3]),
        (PLAIN.removesuffix("\n"), [("a", "0"), ("b", "1")], [2, 3]),
        (PLAIN.replace("\n", "\r\n"), [("a", "0"), ("b", "1")], [2, 3]),
        (PLAIN.replace("\n", "\r"), [("a", "0"), ("b", "1")], [2, 3]),
        ("\n\nID,target\n\na,0\n  \n\nb,1\n\n", [("a", "0"), ("b", "1")], [5, 8]),
        ('ID,target\n"a,b",0\n"c""d",1\n', [("a,b", "0"), ('c"d', "1")], [2, 3]),
        ('ID,target\na"b,0\nc,"1"\n', [('a"b', "0"), ("c", "1")], [2, 3]),
        ("ID,target\n007, 1.0\nNA,#N/A\n", [("007", " 1.0"), ("NA", "#N/A")], [2, 3]),
        ('ID,note,target\na,"one\ntwo",0\nb,"x\r\ny\rz",1\n', [("a", "0"), ("b", "1")], [2, 4]),
        ("ID,x,target\na,,0\nb\x85\u2028c,\x0b,1\n", [("a", "0"), ("b\x85\u2028c", "1")], [2, 3]),
        ("target,ID\n0,a\n", [("a", "0")], [2]),
        ("ID,target,,\na,0,,\n", [("a", "0")], [2]),
        (f'ID,text,target\na,"{"x" * 140_000}",0\n', [("a", "0")], [2]),
    ],
)
def test_cells_are_read_as_written_with_the_lines_of_the_file(
    tmp_path: Path, content: str, rows: list[tuple[str, str]], lines: list[int]
) -> None:
    table = read(tmp_path, content)
    assert list_rows(table) == rows and table.lines_N.tolist() == lines and len(table) == len(rows)


def test_only_requested_columns_have_cells_but_all_are_named(tmp_path: Path) -> None:
    table = read(tmp_path, "ID,note,target\na,x,0\n", ("target", "fold", "ID"))
    assert table.columns == ("ID", "note", "target")
    assert table.cells == {"target": ["0"], "ID": ["a"]}


def test_line_breaks_in_other_columns_are_reported(tmp_path: Path) -> None:
    table = read(tmp_path, 'ID,note,target\n\na,"one\ntwo",0\nb,x,1\nc,"3\n\n4",1\n')
    assert table.warnings == (
        "quoted cells with line breaks: 2\n"
        "    line 3 (to line 4): column 'note'\n    line 6 (to line 8): column 'note'",
    )
    assert read(tmp_path, PLAIN).warnings == ()


@pytest.mark.parametrize(
    "text", ["Invoice\nACME Ltd, 5 High St, London", "Total\nx,y,z", "a\nb,9,c\nd,8,e", "a\n\nb , 0,c"]
)
def test_text_of_several_lines_is_no_hidden_row(tmp_path: Path, text: str) -> None:
    rows = [f'{row},{row % 2},"{text}"' for row in range(20)]
    assert len(read(tmp_path, "ID,target,text\n" + "\n".join(rows) + "\n")) == 20


def test_address_of_two_lines_with_a_comma_is_no_hidden_row(tmp_path: Path) -> None:
    table = read(tmp_path, 'ID,address,target\na,"12 Main St\nSpringfield, IL",0\nb,x,1\n')
    assert table.lines_N.tolist() == [2, 4]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file is empty: its first line must name the columns"),
        ("\n \n", "the file is empty"),
        ("ID,target,ID\n", "line 1: duplicate column names: 'ID' names columns 1 and 3: rename or remove all but one"),
        ("\nID,target,x,x\na,0,,\n", "line 2: duplicate column names: 'x' names columns 3 and 4"),
        ('"ID\n",target\n', "line 1 (to line 2): a column name with a line break"),
        ("ID,target\na\nb,1\n", "than the header, which has 2: 1\n    line 2: 1 cells"),
        ("ID,target\n\na,b,0\nc,d,1,2\ne,1\n", "which has 2: 2\n    line 3: 3 cells\n    line 4: 4 cells"),
        ("ID,target\na,0,\nb,1,\n", "which has 2 (every row ends with a comma, and the header doesn't): 2"),
        ("# made in 2026\nID,target\na,0\n", "has 1 ('# made in 2026'; must be the names of the columns"),
        ('ID,target\n\na,"0\nb,1\n', "line 3 (to line 4): a quoted cell that never ends: close the quotation mark"),
        ('ID,target\na,"0"x\n', "line 2: text after the closing quotation mark of a cell"),
        ('ID,target\na,"0\nb,1\nc,x "y" z\n', "line 2 (to line 4): text after the closing quotation mark of a cell"),
        ('ID,target\na,"0\nb,1"\n', "whole rows are within; close the quotation mark (\"), or write it as two (\"\")"),
        ('ID,target\n"a\nb",1\n', "line 2 (to line 3): column 'ID'"),
        ('ID,target,note\na,0,"x\nb,1,y\nc,1,z"\n', "line 2 (to line 4): column 'note'"),
        ('ID,note,target\na,"x,0\nb,y",1\n', "line 2 (to line 3): column 'note'"),
        ('note,ID,target\n"x,a,0\ny",b,1\n', "line 2 (to line 3): column 'note'"),
        (f'ID,target,text\na,0,"{"x" * 140_000}\n', "line 2: a quoted cell that never ends"),
        ('ID,target,note\na,0,"x\n\nb,1,y\n\nc,1,z"\n', "line 2 (to line 6): column 'note'"),
        ("ID;target\na;0,5\n", "(separated by semicolons: save it with commas): 1"),
    ],
)  # fmt: skip
def test_text_that_is_no_table_is_refused_with_its_line(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in reject(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "ID,target\ncafé,0\n".encode("latin-1"),
            "line 2: byte 0xe9 is not UTF-8 text: save the table as CSV in UTF-8",
        ),
        ("ID,target\nx,0\nだ,0\n".encode("shift-jis"), "line 3: byte 0x82 is not UTF-8 text"),
        (b"\xef\xbb\xbfID,target\n\xe9,x\n", "line 2: byte 0xe9 is not UTF-8 text"),
        (PLAIN.encode("utf-16")[:-1], "is not UTF-16 text"),
        (PLAIN.encode("utf-16-le"), "line 1: a NUL character: binary data, or UTF-16 without a byte order mark"),
        (PLAIN.encode("utf-32"), "UTF-32 text: save the table as CSV in UTF-8"),
        (b"ID,target\r\na,0\r\nb,\0\r\n", "line 3: a NUL character"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an Excel workbook (xls)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "line 1: byte 0x89 is not UTF-8 text"),
    ],
)
def test_other_encodings_are_refused_with_how_to_save(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in reject(tmp_path, content)


def test_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sample-csv: can't read .*/gone.csv: No such file or directory"):
        read_table(tmp_path / "gone.csv", "--sample-csv", ["ID"])


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("ID;target", " (separated by semicolons"),
        ("ID\ttarget", " (separated by tabs"),
        ("id,Target", "'id', 'Target'"),
    ],
)
def test_missing_column_is_reported_with_the_header(tmp_path: Path, header: str, hint: str) -> None:
    table = read(tmp_path, f"{header}\n")
    with pytest.raises(UserError) as caught:
        require_columns(table, tmp_path / "t.csv", {"data.id_col": "ID", "data.target_col": "target"})
    message = str(caught.value)
    assert f"{tmp_path / 't.csv'}: no such column: data.id_col = 'ID', data.target_col = 'target'" in message
    assert hint in message


def test_long_header_is_cut_and_no_rows_are_an_error(tmp_path: Path) -> None:
    table = read(tmp_path, ",".join(f"{column}{'x' * 100}" for column in range(30)) + "\n")
    with pytest.raises(UserError) as caught:
        require_columns(table, tmp_path, {"data.id_col": "ID"})
    assert "and 10 more" in str(caught.value) and len(str(caught.value)) < 2500
    with pytest.raises(UserError, match="no rows"):
        require_columns(read(tmp_path, "ID\n"), tmp_path, {"data.id_col": "ID"})


# --- encodings and compression ----------------------------------------------------------------------------------------


def make_zip(**files: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zip": lambda data: make_zip(**{"train.csv": data.decode()}),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom"])
@pytest.mark.parametrize("packer", [None, "gzip"])
def test_utf8_and_utf16_are_read(tmp_path: Path, encoding: str, packer: str | None) -> None:
    text = "ID,target\ncafé,영수증\n"
    data = b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-bom" else text.encode(encoding)
    assert list_rows(read(tmp_path, PACKERS[packer](data) if packer else data)) == [("café", "영수증")]


@pytest.mark.parametrize("packer", PACKERS)
def test_compression_is_detected_by_content(tmp_path: Path, packer: str) -> None:
    assert list_rows(read(tmp_path, PACKERS[packer](PLAIN.encode()))) == [("a", "0"), ("b", "1")]


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("cut", [8, -9, -1])
def test_truncated_archive_is_refused(tmp_path: Path, packer: str, cut: int) -> None:
    assert "a damaged or incomplete " in reject(tmp_path, PACKERS[packer](PLAIN.encode())[:cut])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xfd7zXZ\0junk", "a damaged or incomplete compressed file"),
        (b"\x1f\x8b" + bytes(30), "a damaged or incomplete compressed file"),
        (b"PK\x03\x04" + bytes(200), "a damaged or incomplete zip archive or Excel workbook (xlsx) ("),
        (make_zip(**{"train.csv": PLAIN, "__MACOSX/._train.csv": "x"}), "zip archive of 2 files ('train.csv', '__MAC"),
        (make_zip(), "a zip archive of 0 files"),
        (make_zip(**{"[Content_Types].xml": "", "xl/workbook.xml": ""}), "an Excel workbook (xlsx)"),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "a zstd file, not text: unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(9), "a 7-Zip archive, not text"),
        (b"PAR1" + bytes(9), "a Parquet file, not text"),
        (b" <!DOCTYPE html><html>", "a web page (HTML)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (gzip.compress(b"train.csv".ljust(257, b"\0") + b"ustar\0" + bytes(500)), "a tar archive, not text"),
        (gzip.compress(gzip.compress(PLAIN.encode())), "compressed twice: unpack it"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "bytes",  # archives hold the time
)  # fmt: skip
def test_damaged_and_other_archives_are_refused_in_words(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in reject(tmp_path, content)


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    data = bytearray(make_zip(**{"train.csv": PLAIN}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    assert "encrypted" in reject(tmp_path, bytes(data))


# --- any text and any damage -----------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")), st.text("ab,\"' ")), min_size=1
    )
)
def test_written_cells_are_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "target"])
    writer.writerows(rows)
    table = read(tmp_path_factory.getbasetemp(), text.getvalue())
    assert list_rows(table) == rows and table.lines_N.tolist() == list(range(2, len(rows) + 2))


def make_damaged(seed: int) -> bytes:
    """Return a table of 16 rows with up to four planted quotes, separators, line breaks, flipped or removed bytes."""
    draw = random.Random(seed)
    data = bytearray(b"ID,note,target\n")
    for row in range(16):
        data += f"p{row:03d},{draw.choice(['ok', 'see page 2', '', '3'])},{row % 3}\n".encode()
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        kind = draw.randrange(6)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at]
        else:
            starts = [match.end() for match in re.finditer(rb"[,\n]", data)]
            at = draw.choice([at, draw.choice(starts or [0]), draw.choice(starts or [1]) - 1])
            data[at:at] = draw.choice([b'"', b'"', b'"', b",", b"\n", b";", b"\r"])
        if not data:
            return b"x"
    return bytes(data)


def check_damaged(folder: Path, data: bytes) -> str:
    """Check that the table is read as written, or refused; return what happened."""
    try:
        table = read(folder, data, ("ID", "target"))
    except UserError as error:
        assert "can't read" in str(error)
        return "refused"
    lines = [line for line in re.split(r"\r\n|\r|\n", data.decode("utf-8-sig")) if line.strip()]
    if table.warnings:
        assert "line breaks" in table.warnings[0]
        return "warned"
    assert len(table) == len(lines) - 1
    positions = {name: table.columns.index(name) for name in table.cells}
    for row, line in enumerate(lines[1:]):
        if '"' not in line:
            cells = line.split(",")
            assert all(table.cells[name][row] == cells[position] for name, position in positions.items())
    return "read"


def test_damaged_table_is_read_as_written_or_refused(tmp_path: Path) -> None:
    outcomes = {check_damaged(tmp_path, make_damaged(seed)) for seed in range(1500)}
    assert {"read", "refused"} <= outcomes
