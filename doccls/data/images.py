"""Image files -> pixels: whatever a scanner, phone or exporter wrote becomes the same upright 8-bit RGB page."""

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from doccls.data.metadata import count_tiff_pages, is_tiff, read_orientation, strip_metadata
from doccls.errors import UserError

# It warns of tags that it can't read; nothing here reads tags through it.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Pillow's own guard can't be told our limit per call; `decode_image` checks data.max_image_pixels before it decodes.
Image.MAX_IMAGE_PIXELS = None
# Whoever decodes and scales many pages has a thread or a process for each: threads within would be in each other's way.
cv2.setNumThreads(0)
# Only formats that IMAGE_EXTENSIONS stand for: others (EPS, ...) start programs. (Pillow opens MPO through JPEG.)
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
WHITE = 255


class ImageError(UserError):
    """One image file can't be used; the message says why, the caller says which."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """A page out of its file."""

    page: np.ndarray
    """(height, width, 3) uint8 RGB, upright."""
    reduced: int
    """It has one so-many-th of the whole page's size: 1, 2, 4 or 8."""
    height_px: int
    """Of the whole page."""
    width_px: int

    def scale(self, size_px: int) -> np.ndarray:
        """As `scale_page` of the whole page."""
        return _scale(self.page, self.height_px, self.width_px, size_px)


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """File bytes -> (height, width, 3) uint8 RGB, upright by its EXIF orientation, transparency on white.

    16-bit and float images are scaled to 8 bits, not clipped. Of several pages, the first.

    Raises:
        ImageError: not an image, truncated, or more than `max_pixels` pixels. Nothing else.
    """
    return decode_near(data, max_pixels, None).page


def decode_near(data: bytes, max_pixels: int, size_px: int | None) -> Decoded:
    """The same, but a JPEG comes at 1/2, 1/4 or 1/8 of its size where that leaves its longest side twice `size_px`.

    libjpeg decodes it so for a fraction of the work, and reads the whole file: one that is truncated is found. Scaled
    to `size_px`, real pages differ from whole ones less than the area filter from Pillow's bilinear (tests/texdoc17).
    """
    if not data:
        raise ImageError("not an image: the file is empty")
    try:  # a TIFF's tags are all in one list
        decoded = _decode(strip_metadata(data) if is_tiff(data) else data, max_pixels, size_px)
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 (decoders raise what they like on what they do not expect)
        decoded = _decode_bare(data, max_pixels, size_px, error)
    return _set_upright(decoded, read_orientation(data))


def _decode_bare(data: bytes, max_pixels: int, size_px: int | None, met: Exception) -> Decoded:
    """Decode without metadata, which may be all that was wrong; if it was not, `met` says what is."""
    try:
        return _decode(strip_metadata(data), max_pixels, size_px)
    except ImageError:
        raise
    except Exception:  # noqa: BLE001 (as above)
        if isinstance(met, UnidentifiedImageError):
            raise ImageError(f"not an image: it begins with {data[:12]!r}") from met
        raise ImageError(f"{type(met).__name__}: {met}".replace("<_io.BytesIO object", "<file")) from met


def _decode(data: bytes, max_pixels: int, size_px: int | None) -> Decoded:
    """As it is stored, not yet upright; raises whatever the decoder does."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"{width} x {height} px is more than data.max_image_pixels = {max_pixels}")
        reduced = 1
        if size_px is not None and image.format in ("JPEG", "MPO"):
            reduced = _choose_reduction(max(width, height), min(width, height), size_px)
            image.draft(None, (width // reduced, height // reduced))
        image.load()
        return Decoded(np.asarray(_to_rgb(image)), reduced, height, width)


def _choose_reduction(longest_px: int, shortest_px: int, size_px: int) -> int:
    """Twice the size is left for the area filter: with less, libjpeg's own, which is sharper, would be seen."""
    fitting = (part for part in (8, 4, 2) if longest_px >= 2 * size_px * part and shortest_px >= part)
    return next(fitting, 1)


def _set_upright(decoded: Decoded, orientation: int) -> Decoded:
    """Undo EXIF's orientation, 1 to 8: where the first row and the first column of the stored page belong."""
    page, height, width = decoded.page, decoded.height_px, decoded.width_px
    if orientation >= 5:
        page, height, width = page.transpose(1, 0, 2), width, height
    upside_down, mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    page = page[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return Decoded(np.ascontiguousarray(page), decoded.reduced, height, width)


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
    return _scale(image, image.shape[0], image.shape[1], size_px)


def _scale(image: np.ndarray, height: int, width: int, size_px: int) -> np.ndarray:
    """The image, which stands for a page of that height and width, with its longest side size_px."""
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


def load_page(data: bytes, max_pixels: int, size_px: int) -> np.ndarray:
    """File bytes -> (h, w, 3) uint8 with its longest side size_px, as the store keeps it.

    Raises:
        ImageError: see `decode_image`.
    """
    return decode_near(data, max_pixels, size_px).scale(size_px)


def shrink_page(page: np.ndarray, size_px: int) -> np.ndarray:
    """A page as it is kept -> with its longest side size_px, which is not much less: through the same filter that
    turns and zooms the pages that are trained on."""
    longest = max(page.shape[:2])
    if longest == size_px:
        return page
    height, width = (max(1, round(side * size_px / longest)) for side in page.shape[:2])
    how = cv2.INTER_LINEAR if longest < 2 * size_px else cv2.INTER_AREA
    shrunk: np.ndarray = cv2.resize(page, (width, height), interpolation=how)
    return shrunk


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scale_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):  # else nothing would be seen: the channel is not meant
            page = Image.new("RGBA", image.size, (WHITE, WHITE, WHITE, WHITE))
            image = Image.alpha_composite(page, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


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
