"""Formats by content: newer ones are read, HEIC names its extra, others are refused by name."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from types import ModuleType

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from doccls.data import formats
from doccls.data.formats import ImageError
from doccls.data.images import decode_image

LIMIT = 10**6
RAMP = np.round(np.linspace(0, 255, 64 * 48)).reshape(64, 48).astype(np.uint8)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG2000", {}), ("JPEG2000", {"no_jp2": True}), ("PPM", {}), ("AVIF", {"quality": 100, "subsampling": "4:4:4"})],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_newer_formats_are_read(mode: str, kind: str, options: dict[str, object]) -> None:
    page = decode_image(encode(Image.fromarray(RAMP).convert(mode), kind, **options), LIMIT)
    assert np.abs(page.astype(int) - RAMP[..., None]).max() <= (2 if kind == "AVIF" else 0)


@pytest.mark.parametrize(
    ("data", "shades"),
    [
        (b"P1\n4 1\n0 1 0 1\n", [255, 0, 255, 0]),
        (b"P2 4 1 15 0 5 10 15\n", [0, 85, 170, 255]),
        (b"P4\n4 1\n\x50", [255, 0, 255, 0]),
        (b"P5 # a comment\n4 1\n255\n" + bytes([0, 85, 170, 255]), [0, 85, 170, 255]),
        (b"P5 3 1 4095\n" + struct.pack(">3H", 0, 1365, 4095), [0, 85, 255]),
        (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 21845, 65535), [0, 85, 255]),
        (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 1365, 4095), [0, 85, 255]),
        (b"P2 3 1 65535 0 1365 4095", [0, 85, 255]),
        (b"P3 2 1 65535 341 341 341 1023 1023 1023", [85, 255]),
        (b"P6 1 1 1023\n" + struct.pack(">3H", 341, 341, 341), [85]),
        (b"P6 2 1 65535\n" + struct.pack(">6H", 341, 341, 341, 1023, 1023, 1023), [85, 255]),
    ],
)
def test_portable_maps_are_scaled_by_their_maximum(data: bytes, shades: list[int]) -> None:
    page = decode_image(data, LIMIT)
    assert page[0, :, 0].tolist() == shades and np.ptp(page, axis=2).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_transform_of_avif_is_applied_once(orientation: int) -> None:
    corner = np.full((32, 64), 255, np.uint8)
    corner[:16, :32] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # of Pillow's `Transpose`
    turn = turns[orientation]
    expected = Image.fromarray(corner)
    expected = expected if turn is None else expected.transpose(Image.Transpose(turn))
    page = decode_image(encode(Image.fromarray(corner), "AVIF", exif=exif), LIMIT)
    assert np.abs(page[..., 0].astype(int) - np.asarray(expected)).mean() < 4


def test_avif_with_malformed_exif_is_read() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    data = encode(Image.fromarray(RAMP), "AVIF", exif=exif)
    start = data.index(b"MM\0*")
    page = decode_image(data[:start] + b"\xff" * 4 + data[start + 4 :], LIMIT)
    assert np.array_equal(page, decode_image(data, LIMIT)) and page.shape == (48, 64, 3)


# --- more than 8 bits, where Pillow loses them -----------------------------------------------------------------------


@pytest.mark.parametrize("top", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("extension", [".png", ".tiff", ".ppm", ".jp2"])
def test_colours_of_10_to_16_bits_keep_their_shades(extension: str, top: int) -> None:
    levels = np.round(np.linspace(0, top, 128 * 96)).reshape(128, 96).astype(np.uint16)
    colours = np.dstack([levels, levels[::-1], levels[:, ::-1]])
    written, data = cv2.imencode(extension, colours, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    assert written
    expected = colours[..., ::-1] * 255.0 / top
    assert np.abs(decode_image(data.tobytes(), LIMIT) - expected).max() <= 2


def test_dark_colours_with_alpha_are_blended_with_white() -> None:
    pixels = np.full((1, 3, 4), 2048, np.uint16)
    pixels[0, 1], pixels[0, 2] = 0, 4095
    pixels[..., 3] = [[65535, 65535, 0]]
    _, data = cv2.imencode(".png", pixels)
    assert np.abs(decode_image(data.tobytes(), LIMIT)[0, :, 0].astype(int) - [128, 0, 255]).max() <= 1


def test_white_of_16_bit_jpeg_2000_colours_does_not_wrap_to_black(capfd: pytest.CaptureFixture[str]) -> None:
    data = encode(Image.fromarray(np.full((16, 16), 65535, np.uint16)), "JPEG2000", no_jp2=True)
    assert decode_image(data, LIMIT).min() >= 254
    _, colours = cv2.imencode(".jp2", np.full((128, 128, 3), 65535, np.uint16))
    assert decode_image(colours.tobytes(), LIMIT).min() >= 254
    assert capfd.readouterr().err == ""  # OpenCV would report an unknown colour space


# --- HEIC ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def forget_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    formats._register_heif.cache_clear()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)


@pytest.mark.usefixtures("forget_heif")
def test_heic_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"a HEIC image, which needs pillow-heif: pip install 'doccls\[heic\]'"):
        decode_image(HEIC, LIMIT)
    formats._register_heif.cache_clear()


@pytest.mark.usefixtures("forget_heif")
def test_heic_is_read_with_its_extra_which_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeHeif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (2, 3), "L"
            self.tile = [ImageFile._Tile("raw", (0, 0, 2, 3), 0, "L")]

    calls = []

    def register(**_: object) -> None:
        calls.append(1)
        Image.OPEN["HEIF"] = FakeHeif, None

    module = ModuleType("pillow_heif")
    module.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    pages = [decode_image(HEIC, LIMIT) for _ in range(2)]
    assert pages[0].shape == (3, 2, 3) and np.array_equal(*pages) and calls == [1]
    formats._register_heif.cache_clear()
    del Image.OPEN["HEIF"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (HEIC, True),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", True),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", False),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1miaf", False),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp42", False),
        (b"ftyp", False),
        (b"", False),
    ],
)
def test_heif_is_recognised_by_its_brands(data: bytes, expected: bool) -> None:
    assert formats.is_heif(data) == expected


# --- refused by name -------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (EPS, "PostScript"), (b"\xc5\xd0\xd3\xc6" + bytes(40), "PostScript"), (b"%PDF-1.7\n", "a PDF"),
        (b"\n\n%PDF-1.4\n", "a PDF"), (b"<svg/>", "an SVG"), (b"8BPS\0\1" + bytes(40), "Photoshop"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x --><!DOCTYPE svg PUBLIC "x">\n<svg xmlns="y">', "an SVG"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"), (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (b"II\xbc\1\x08", "JPEG XR"),
        (bytes(128) + b"DICM" + bytes(20), "DICOM"), (b"AT&TFORM\0\0\0\0DJVU", "DjVu"), (b"v/1\1", "OpenEXR"),
        (b"\0\0\0\x18ftypisom", "MP4"), (b"\0\0\0\x18ftypcrx ", "CR3"), (b"P7\nWIDTH 1\n", "PAM"),
    ],
)  # fmt: skip
def test_known_formats_are_refused_by_name(data: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # no program is started
    with pytest.raises(ImageError, match=f"{name}.*, which doccls doesn't read: convert it to"):
        decode_image(data, LIMIT)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<!DOCTYPE html><html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\3\4" + bytes(30), "a ZIP archive"), (b"\x1f\x8b\x08", "a gzip archive"),
    ],
)  # fmt: skip
def test_other_files_are_named(data: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"not an image but .*{name}"):
        decode_image(data, LIMIT)


def test_jpeg_of_12_bits_is_refused_in_words() -> None:
    data = bytearray(encode(Image.fromarray(RAMP), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 1], data[frame + 4] = 0xC1, 12
    with pytest.raises(ImageError, match="a JPEG of 12 bits per sample, which can't be read"):
        decode_image(bytes(data), LIMIT)
