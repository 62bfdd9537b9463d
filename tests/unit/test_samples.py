"""Samples of TIFFs: read as OpenCV reads them, or as plain arrays say, and scaled to 8 bits by the documented rule."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest

from doccls.data import samples, scaling
from doccls.data.formats import ImageError
from doccls.data.images import decode_image
from doccls.data.samples import read_samples
from doccls.data.scaling import scale_to_8_bits
from doccls.data.tiff_layout import read_layout

LIMIT = 10**6
RAW, DEFLATE = 1, 8
GREY_WHITE_IS_ZERO, GREY, RGB = 0, 1, 2
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
FORMATS = {"u": UNSIGNED, "i": SIGNED, "f": FLOAT}


def render_tiff(
    width: int, height: int, tags: dict[int, int | tuple[int, ...]], strips: list[bytes], order: str = "<"
) -> bytes:
    """Render a TIFF of one directory; `tags` replace the defaults, a grey page of 8 bits in one strip."""
    lengths = tuple(map(len, strips))
    offsets = tuple(8 + sum(lengths[:i]) for i in range(len(strips)))
    places = (324, 325) if 322 in tags else (273, 279)
    fields: dict[int, int | tuple[int, ...]] = {
        256: width, 257: height, 258: 8, 259: RAW, 262: GREY, 277: 1, places[0]: offsets, places[1]: lengths,
    }  # fmt: skip
    fields |= {} if 322 in tags else {278: height}
    fields |= tags
    start = 8 + sum(lengths)
    entries, arrays = b"", b""
    for tag, value in sorted(fields.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}L", *values)
        if len(packed) > 4:
            arrays, packed = arrays + packed, struct.pack(f"{order}L", start + len(arrays))
        entries += struct.pack(f"{order}HHL", tag, 4, len(values)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", start + len(arrays))
    return head + b"".join(strips) + arrays + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


def render_page(values: np.ndarray, order: str = "<", **tags: int) -> bytes:
    """Render a grey or RGB page as TIFF in strips of 5 rows; `tags` are named compression, photometric, fill_order."""
    height, width = values.shape[:2]
    stored = values.astype(values.dtype.newbyteorder(order))
    strips = [stored[row : row + 5].tobytes() for row in range(0, height, 5)]
    if tags.get("compression") == DEFLATE:
        strips = [zlib.compress(strip) for strip in strips]
    samples = values.shape[2] if values.ndim == 3 else 1
    numbers = {"compression": 259, "photometric": 262, "white": 281}
    fields: dict[int, int | tuple[int, ...]] = {258: (8 * values.itemsize,) * samples, 277: samples, 278: 5}
    fields |= {339: (FORMATS[values.dtype.kind],) * samples, 262: RGB if samples >= 3 else GREY}
    return render_tiff(width, height, fields | {numbers[name]: tag for name, tag in tags.items()}, strips, order)


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Pack rows of `bits` bits per sample, most significant bit first, each padded to a byte."""
    shifted = values[..., None] >> np.arange(bits - 1, -1, -1)
    return np.packbits((shifted & 1).astype(np.uint8).reshape(len(values), -1), axis=1).tobytes()


SHADES = np.arange(256).reshape(16, 16)


