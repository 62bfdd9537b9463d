"""Image files -> pixels: whatever a scanner, phone or exporter wrote becomes the same upright 8-bit RGB page."""

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from doccls.data.metadata import count_tiff_pages, is_tiff, read_orientation, strip_metadata
from doccls.errors import UserError

# It warns of tags that it can't read; nothing here reads tags through it.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Pillow's own guard can't be told our limit per call; `decode_image` checks data.max_image_pixels before it decodes.
Image.MAX_IMAGE_PIXELS = None
# Only formats that IMAGE_EXTENSIONS stand for: others (EPS, ...) start programs. (Pillow opens MPO through JPEG.)
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
WHITE = 255


class ImageError(UserError):
    """One image file can't be used; the message says why, the caller says which."""


@dataclass(frozen=True)
class ImageFact:
    """What one look at an image file found."""

    digest: str
    """SHA-256 of the file's bytes; empty if it could not be read."""
    problem: str | None
    """Why it can't be used; None if it can."""
    content: str = ""
    """Digest of the upright RGB page, whatever file it came from; empty if there is none."""
    pages: int = 1
    """In the file; the first is used."""


@dataclass(frozen=True, eq=False)
class Inspected:
    """A look at an image file, and its page, if that was asked for and there is one."""

    fact: ImageFact
    scaled: np.ndarray | None = None
    """(height, width, 3) uint8."""
    pixels: int = 0
    """Of the whole page."""


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """File bytes -> (height, width, 3) uint8 RGB, upright by its EXIF orientation, transparency on white.

    16-bit and float images are scaled to 8 bits, not clipped. Of several pages, the first.

    Raises:
        ImageError: not an image, truncated, or more than `max_pixels` pixels. Nothing else.
    """
    if not data:
        raise ImageError("not an image: the file is empty")
    try:
        page = _decode(strip_metadata(data) if is_tiff(data) else data, max_pixels)  # a TIFF's tags are all in one list
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 (decoders raise what they like on what they do not expect)
        page = _decode_bare(data, max_pixels, error)
    return _set_upright(page, read_orientation(data))


def _decode_bare(data: bytes, max_pixels: int, met: Exception) -> np.ndarray:
    """Decode without metadata, which may be all that was wrong; if it was not, `met` says what is."""
    try:
        return _decode(strip_metadata(data), max_pixels)
    except ImageError:
        raise
    except Exception:  # noqa: BLE001 (as above)
        if isinstance(met, UnidentifiedImageError):
            raise ImageError(f"not an image: it begins with {data[:12]!r}") from met
        raise ImageError(f"{type(met).__name__}: {met}".replace("<_io.BytesIO object", "<file")) from met


def _decode(data: bytes, max_pixels: int) -> np.ndarray:
    """As it is stored, not yet upright; raises whatever the decoder does."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"{width} x {height} px is more than data.max_image_pixels = {max_pixels}")
        image.load()
        return np.asarray(_to_rgb(image))


def _set_upright(page: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF's orientation, 1 to 8: where the first row and the first column of the stored page belong."""
    if orientation >= 5:
        page = page.transpose(1, 0, 2)
    upside_down, mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    page = page[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return np.ascontiguousarray(page)


def count_pages(data: bytes) -> int:
    """Pages of a TIFF, frames of a GIF or WEBP; 1 where they can't be counted."""
    if is_tiff(data):
        return count_tiff_pages(data)
    try:
        with Image.open(io.BytesIO(data), formats=("GIF", "WEBP")) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001 (of another format, or broken after its first frame)
        return 1


def fit_page(image: np.ndarray, size_px: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (size_px, size_px, 3) uint8: longest side scaled to size_px, centred on white."""
    return pad_page(scale_page(image, size_px), size_px)


def scale_page(image: np.ndarray, size_px: int) -> np.ndarray:
    """(h, w, 3) uint8 -> the same with its longest side size_px."""
    height, width = image.shape[:2]
    scale = size_px / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(image, (new_width, new_height), interpolation=how)
    return scaled


def pad_page(scaled: np.ndarray, size_px: int) -> np.ndarray:
    """(h, w, 3) uint8, no side longer than size_px -> (size_px, size_px, 3), centred on white."""
    height, width = scaled.shape[:2]
    page = np.full((size_px, size_px, 3), WHITE, dtype=np.uint8)
    top, left = (size_px - height) // 2, (size_px - width) // 2
    page[top : top + height, left : left + width] = scaled
    return page


def inspect_images(
    paths: Sequence[Path],
    max_pixels: int,
    threads: int,
    size_px: int | None = None,
    known: Mapping[str, ImageFact] | None = None,
) -> list[Inspected]:
    """Read and decode every file once, so that a bad one is met before training and not in epoch 3.

    With a size, its page is scaled to that. A file whose digest is `known` is not decoded.
    """
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda path: _inspect(path, max_pixels, size_px, known or {}), paths))


def _inspect(path: Path, max_pixels: int, size_px: int | None, known: Mapping[str, ImageFact]) -> Inspected:
    try:
        data = path.read_bytes()
    except OSError as error:
        return Inspected(ImageFact("", f"can't be read: {error.strerror or error}"))
    digest = hashlib.sha256(data).hexdigest()
    if digest in known:
        return Inspected(known[digest])
    try:
        page = decode_image(data, max_pixels)
    except ImageError as error:
        return Inspected(ImageFact(digest, str(error)))
    content = hashlib.blake2b(page.data, digest_size=16, key=repr(page.shape).encode()).hexdigest()
    fact = ImageFact(digest, None, content, count_pages(data))
    return Inspected(fact, None if size_px is None else scale_page(page, size_px), page.shape[0] * page.shape[1])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scale_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):  # else nothing would be seen: the channel is not meant
            page = Image.new("RGBA", image.size, (WHITE, WHITE, WHITE, WHITE))
            image = Image.alpha_composite(page, image)
    return image.convert("RGB")


def _scale_to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit and wider grey -> uint8. Pillow's own convert clips at 255, which turns a 16-bit scan white."""
    if not np.isfinite(values).all():
        raise ImageError("it has pixels that are not finite numbers")
    top = float(values.max(initial=0))
    if mode.startswith("I;16"):
        full = 65535.0
    elif mode == "F":
        full = 1.0 if top <= 1 else max(255.0, top)
    else:  # 32-bit integers say nothing of their range: take the smallest usual one that holds them
        full = 255.0 if top <= 255 else max(65535.0, top)
    return np.clip(np.rint(values.astype(np.float64) * (255.0 / full)), 0, 255).astype(np.uint8)
