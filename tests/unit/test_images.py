"""Decoding of image files: upright, 8 bits, on white, and only images are accepted."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from doccls.data.formats import ImageError
from doccls.data.images import (
    count_pages,
    decode_image,
    decode_reduced,
    fit_page,
    load_page,
    scale_page,
    shrink_page,
)

LIMIT = 10**8


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    return decode_image(encode(image, kind, **options), LIMIT)


def render_png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """Render a PNG of any depth and colour type, as Pillow can't; `rows` include their filter bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def draw_colours() -> np.ndarray:
    """Draw a (6, 4, 3) uint8 page whose pixels all differ."""
    return np.arange(72, dtype=np.uint8).reshape(6, 4, 3) * 3


# A level for each of the 256 shades: the shade is level // 257.
GRADIENT_16 = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


def check_gradient(page: np.ndarray) -> None:
    assert page.shape == (16, 16, 3) and page.dtype == np.uint8
    assert np.array_equal(page[..., 0], page[..., 1]) and np.array_equal(page[..., 0], page[..., 2])
    assert np.abs(page[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1


# --- orientation and other metadata ----------------------------------------------------------------------------------

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_undone(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    page = decode(Image.fromarray(draw_colours()), kind, exif=exif, **options)
    assert np.array_equal(page, TURNS[orientation](draw_colours()))


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_of_jpeg_is_undone(orientation: int) -> None:
    corners = np.zeros((32, 64, 3), np.uint8)
    corners[:16, :32], corners[:16, 32:], corners[16:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    page = decode(Image.fromarray(corners), "JPEG", exif=exif, quality=95, subsampling=0)
    assert np.abs(page.astype(int) - TURNS[orientation](corners)).mean() < 5


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_invalid_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(Image.fromarray(draw_colours()), "PNG", exif=exif), draw_colours())


def test_rotated_16_bit_scan_keeps_its_shades() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    page = decode(Image.fromarray(GRADIENT_16), "TIFF", exif=exif)
    check_gradient(page[::-1, ::-1])


# EXIF tags of the wrong type or with a zero denominator, as phones and programs were seen to write them.
METADATA = {0x9204: (10, (-2, 0)), 0x013C: (5, (72, 1)), 0x010F: (4, (7,)), 0x0132: (12, (0.5,)), 0x011A: (2, b"x")}


def render_exif(tags: dict[int, tuple[int, object]], order: str = "<") -> bytes:
    """Render an EXIF block from tag -> (TIFF type, values), without validation."""
    codes = {2: "s", 3: "H", 4: "L", 5: "L", 10: "l", 12: "d"}
    entries, values_block = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        if isinstance(values, bytes):
            count, packed = len(values), values
        else:
            assert isinstance(values, tuple)
            count = len(values) // (2 if kind in (5, 10) else 1)
            packed = struct.pack(f"{order}{len(values)}{codes[kind]}", *values)
        offset = 8 + 2 + 12 * len(tags) + 4 + len(values_block)
        entries += struct.pack(f"{order}HHL", tag, kind, count)
        entries += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}L", offset)
        values_block += packed if len(packed) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values_block


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tag", METADATA)
def test_malformed_exif_tag_neither_rejects_nor_rotates_the_page(tag: int, order: str, kind: str) -> None:
    exif = b"Exif\0\0" + render_exif({0x0112: (3, (6,)), tag: METADATA[tag]}, order)
    corners = np.zeros((32, 64, 3), np.uint8)
    corners[:16, :32], corners[:16, 32:], corners[16:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    page = decode(Image.fromarray(corners), kind, exif=exif, quality=95, lossless=True)
    assert np.abs(page.astype(int) - TURNS[6](corners)).mean() < 5


@pytest.mark.parametrize("value", [(3, (6, 6)), (2, b"6"), (5, (6, 1)), (12, (6.0,)), (3, (0,)), (4, (2**31,))])
def test_malformed_orientation_is_ignored(value: tuple[int, object]) -> None:
    exif = b"Exif\0\0" + render_exif({0x0112: value})
    assert np.array_equal(decode(Image.fromarray(draw_colours()), "PNG", exif=exif), draw_colours())


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_malformed_exif_block_is_ignored(exif: bytes) -> None:
    assert np.array_equal(decode(Image.fromarray(draw_colours()), "WEBP", exif=exif, lossless=True), draw_colours())


def render_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (b"pHYs", b"\0"),
        (b"gAMA", b""),
        (b"iCCP", b"x" * 9),
        (b"iCCP", b"x\0\x07"),
        (b"tEXt", b"no end"),
        (b"zTXt", b"key\0\x05"),
        (b"zTXt", b"key\0\0" + zlib.compress(bytes(2**21))),
        (b"iTXt", b"key\0\1\0en\0\0" + zlib.compress(bytes(2**21))),
        (b"acTL", b"\0"),
        (b"eXIf", b"MM"),
        (b"cHRM", b"\0" * 3),
        (b"sRGB", b""),
        (b"tIME", b"\xff"),
    ],
)
def test_png_with_malformed_metadata_chunk_is_decoded(name: bytes, data: bytes) -> None:
    png = encode(Image.fromarray(draw_colours()), "PNG")
    for offset in (33, png.index(b"IEND") - 4):  # before the pixels, and after them
        page = decode_image(png[:offset] + render_chunk(name, data) + png[offset:], LIMIT)
        assert np.array_equal(page, draw_colours())
    damaged = bytearray(png[:33] + render_chunk(name, data) + png[33:])
    damaged[33 + 8 + len(data)] ^= 1  # the chunk's checksum
    assert np.array_equal(decode_image(bytes(damaged), LIMIT), draw_colours())


@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xED, 0xFE])
@pytest.mark.parametrize(
    "data", [b"", b"Exif\0\0", b"ICC_PROFILE\0\1\2x", b"Photoshop 3.0\08BIM\x04\x04", b"MPF\0II", b"\xff" * 40]
)
def test_jpeg_with_malformed_metadata_segment_is_decoded(marker: int, data: bytes) -> None:
    jpeg = encode(Image.fromarray(draw_colours()), "JPEG")
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data
    assert np.array_equal(decode_image(jpeg[:2] + segment + jpeg[2:], LIMIT), decode_image(jpeg, LIMIT))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    "tag",
    [
        (282, 2, b"300 dpi"),
        (305, 12, bytes(8)),
        (700, 4, bytes(4)),
        (34665, 2, b"xxxx"),
        (34675, 3, b"ab"),
        (33550, 7, b""),
    ],
)
def test_tiff_with_malformed_metadata_tag_is_decoded(tag: tuple[int, int, bytes], big: bool) -> None:
    """The tag replaces a private one in a TIFF that has no other tag of its number."""
    page = Image.fromarray(draw_colours())
    number, kind, value = tag
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[65000], info.tagtype[65000] = b"12345678", 7
    data = bytearray(encode(page, "TIFF", tiffinfo=info, big_tiff=big))
    start = data.index(struct.pack("<HH", 65000, 7))
    data[start : start + 4] = struct.pack("<HH", number, kind)
    data[start + 4 : start + 8] = struct.pack("<L", len(value))
    assert np.array_equal(decode_image(bytes(data), LIMIT), draw_colours())


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP", "GIF"])
def test_lossless_formats_keep_colours(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(Image.fromarray(draw_colours()), kind, **options), draw_colours())