def make_full_range(kind: str) -> np.ndarray:
    """Return a (16, 16) page of samples from the smallest of the type, or float 0, to the largest, or float 1."""
    if kind.startswith("f"):
        return (SHADES / 255).astype(kind)
    limits = np.iinfo(kind)
    steps = [limits.min + (limits.max - limits.min) * shade // 255 for shade in range(256)]
    return np.array(steps, kind).reshape(16, 16)


KINDS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


@pytest.mark.parametrize("compression", [RAW, DEFLATE])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_range_of_samples_becomes_all_shades(kind: str, order: str, compression: int) -> None:
    page = decode_image(render_page(make_full_range(kind), order, compression=compression), LIMIT)
    assert np.abs(page[..., 0] - SHADES).max() <= (2 if kind == "i1" else 1) and np.ptp(page, axis=2).max() == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_white_where_the_tiff_says_so(kind: str, order: str) -> None:
    data = render_page(make_full_range(kind), order, photometric=GREY_WHITE_IS_ZERO)
    page = decode_image(data, LIMIT)
    assert page[0, 0].tolist() == [255] * 3 and page[-1, -1].tolist() == [0] * 3
    assert np.array_equal(255 - page, decode_image(render_page(make_full_range(kind), order), LIMIT))


@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [GREY_WHITE_IS_ZERO, GREY])
@pytest.mark.parametrize("compression", [RAW, DEFLATE])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15])
def test_packed_samples_of_any_depth_are_read(
    bits: int, compression: int, photometric: int, order: str, fill_order: int
) -> None:
    top = 2**bits - 1
    values = np.linspace(0, top, 9 * 7).astype(int).reshape(7, 9)
    strip = pack_bits(values, bits)
    strip = zlib.compress(strip) if compression == DEFLATE else strip
    if fill_order == 2:  # the bits of each byte of the file are reversed, compressed or not
        strip = bytes(int(f"{byte:08b}"[::-1], 2) for byte in strip)
    tags = {258: bits, 259: compression, 262: photometric, 266: fill_order}
    data = render_tiff(9, 7, tags, [strip], order)
    expected = values * 255 / top
    expected = 255 - expected if photometric == GREY_WHITE_IS_ZERO else expected
    assert np.abs(decode_image(data, LIMIT)[..., 0] - expected).max() <= 0.5


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u2", "u4", "u8", "i2", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize("compression", [RAW, DEFLATE])
@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
def test_samples_are_those_that_opencv_reads(shape: tuple[int, ...], compression: int, kind: str, order: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**7, shape).astype(kind) * np.array(3).astype(kind)
    data = render_page(values, order, compression=compression)
    reference = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if reference is None and cv2.__version__.startswith("4."):
        pytest.skip("OpenCV 4 reads no such TIFF")
    layout = read_layout(data)
    assert layout is not None
    samples = read_samples(data, layout, list(range(layout.samples)))
    assert samples.dtype == reference.dtype
    assert np.array_equal(samples, reference[..., ::-1] if len(shape) == 3 else reference[..., None])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u2", "i2", "u4", "f4", "f8"])
def test_horizontal_differences_are_undone_in_each_tile(kind: str, order: str) -> None:
    whole = f"u{kind[1]}"
    values = np.random.default_rng(0).integers(0, 2**7, (20, 40, 1)).astype(kind)
    padded = np.zeros((32, 48), kind)
    padded[:20, :40] = values[..., 0]
    tiles = []
    for row in (0, 16):
        for column in (0, 16, 32):
            tile = padded[row : row + 16, column : column + 16].copy().view(whole)
            tile[:, 1:] -= tile[:, :-1].copy()
            tiles.append(zlib.compress(tile.astype(tile.dtype.newbyteorder(order)).tobytes()))
    tags = {258: 8 * values.itemsize, 259: DEFLATE, 317: 2, 322: 16, 323: 16, 339: FORMATS[kind[0]]}
    data = render_tiff(40, 20, tags, tiles, order)
    layout = read_layout(data)
    assert layout is not None and np.array_equal(read_samples(data, layout, list(range(layout.samples))), values)


