"""The directories of TIFF files: the page is found among thumbnails and masks, and damage neither raises nor hangs."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from doccls.data.formats import ImageError
from doccls.data.images import count_pages, decode_image
from doccls.data.metadata import read_orientation
from doccls.data.tiff import Ifd, Tiff, count_tiff_pages
from doccls.data.tiff_layout import read_layout

LIMIT = 10**6
NEW_SUBFILE_TYPE, SUBFILE_TYPE, ORIENTATION, SUB_IFDS = 254, 255, 274, 330
Tags = dict[int, int | tuple[int, ...]]


def render_directories(chain: list[Tags], below: list[Tags] = [], order: str = "<", big: bool = False) -> bytes:  # noqa: B006
    """Render grey pages of 4 x 2 px, page i of shade 10 * i; those of `below` are sub-directories of the first."""
    number, count, head = ("Q", "Q", 16) if big else ("L", "H", 8)
    pages = chain + below
    pixels = b"".join(bytes([10 * index]) * 8 for index in range(len(pages)))
    start = head + len(pixels)
    offsets: list[int] = []
    fields: list[Tags] = []
    for index, tags in enumerate(pages):
        common: Tags = {256: 4, 257: 2, 258: 8, 259: 1, 262: 1, 273: head + 8 * index, 277: 1, 278: 2, 279: 8}
        fields.append(common | tags)
        if index == 0 and below:
            fields[0][SUB_IFDS] = (0,) * len(below)
        offsets.append(start)
        entry = 20 if big else 12
        start += struct.calcsize(f"={count}{number}") + entry * len(fields[-1])
    arrays = b""
    if below:
        fields[0][SUB_IFDS] = tuple(offsets[len(chain) :])
    text = b""
    for index, tags in enumerate(fields):
        text += struct.pack(order + count, len(tags))
        for tag, value in sorted(tags.items()):
            values = value if isinstance(value, tuple) else (value,)
            packed = struct.pack(f"{order}{len(values)}L", *values)
            if len(packed) > (8 if big else 4):
                arrays, packed = arrays + packed, struct.pack(order + number, start + len(arrays))
            text += struct.pack(f"{order}HH{number}", tag, 4, len(values)) + packed.ljust(8 if big else 4, b"\0")
        following = offsets[index + 1] if index + 1 < len(chain) else 0
        text += struct.pack(order + number, following)
    magic = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    magic += struct.pack(f"{order}HH", 8, 0) if big else b""
    return magic + struct.pack(order + number, offsets[0]) + pixels + text + arrays


THUMBNAIL: Tags = {NEW_SUBFILE_TYPE: 1, 256: 2, 257: 1, 279: 2}
MASK: Tags = {NEW_SUBFILE_TYPE: 4}
OLD_THUMBNAIL: Tags = {SUBFILE_TYPE: 2, 256: 2, 257: 1, 279: 2}


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("chain", "below", "page", "pages"),
    [
        ([{}], [], 0, 1),
        ([{}, {}, THUMBNAIL], [], 0, 2),
        ([THUMBNAIL, {}], [], 1, 1),
        ([OLD_THUMBNAIL, {SUBFILE_TYPE: 1}], [], 1, 1),
        ([MASK, {NEW_SUBFILE_TYPE: 2}, {NEW_SUBFILE_TYPE: 2}], [], 1, 2),
        ([{NEW_SUBFILE_TYPE: 5}, MASK, THUMBNAIL, {}], [], 3, 1),
        ([THUMBNAIL], [THUMBNAIL, {}], 2, 1),
        ([THUMBNAIL, {}], [{}], 1, 1),
        ([THUMBNAIL, OLD_THUMBNAIL], [], 0, 1),
        ([THUMBNAIL], [MASK], 0, 1),
    ],
)
def test_page_is_found_among_thumbnails_and_masks(
    chain: list[Tags], below: list[Tags], page: int, pages: int, order: str, big: bool
) -> None:
    data = render_directories(chain, below, order, big)
    decoded = decode_image(data, LIMIT)
    assert np.unique(decoded).tolist() == [10 * page] and count_pages(data) == pages
    assert decoded.shape == ((1, 2, 3) if 256 in (chain + below)[page] else (2, 4, 3))


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_that_of_the_page(order: str) -> None:
    data = render_directories([THUMBNAIL | {ORIENTATION: 3}, {ORIENTATION: 6}], order=order)
    assert read_orientation(data) == 6 and decode_image(data, LIMIT).shape == (4, 2, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("stated", "expected"), [({}, 6), ({ORIENTATION: 1}, 1), ({ORIENTATION: 9}, 6)])
@pytest.mark.parametrize("is_below", [False, True])
def test_orientation_of_the_thumbnail_counts_where_the_page_has_none(
    is_below: bool, stated: Tags, expected: int, order: str
) -> None:
    thumbnail = THUMBNAIL | {ORIENTATION: 6}
    data = render_directories([thumbnail], [stated], order) if is_below else render_directories([thumbnail, stated])
    assert read_orientation(data) == expected
    assert decode_image(data, LIMIT).shape == ((4, 2, 3) if expected == 6 else (2, 4, 3))


def test_wide_page_behind_a_thumbnail_is_read() -> None:
    data = render_directories([THUMBNAIL, {258: 16, 256: 2, 262: 0}])
    assert decode_image(data, LIMIT).shape == (2, 2, 3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_header_with_swapped_number_is_accepted(order: str) -> None:
    data = render_directories([THUMBNAIL, {}], order=order)
    data = data[:2] + data[3:1:-1] + data[4:]
    assert decode_image(data, LIMIT).shape == (2, 4, 3) and count_pages(data) == 1


def test_looping_directories_end() -> None:
    data = bytearray(render_directories([THUMBNAIL, THUMBNAIL]))
    first = struct.unpack_from("<L", data, 4)[0]
    (count,) = struct.unpack_from("<H", data, first)
    second = struct.unpack_from("<L", data, first + 2 + 12 * count)[0]
    (count,) = struct.unpack_from("<H", data, second)
    struct.pack_into("<L", data, second + 2 + 12 * count, first)
    assert count_pages(bytes(data)) == 1 and decode_image(bytes(data), LIMIT).shape == (1, 2, 3)


def test_sub_directories_that_point_to_their_parent_end() -> None:
    data = render_directories([THUMBNAIL | {SUB_IFDS: tuple([16] * 500)}])
    assert count_tiff_pages(data) == 1 and decode_image(data, LIMIT).shape == (1, 2, 3)


def test_directories_of_impossible_length_are_not_read() -> None:
    """The first one claims 65,535 entries; thousands of such, overlapping, would take minutes."""
    data = b"II*\0\x08\0\0\0" + b"\xff" * 2_000_000
    assert count_tiff_pages(data) == 1 and read_layout(data) is None


class CountingTiff(Tiff):
    """A TIFF that counts the directory entries and values that are read from it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.read = 0

    def read_ifd(self, start: int) -> Ifd:
        self.read += 1
        return super().read_ifd(start)

    def read_integers(self, ifd: Ifd, tag: int, limit: int = 10**7) -> tuple[int, ...]:
        values = super().read_integers(ifd, tag, limit)
        self.read += len(values)
        return values