def test_mpo_is_decoded_as_jpeg() -> None:
    first = Image.new("RGB", (8, 8), (200, 10, 10))
    second = Image.new("RGB", (8, 8), (10, 10, 200))
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert np.abs(decode_image(data, LIMIT).astype(int) - (200, 10, 10)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_grey_stays_grey(kind: str) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    page = decode(Image.fromarray(grey), kind)
    assert np.array_equal(page, np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
def test_one_bit_image_is_black_and_white(kind: str) -> None:
    bits = np.indices((8, 8)).sum(axis=0) % 2 == 0
    page = decode(Image.fromarray(bits), kind)
    assert np.array_equal(page[..., 0], np.where(bits, 255, 0))


def make_palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putpixel((1, 0), 1)
    return image


def test_palette_is_resolved_to_colours() -> None:
    assert decode(make_palette(), "PNG").tolist() == [[[200, 10, 10], [10, 200, 10]]]


def test_transparent_palette_entry_is_white() -> None:
    assert decode(make_palette(), "PNG", transparency=1).tolist() == [[[200, 10, 10], [255, 255, 255]]]
    assert decode(make_palette(), "GIF", transparency=1).tolist() == [[[200, 10, 10], [255, 255, 255]]]


def test_half_transparent_palette_entry_is_blended_with_white() -> None:
    page = decode(make_palette(), "PNG", transparency=bytes([255, 0]))
    assert page.tolist() == [[[200, 10, 10], [255, 255, 255]]]
    mixed = decode(make_palette(), "PNG", transparency=bytes([128, 255]))
    assert abs(int(mixed[0, 0, 1]) - 132) <= 1


def test_transparent_colour_of_rgb_png_is_white() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8))
    assert decode(image, "PNG", transparency=(1, 2, 3)).tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_blended_with_white(kind: str) -> None:
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [100, 0, 200, 128]]], np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    page = decode(Image.fromarray(pixels), kind, **options)
    assert page[0, 0].tolist() == [255, 255, 255] and page[0, 1].tolist() == [0, 0, 0]
    assert np.abs(page[0, 2].astype(int) - [177, 127, 227]).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "BMP"])