def test_predictor_without_compression_is_ignored_as_by_opencv() -> None:
    values = np.arange(20, dtype="<u2").reshape(2, 10) * 3000
    data = render_tiff(10, 2, {258: 16, 317: 2}, [values.tobytes()])
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), values)
    layout = read_layout(data)
    assert layout is not None and np.array_equal(
        read_samples(data, layout, list(range(layout.samples)))[..., 0], values
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("samples", [1, 3])
def test_float_differences_are_undone(samples: int, kind: str, order: str) -> None:
    values = np.random.default_rng(0).random((6, 10, samples)).astype(kind)
    size = values.itemsize
    strips = []
    for rows in (values[:4], values[4:]):
        planes = rows.astype(f">f{size}").view(np.uint8).reshape(len(rows), 10 * samples, size).swapaxes(1, 2)
        stored = planes.reshape(len(rows), -1).copy()
        stored[:, samples:] -= stored[:, :-samples].copy()
        strips.append(zlib.compress(stored.tobytes()))
    tags = {258: (8 * size,) * samples, 259: DEFLATE, 262: GREY if samples == 1 else RGB, 277: samples}
    data = render_tiff(10, 6, tags | {278: 4, 317: 3, 339: (FLOAT,) * samples}, strips, order)
    layout = read_layout(data)
    assert layout is not None and np.array_equal(read_samples(data, layout, list(range(layout.samples))), values)


@pytest.mark.parametrize("compression", [RAW, DEFLATE])
def test_colours_in_separate_planes_are_joined(compression: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (10, 6, 3)).astype("<u2")
    strips = [values[row : row + 5, :, plane].tobytes() for plane in range(3) for row in (0, 5)]
    tags = {258: (16, 16, 16), 259: compression, 262: RGB, 277: 3, 278: 5, 284: 2}
    data = render_tiff(6, 10, tags, [zlib.compress(s) for s in strips] if compression == DEFLATE else strips)
    assert np.array_equal(decode_image(data, LIMIT), values >> 8)


@pytest.mark.parametrize(("alpha", "expected"), [(2, [177, 127, 227]), (1, [227, 127, 255])])
def test_alpha_of_16_bits_is_blended_with_white(alpha: int, expected: list[int]) -> None:
    pixels = np.array([[[100, 0, 200, 128], [0, 0, 0, 0], [255, 255, 255, 255]]], "u2") * 257
    if alpha == 1:
        pixels[0, 0, :3] = np.array([100, 0, 128]) * 257
    data = render_tiff(3, 1, {258: (16,) * 4, 262: RGB, 277: 4, 338: alpha}, [pixels.astype("<u2").tobytes()])
    page = decode_image(data, LIMIT)
    assert np.abs(page[0, 0].astype(int) - expected).max() <= 1 and page[0, 1:].tolist() == [[255] * 3] * 2


def test_grey_with_alpha_whose_zero_is_white_is_read() -> None:
    data = render_tiff(3, 1, {258: (8, 8), 262: GREY_WHITE_IS_ZERO, 277: 2, 338: 2}, [bytes([0, 255, 255, 255, 9, 0])])
    assert decode_image(data, LIMIT)[0, :, 0].tolist() == [255, 0, 255]


@pytest.mark.parametrize("is_planar", [False, True])
@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize(
    ("pixel", "extra", "photometric", "expected"),
    [
        ([100, 128], (2,), GREY, [177] * 3),
        ([100, 128], (1,), GREY, [227] * 3),
        ([100, 128], (0,), GREY, [100] * 3),
        ([100, 0, 128, 128], (1,), RGB, [227, 127, 255]),
        ([100, 0, 200, 128], (2,), RGB, [177, 127, 227]),
        ([100, 0, 200, 9, 128], (0, 2), RGB, [177, 127, 227]),
        ([100, 9, 128], (0, 1), GREY, [227] * 3),
    ],
)
def test_stated_alpha_is_blended_with_white_wherever_it_is_stored(
    pixel: list[int], extra: tuple[int, ...], photometric: int, expected: list[int], kind: str, is_planar: bool
) -> None:
    values = np.array([pixel, [255] * len(pixel)]).astype(kind) * (257 if kind == "u2" else 1)
    strips = [plane.tobytes() for plane in values.T] if is_planar else [values.tobytes()]
    tags = {258: (8 * values.itemsize,) * len(pixel), 262: photometric, 277: len(pixel), 338: extra}
    page = decode_image(render_tiff(2, 1, tags | ({284: 2} if is_planar else {}), strips), LIMIT)
    assert np.abs(page[0, 0].astype(int) - expected).max() <= 1 and page[0, 1].tolist() == [255] * 3


def test_reversed_bits_of_8_bit_negative_are_read() -> None:
    data = render_tiff(3, 1, {262: GREY_WHITE_IS_ZERO, 266: 2}, [bytes([0, 0b10000000, 0b00001111])])
    assert decode_image(data, LIMIT)[0, :, 0].tolist() == [255, 254, 15]


def test_sample_format_0_means_unsigned() -> None:
    data = render_tiff(3, 1, {258: 16, 339: 0}, [np.array([0, 20000, 65535], "<u2").tobytes()])
    assert decode_image(data, LIMIT)[0, :, 0].tolist() == [0, 78, 255]


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_page_that_does_not_say_what_zero_means_is_no_negative(bits: int) -> None:
    """The tag is required; libtiff takes zero for black without it."""
    data = bytearray(render_tiff(2, 1, {258: bits}, [{1: b"\x40", 8: b"\0\xff", 16: b"\0\0\xff\xff"}[bits]]))
    entry = data.index(struct.pack("<HHL", 262, 4, 1))
    data[entry : entry + 2] = struct.pack("<H", 263)
    assert decode_image(bytes(data), LIMIT)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("scale", [1, 257])
def test_palette_of_8_bits_in_16_is_read_as_such(scale: int) -> None:
    palette = np.zeros((3, 256), int)
    palette[:, 1], palette[:, 2] = (10, 200, 255), (255, 255, 255)
    tags = {258: 8, 262: 3, 320: tuple((palette * scale).ravel().tolist())}
    page = decode_image(render_tiff(3, 1, tags, [b"\0\1\2"]), LIMIT)
    assert page[0].tolist() == [[0, 0, 0], [10, 200, 255], [255, 255, 255]]


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "largest", "white"),
    [
        ("u2", 200, 255), ("u2", 256, 1023), ("u2", 1023, 1023), ("u2", 1024, 4095), ("u2", 3900, 4095),
        ("u2", 16383, 16383), ("u2", 16384, 65535), ("i2", 3900, 4095), ("i2", 20000, 32767), ("i1", 100, 127),
        ("u4", 4000, 4095), ("u4", 65536, 65536), ("u4", 4_000_000_000, 4_000_000_000), ("i4", 255, 255),
        ("u1", 100, 255), ("f4", 0.25, 1), ("f4", 1.0, 1), ("f4", 1.5, 1.5), ("f4", 300, 300), ("f2", 0.5, 1),
        ("f4", 1.0625, 1.0625), ("f4", 100, 100), ("f4", 130, 255), ("f4", 255, 255),
    ],
)  # fmt: skip
def test_white_is_the_smallest_usual_one_that_holds_the_page(kind: str, largest: float, white: float) -> None:
    values = np.array([0, largest / 2, largest]).astype(kind)
    scaled = scale_to_8_bits(values, 8 * values.itemsize)
    assert np.abs(scaled - values.astype(float) * 255 / white).max() <= 0.5