def test_work_of_finding_a_page_is_bounded() -> None:
    """Each of 25 directories claims a million sub-directories, all of them damaged, and types of a million values."""
    data = bytearray(render_directories([THUMBNAIL] * 25))
    entry = struct.pack("<HHL", NEW_SUBFILE_TYPE, 4, 1)
    for start in [index for index in range(len(data)) if data.startswith(entry, index)]:
        struct.pack_into("<HHLL", data, start + 12, SUB_IFDS, 3, 10**6, len(data))
    tiff = CountingTiff(bytes(data) + b"\xff" * 2 * 10**6)
    assert tiff.find_page() == tiff.read_ifd(tiff.first) and tiff.read < 2_000
    types = bytes(data).replace(entry, struct.pack("<HHL", NEW_SUBFILE_TYPE, 3, 10**6))
    tiff = CountingTiff(types + b"\xff" * 2 * 10**6)
    assert tiff.find_page() == tiff.read_ifd(tiff.first) and tiff.read < 2_000


def test_overlapping_directories_end() -> None:
    """Each of 10,000 directories in 110 kB claims 4000 entries, 40 million together."""
    starts = [8 + 6 * index for index in range(10_000)]
    data = bytearray(b"II*\0\x08\0\0\0" + bytes(6 * 10_000 + 48_008))
    for start in starts:
        struct.pack_into("<H", data, start, 4000)
        struct.pack_into("<L", data, start + 2 + 12 * 4000, start + 6)
    assert len(list(Tiff(bytes(data)).list_ifds())) <= 3


@pytest.mark.parametrize("order", ["<", ">"])
def test_random_damage_of_directories_raises_only_image_errors(order: str) -> None:
    rng = np.random.default_rng(0)
    files = [
        render_directories([THUMBNAIL, {}], order=order),
        render_directories([THUMBNAIL], [THUMBNAIL, {258: 16, 279: 16}], order=order),
        render_directories([{258: 32, 339: 3, 256: 2, 257: 1, 262: 0}], order=order, big=True),
    ]
    for trial in range(900):
        data = np.frombuffer(files[trial % len(files)], np.uint8).copy()
        data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        count_pages(data.tobytes())
        try:
            assert decode_image(data.tobytes(), LIMIT).dtype == np.uint8
        except ImageError:
            continue