def test_all_zero_alpha_is_ignored(kind: str) -> None:
    """Some programs leave the fourth byte unused; treated as alpha, it would hide the page."""
    pixels = np.dstack([draw_colours(), np.zeros((6, 4), np.uint8)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(Image.fromarray(pixels), kind, **options), draw_colours())


def test_grey_with_alpha_is_blended_with_white() -> None:
    page = decode(Image.fromarray(np.array([[[0, 0], [0, 255], [100, 128]]], np.uint8), "LA"), "PNG")
    assert page[0, 0].tolist() == [255] * 3 and page[0, 1].tolist() == [0] * 3
    assert abs(int(page[0, 2, 0]) - 177) <= 1


def test_cmyk_is_ink_on_white() -> None:
    pixels = np.zeros((8, 24, 4), np.uint8)
    pixels[:, 8:16, 3], pixels[:, 16:, 0] = 255, 255  # paper, black, cyan
    for kind in ("TIFF", "JPEG"):
        page = decode(Image.fromarray(pixels, "CMYK"), kind).astype(int)
        assert np.abs(page[4, 4] - 255).max() < 8 and page[4, 12].max() < 8
        assert np.abs(page[4, 20] - (0, 255, 255)).max() < 12


# --- more than 8 bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gradient_is_preserved(kind: str) -> None:
    check_gradient(decode(Image.fromarray(GRADIENT_16), kind))


def test_big_endian_16_bit_gradient_is_preserved() -> None:
    image = Image.frombytes("I;16B", (16, 16), GRADIENT_16.astype(">u2").tobytes())
    check_gradient(decode(image, "TIFF"))


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_16_bit_gradient_of_every_png_colour_type_is_preserved(colour: int, channels: int) -> None:
    shades = np.repeat(GRADIENT_16[..., None], channels, axis=2)
    if channels in (2, 4):
        shades[..., -1] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in shades)
    check_gradient(decode_image(render_png(16, 16, 16, colour, rows), LIMIT))


def test_gradient_of_wide_integers_and_floats_is_preserved() -> None:
    check_gradient(decode(Image.fromarray(GRADIENT_16.astype(np.int32)), "TIFF"))
    check_gradient(decode(Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16)), "TIFF"))
    check_gradient(decode(Image.fromarray(GRADIENT_16.astype(np.int32) * 1000), "TIFF"))
    check_gradient(decode(Image.fromarray((GRADIENT_16 / 65535).astype(np.float32)), "TIFF"))
    check_gradient(decode(Image.fromarray((GRADIENT_16 / 257).astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_float_scan_with_non_finite_pixel_is_rejected_or_keeps_other_shades(bad: float) -> None:
    values = (GRADIENT_16 / 65535).astype(np.float32)
    values[0, 0] = bad
    try:
        page = decode(Image.fromarray(values), "TIFF")
    except ImageError:
        return
    assert np.abs(page[..., 0].ravel()[1:].astype(int) - np.arange(1, 256)).max() <= 1


def test_black_16_bit_page_stays_black() -> None:
    assert decode(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG").max() == 0
    assert decode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF").max() == 0


# --- rejected files --------------------------------------------------------------------------------------------------


def make_noise(kind: str) -> bytes:
    return encode(Image.effect_noise((64, 64), 80).convert("RGB"), kind)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.9])
def test_truncated_file_is_rejected(kind: str, fraction: float) -> None:
    data = make_noise(kind)
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * fraction)], LIMIT)