@pytest.mark.parametrize(
    ("stated", "white"),
    [(4095, 4095), (1000, 1000), (65535, 65535), (999, 1023), (0, 1023), (65536, 1023), (None, 1023)],
)
def test_stated_white_counts_where_it_holds_the_page(stated: int | None, white: int) -> None:
    values = np.array([[0, 500, 1000]], np.uint16)
    page = decode_image(render_page(values, **({} if stated is None else {"white": stated})), LIMIT)
    assert np.abs(page[0, :, 0] - np.array([0, 500, 1000]) * 255 / white).max() <= 0.5


@pytest.mark.parametrize(
    "values",
    [
        np.array([-1, 0, 1], "f4"), np.array([-0.5, 0, 0.5], "f8"), np.array([-1000, 0, 1000], "i2"),
        np.array([-1000, 0, 1000], "i4"), np.array([-(2**31), -1, 2**31 - 1], "i4"), np.array([-9, -7, -5], "i1"),
        np.array([-9e29, 0, 9e29], "f4"),
    ],
)  # fmt: skip
def test_negative_samples_are_stretched_from_smallest_to_largest(values: np.ndarray) -> None:
    assert np.abs(scale_to_8_bits(values, 8 * values.itemsize) - [0, 127.5, 255]).max() <= 0.5


@pytest.mark.parametrize("values", [np.full(3, -5, "i2"), np.full(3, 0, "u2"), np.full(3, -0.5, "f4")])
def test_page_of_one_sample_without_white_is_black(values: np.ndarray) -> None:
    assert scale_to_8_bits(values, 8 * values.itemsize).tolist() == [0, 0, 0]


@pytest.mark.parametrize("values", [np.full(3, -(2**62), "i8"), np.array([-5e-324, 0, 0], "f8")])
def test_page_of_too_small_range_is_black(values: np.ndarray) -> None:
    with np.errstate(all="raise"):
        assert scale_to_8_bits(values, 64).tolist() == [0, 0, 0]


@pytest.mark.parametrize("missing", [-3.4028235e38, 3.4028235e38, 1e30, -1e30])
def test_floats_that_mark_missing_data_are_black_and_leave_the_range(missing: float) -> None:
    values = np.array([[missing, 0, 0.5, 1], [missing, 0, 0, 0.25]], "<f4")
    assert decode_image(render_page(values), LIMIT)[..., 0].tolist() == [[0, 0, 128, 255], [0, 0, 0, 64]]
    assert not decode_image(render_page(np.full((4, 4), missing, "<f4")), LIMIT).any()


@pytest.mark.parametrize(
    ("kind", "nodata", "expected"),
    [
        ("f4", "-9999", [0, 0, 128, 255]), ("f8", "nan", [0, 0, 128, 255]), ("i2", "-32768", [0, 0, 0, 1]),
        ("u2", "65535", [0, 0, 0, 1]), ("i4", "-9999 ", [0, 0, 0, 1]),
    ],
)  # fmt: skip
def test_samples_that_gdal_marks_as_missing_are_black(kind: str, nodata: str, expected: list[int]) -> None:
    values = np.array([[float(nodata), 0, 0.5, 1]])
    data = render_gdal_page(values.astype(f"<{kind}"), nodata)
    assert decode_image(data, LIMIT)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("nodata", ["", "none", "1e999", "7" * 99, "0,5"])
def test_unusable_marks_of_missing_data_are_ignored(nodata: str) -> None:
    values = np.array([[0, 0.5, 1]], "<f4")
    assert decode_image(render_gdal_page(values, nodata), LIMIT)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", [0, 1, 2, 5, 12, 99])
@pytest.mark.parametrize("count", [0, 1, 8, 40, 2**31])
@pytest.mark.parametrize("bits", [8, 16])
def test_malformed_mark_of_missing_data_is_ignored(bits: int, count: int, kind: int) -> None:
    data = render_tiff(2, 2, {258: bits, 42113: 0}, [bytes(8)])
    data = data.replace(struct.pack("<HHLL", 42113, 4, 1, 0), struct.pack("<HHLL", 42113, kind, count, len(data) - 3))
    assert decode_image(data, LIMIT).shape == (2, 2, 3)


def render_gdal_page(values: np.ndarray, nodata: str) -> bytes:
    """Render a grey page of one row with the text tag GDAL_NODATA."""
    text, pixels = nodata.encode() + bytes(8), values.tobytes()
    tags = {258: 8 * values.itemsize, 339: FORMATS[values.dtype.kind], 279: len(pixels), 42113: 0}
    data = render_tiff(values.shape[1], 1, tags, [pixels + text])
    start = 8 + len(pixels)
    value = struct.pack("<L", start) if len(nodata) >= 4 else text[:4]
    return data.replace(struct.pack("<HHLL", 42113, 4, 1, 0), struct.pack("<HHL", 42113, 2, len(nodata) + 1) + value)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(bad: float, kind: str) -> None:
    with pytest.raises(ImageError, match="not finite"):
        decode_image(render_page(np.array([[0, bad, 1]]).astype(kind)), LIMIT)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({258: 16, 259: 7}, "16-bit unsigned samples, 1 per pixel \\(grey\\), JPEG"),
        ({258: 12, 259: 7, 262: 0}, "12-bit unsigned samples, 1 per pixel \\(grey, zero is white\\), JPEG"),
        ({258: 64, 339: 6}, "64-bit complex samples"),
        ({258: 24, 339: 3}, "24-bit float samples"),
        ({258: 16, 262: 32803}, "camera sensor"),
        ({258: 16, 259: DEFLATE, 317: 9}, "16-bit unsigned samples"),
    ],
)
def test_samples_that_cannot_be_read_are_named(tags: dict[int, int | tuple[int, ...]], words: str) -> None:
    with pytest.raises(ImageError, match=f"TIFF of an unsupported kind: .*{words}"):
        decode_image(render_tiff(4, 4, tags, [bytes(128)]), LIMIT)


def test_pixel_limit_applies_to_wide_samples() -> None:
    data = render_page(np.zeros((20, 30), "u2"))
    assert decode_image(data, 600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match="30 x 20 px is more than"):
        decode_image(data, 599)


def test_limit_of_decoded_bytes_is_eight_per_pixel() -> None:
    assert decode_image(render_page(np.zeros((20, 30), "f8")), 600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match=r"30 x 20 px take 7200 bytes, more than 8 x data\.max_image_pixels = 4800"):
        decode_image(render_page(np.zeros((20, 30, 3), "f4")), 600)