@pytest.mark.parametrize("data", [b"", b"hello, this is text", b"P9 1 1 255 abc", b"<svgx/>", b"\0" * 500])
def test_non_image_is_rejected(data: bytes) -> None:
    with pytest.raises(ImageError, match="not an image"):
        decode_image(data, LIMIT)


def test_pixel_limit_is_exact_and_reported() -> None:
    data = encode(Image.new("L", (30, 20)), "PNG")
    assert decode_image(data, 600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match=r"30 x 20 px is more than data.max_image_pixels = 599"):
        decode_image(data, 599)


@pytest.mark.parametrize("side", [20_000, 2**31 - 1])
def test_small_file_of_a_huge_image_is_rejected_without_allocating_it(side: int) -> None:
    data = render_png(side, side, 1, 0, b"\0" * 100)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"data\.max_image_pixels"):
            decode_image(data, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_pillows_own_pixel_limit_is_disabled() -> None:
    assert Image.MAX_IMAGE_PIXELS is None


def test_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, LIMIT)[0, 0].tolist() == [250, 0, 0]
    data = encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert decode_image(data, LIMIT)[0, 0].tolist() == [250, 0, 0]


def test_random_damage_raises_only_image_errors() -> None:
    rng = np.random.default_rng(0)
    files = [np.frombuffer(make_noise(kind), np.uint8) for kind in ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP")]
    for trial in range(600):
        data = files[trial % len(files)].copy()
        offsets = rng.integers(0, min(300, len(data)), 3)
        data[offsets] = rng.integers(0, 256, 3)
        try:
            assert decode_image(data.tobytes(), 10**6).dtype == np.uint8
        except ImageError:
            continue


# --- several pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_pages_are_counted_and_the_first_is_used(kind: str) -> None:
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encode(pages[0], kind, save_all=True, append_images=pages[1:])
    assert count_pages(data) == 3 and count_pages(encode(pages[0], kind)) == 1
    assert np.abs(decode_image(data, LIMIT).astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("data", [b"", b"II*\0\xff\xff\xff\xff", b"GIF89a", encode(Image.new("L", (3, 3)), "JPEG")])
def test_uncountable_pages_count_as_one(data: bytes) -> None:
    assert count_pages(data) == 1


def test_tiff_with_cyclic_page_list_is_counted() -> None:
    data = bytearray(encode(Image.new("L", (3, 3)), "TIFF"))
    first = struct.unpack_from("<L", data, 4)[0]
    (count,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<L", data, first + 2 + 12 * count, first)
    assert count_pages(bytes(data)) == 1 and decode_image(bytes(data), LIMIT).shape == (3, 3, 3)


# --- JPEGs decoded at a fraction of their size -----------------------------------------------------------------------


def draw_text(height: int, width: int) -> np.ndarray:
    """Draw coloured dark strokes on paper, as soft as a scanner's lens makes them."""
    rows, columns = np.mgrid[:height, :width]
    ink = ((rows // 14) % 3 == 0) & ((columns // 18 + rows // 42) % 3 != 0)
    page = np.full((height, width, 3), (250, 245, 235), np.uint8)
    page[ink] = (40, 30, 60)
    return cv2.GaussianBlur(page, (0, 0), 1.5)


@pytest.mark.parametrize(
    ("height", "width", "size_px", "reduced"),
    [(1754, 1240, 224, 2), (1754, 1240, 109, 8), (1754, 1240, 438, 2), (1754, 1240, 439, 1), (448, 9, 112, 2),
     (447, 9, 112, 1), (447, 9, 1, 8), (447, 7, 1, 4), (447, 1, 1, 1), (1, 1, 1, 1)],
)  # fmt: skip
def test_jpeg_is_reduced_to_no_less_than_twice_the_size(height: int, width: int, size_px: int, reduced: int) -> None:
    decoded = decode_reduced(encode(Image.fromarray(draw_text(height, width)), "JPEG"), LIMIT, size_px)
    assert (decoded.reduced, decoded.height_px, decoded.width_px) == (reduced, height, width)
    assert decoded.page.shape == (-(-height // reduced), -(-width // reduced), 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_other_formats_are_decoded_at_full_size(kind: str) -> None:
    assert decode_reduced(encode(Image.fromarray(draw_text(640, 480)), kind), LIMIT, 40).page.shape == (640, 480, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_reduced_jpeg_scales_to_the_same_page_as_the_full_one(mode: str, options: dict[str, object]) -> None:
    data = encode(Image.fromarray(draw_text(1600, 1200)).convert(mode), "JPEG", quality=90, **options)
    page = decode_image(data, LIMIT)
    loaded, area = load_page(data, LIMIT, 192), scale_page(page, 192).astype(int)
    bilinear = np.asarray(Image.fromarray(page).resize((144, 192), Image.Resampling.BILINEAR))
    assert np.abs(loaded - area).mean() < np.abs(bilinear - area).mean(), "two common filters differ by more"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_reduced_jpeg_is_undone(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(draw_text(800, 600)), "JPEG", exif=exif)
    reduced, full = decode_reduced(data, LIMIT, 100), decode_image(data, LIMIT)
    assert reduced.reduced == 4 and (reduced.height_px, reduced.width_px) == full.shape[:2]
    assert np.abs(reduced.scale(100).astype(int) - scale_page(full, 100)).mean() < 4.0
    assert np.abs(reduced.scale(100).astype(int) - scale_page(full[::-1], 100)).mean() > 20.0, "the page is asymmetric"


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.99])
def test_truncated_jpeg_is_rejected_when_reduced(fraction: float) -> None:
    data = encode(Image.fromarray(draw_text(1600, 1200)), "JPEG", quality=90)
    with pytest.raises(ImageError, match="truncated"):
        decode_reduced(data[: int(fraction * len(data))], LIMIT, 100)


def test_pixel_limit_of_reduced_jpeg_applies_to_its_full_size() -> None:
    data = encode(Image.fromarray(draw_text(800, 600)), "JPEG")
    with pytest.raises(ImageError, match="600 x 800 px is more than"):
        decode_reduced(data, 800 * 600 - 1, 50)


@pytest.mark.parametrize(("shape", "size_px"), [((280, 200), 224), ((300, 400), 320), ((5, 640), 512), ((224, 9), 224)])
def test_stored_page_is_shrunk_to_the_network_input_size(shape: tuple[int, int], size_px: int) -> None:
    page = draw_text(*shape)
    shrunk = shrink_page(page, size_px)
    scale = size_px / max(shape)
    assert shrunk.shape == (max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale)), 3)
    assert max(shape) != size_px or shrunk is page


# --- fit_page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "top", "left", "new_height", "new_width"),
    [
        (200, 100, 0, 16, 64, 32),
        (100, 200, 16, 0, 32, 64),
        (64, 64, 0, 0, 64, 64),
        (30, 30, 0, 0, 64, 64),
        (10, 20, 16, 0, 32, 64),
        (1, 1, 0, 0, 64, 64),
        (1, 500, 31, 0, 1, 64),
        (500, 1, 0, 31, 64, 1),
    ],
)
def test_longest_side_fills_the_page_and_padding_is_white(
    height: int, width: int, top: int, left: int, new_height: int, new_width: int
) -> None:
    page = fit_page(np.full((height, width, 3), 40, np.uint8), 64)
    expected = np.full((64, 64, 3), 255, np.uint8)
    expected[top : top + new_height, left : left + new_width] = 40
    assert page.dtype == np.uint8
    assert np.array_equal(page, expected)


def test_page_of_the_target_size_is_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert np.array_equal(fit_page(image, 48), image)


def test_shrinking_averages_lines() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[::2] = 255
    assert np.abs(fit_page(stripes, 64).astype(int) - 128).max() <= 1