@pytest.mark.parametrize("kind", ["u2", "i4", "f4", "f8"])
def test_page_needs_little_more_memory_than_its_samples(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow holds all 8 samples of a pixel; NumPy's arrays, which tracemalloc counts, only the one that is used."""
    monkeypatch.setattr(samples, "_BLOCK_BYTES", 2**16)
    monkeypatch.setattr(scaling, "_BLOCK_SAMPLES", 2**13)
    values = np.zeros((300, 400, 8), kind)
    data = render_page(values, compression=DEFLATE, photometric=GREY)
    tracemalloc.start()
    try:
        page = decode_image(data, LIMIT)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert page.shape == (300, 400, 3) and peak_bytes < 300 * 400 * (2 * values.itemsize + 10)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("width", "height"), [(2**24, 16), (16, 2**24)])
def test_huge_tiles_of_a_small_page_are_refused(width: int, height: int, bits: int) -> None:
    with pytest.raises(ImageError, match=f"tiles of {width} x {height} px, too large for data.max_image_pixels"):
        decode_image(render_tiff(4, 4, {258: bits, 322: width, 323: height}, [bytes(512)]), LIMIT)


@pytest.mark.parametrize("compression", [RAW, DEFLATE])
def test_truncated_wide_page_is_refused(compression: int) -> None:
    strip = np.random.default_rng(0).bytes(512)
    strip = zlib.compress(strip) if compression == DEFLATE else strip
    assert decode_image(render_tiff(16, 16, {258: 16, 259: compression}, [strip]), LIMIT).shape == (16, 16, 3)
    tags = {273: 500} if compression == RAW else {279: 300}
    with pytest.raises(ImageError):
        decode_image(render_tiff(16, 16, {258: 16, 259: compression, **tags}, [strip]), LIMIT)


def render_shifted(tags: dict[int, int | tuple[int, ...]], strips: list[bytes], missing_bytes: int) -> bytes:
    """Render a TIFF of 16 x 16 px whose last strip lies at the end of the file, without its last bytes."""
    length = len(render_tiff(16, 16, tags, strips))
    offsets = tuple(8 + sum(map(len, strips[:index])) for index in range(len(strips) - 1))
    tag = 324 if 322 in tags else 273
    data = render_tiff(16, 16, tags | {tag: (*offsets, length)}, strips) + strips[-1]
    return data[: len(data) - missing_bytes]


@pytest.mark.parametrize("missing_bytes", [1, 90])
@pytest.mark.parametrize(
    ("tags", "strip_bytes"),
    [
        ({}, (256,)),
        ({278: 10}, (160, 96)),
        ({258: 16}, (512,)),
        ({258: (8, 8, 8), 262: RGB, 277: 3, 284: 2}, (256, 256, 256)),
        ({258: 12, 322: 16, 323: 16}, (384,)),
    ],
)
def test_page_without_its_last_bytes_is_refused(
    tags: dict[int, int | tuple[int, ...]], strip_bytes: tuple[int, ...], missing_bytes: int
) -> None:
    """The directory that `strip` appends must not be taken for pixels."""
    strips = [bytes(length) for length in strip_bytes]
    assert decode_image(render_shifted(tags, strips, 0), LIMIT).shape == (16, 16, 3)
    with pytest.raises(ImageError, match="the TIFF is truncated"):
        decode_image(render_shifted(tags, strips, missing_bytes), LIMIT)


@pytest.mark.parametrize(
    ("tags", "strips"),
    [
        ({278: 10, 279: (160, 160)}, [bytes(160), bytes([9]) * 96]),
        ({279: 300}, [bytes(160) + bytes([9]) * 96]),
        ({278: 2**32 - 1, 279: 300}, [bytes(160) + bytes([9]) * 96]),
        ({279: ()}, [bytes(160) + bytes([9]) * 96]),
    ],
)
def test_last_strip_may_be_stated_too_long_or_not_at_all(
    tags: dict[int, int | tuple[int, ...]], strips: list[bytes]
) -> None:
    assert np.unique(decode_image(render_shifted(tags, strips, 0), LIMIT)).tolist() == [0, 9]
    with pytest.raises(ImageError, match="the TIFF is truncated"):
        decode_image(render_shifted(tags, strips, 1), LIMIT)
