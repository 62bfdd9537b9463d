"""Decoding and scaling of image files: whatever a scanner, phone or exporter wrote, to upright 8-bit RGB pages."""

import io
import struct
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from doccls.data.formats import ImageError, choose_formats, name_other_file, name_unsupported
from doccls.data.metadata import read_jpeg_depth, read_orientation, strip_metadata
from doccls.data.samples import (
    describe_layout,
    find_lost_bits,
    is_grey_or_rgb,
    is_wide,
    read_deep_page,
    read_short_palette,
    read_wide_page,
)
from doccls.data.scaling import scale_to_8_bits
from doccls.data.tiff import count_tiff_pages, is_tiff, is_truncated_tiff
from doccls.data.tiff_layout import SampleLayout, read_layout

# Pillow warns about tags that it can't parse; nothing here reads tags through Pillow.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Pillow's own limit is global; `decode_image` checks data.max_image_pixels before it decodes.
Image.MAX_IMAGE_PIXELS = None
# Callers that decode many pages use a thread or process per page: OpenCV's own threads would oversubscribe the cores.
cv2.setNumThreads(0)
# Damaged and unusual files are reported by doccls; OpenCV's own messages would garble the progress bars.
_SILENT = 0
(cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2).setLogLevel(_SILENT)  # OpenCV 5, or OpenCV 4
WHITE = 255
# The version of the pixels that `decode_reduced` and `scale_page` give: increment it when they change. Pages in stores
# and runs of another version are not mixed with these.
PIXEL_RULE = 5
_MAX_BYTES_PER_PIXEL = 8  # decoded, of data.max_image_pixels: RGBA of 16 bits, or grey of 64


@dataclass(frozen=True, eq=False)
class DecodedPage:
    """A decoded page, possibly at a fraction of its full size."""

    page: np.ndarray  # (height, width, 3) uint8 RGB, upright
    reduced: int  # the page is decoded at 1/`reduced` of its full size: 1, 2, 4 or 8
    height_px: int  # at full size
    width_px: int

    def scale(self, size_px: int) -> np.ndarray:
        """Scale the page as `scale_page` does at full size."""
        return _scale(self.page, self.height_px, self.width_px, size_px)


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode file bytes to (height, width, 3) uint8 RGB, upright by EXIF orientation, transparency on white.

    16-bit and float images are scaled to 8 bits, not clipped. Only the first of several pages is decoded.

    Raises:
        ImageError: not an image, truncated, or more than `max_pixels` pixels. Nothing else is raised.
    """
    return decode_reduced(data, max_pixels, None).page


def decode_reduced(data: bytes, max_pixels: int, size_px: int | None) -> DecodedPage:
    """Decode like `decode_image`, but a JPEG at 1/2, 1/4 or 1/8 of its size if its longest side stays >= 2 * `size_px`.

    libjpeg does this for a fraction of the work and still reads the entire file, so truncation is detected. Scaled to
    `size_px`, real pages differ from fully decoded ones by less than the area filter differs from Pillow's bilinear
    filter (tests/texdoc17).

    Raises:
        ImageError: see `decode_image`.
    """
    if not data:
        raise ImageError("not an image: the file is empty")
    if is_tiff(data) and is_truncated_tiff(data):  # decoders would take what `strip_metadata` appends for pixels
        raise ImageError("the TIFF is truncated: some of its pixels lie behind the end of the file")
    try:  # a TIFF's metadata is stripped first: its tags share one list with those that pixels need
        decoded = _decode(strip_metadata(data) if is_tiff(data) else data, max_pixels, size_px)
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 (decoders raise all kinds of exceptions on malformed input)
        decoded = _decode_bare(data, max_pixels, size_px, error)
    return _set_upright(decoded, read_orientation(data))


def _decode_bare(data: bytes, max_pixels: int, size_px: int | None, first_error: Exception) -> DecodedPage:
    """Decode without metadata, in case only that was malformed; otherwise report `first_error`."""
    try:
        return _decode(strip_metadata(data), max_pixels, size_px)
    except ImageError:
        raise
    except Exception:  # noqa: BLE001 (as above)
        if isinstance(first_error, UnidentifiedImageError):
            raise ImageError(_explain_unidentified(data)) from first_error
        if _is_vague(first_error) and (layout := read_layout(data)):
            raise ImageError(
                f"a damaged TIFF, or one of an unsupported kind: {describe_layout(layout)}"
            ) from first_error
        message = f"{type(first_error).__name__}: {first_error}".replace("<_io.BytesIO object", "<file")
        raise ImageError(message) from first_error


def _is_vague(error: Exception) -> bool:
    """Return whether a decoder's message doesn't say what is wrong."""
    return "decoder error" in str(error) or isinstance(error, struct.error)


def _explain_unidentified(data: bytes) -> str:
    """Say why no decoder takes the file."""
    if is_tiff(data):
        layout = read_layout(data)
        return f"a TIFF of an unsupported kind: {describe_layout(layout) if layout else 'its tags are unreadable'}"
    if (depth := read_jpeg_depth(data)) not in (None, 8):
        return f"a JPEG of {depth} bits per sample, which can't be read: save it with 8 bits, or as PNG"
    if name := name_unsupported(data):
        return f"{name}, which doccls doesn't read: convert it to PNG, JPEG or TIFF"
    if name := name_other_file(data):
        return f"not an image but {name}"
    return f"not an image: the file starts with {data[:12]!r}"


def _decode(data: bytes, max_pixels: int, size_px: int | None) -> DecodedPage:
    """Decode the page as stored, not yet upright; any exception of the decoder passes through."""
    layout = read_layout(data) if is_tiff(data) else None
    if layout is not None:
        _check_layout(layout, max_pixels)
        if is_wide(layout):
            return _decode_wide(data, layout, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=choose_formats(data))
    except UnidentifiedImageError:
        if layout is None or not is_grey_or_rgb(layout):
            raise
        return _decode_wide(data, layout, max_pixels)
    with image:
        width, height = image.size
        _check_size(width, height, max_pixels)
        reduced = 1
        if size_px is not None and image.format in ("JPEG", "MPO"):
            reduced = _choose_reduction(max(width, height), min(width, height), size_px)
            image.draft(None, (width // reduced, height // reduced))
        image.load()
        if image.format == "TIFF" and image.mode == "P" and (palette := read_short_palette(data)):
            image.putpalette(palette)
        bits = find_lost_bits(data, image)
        page = (read_deep_page(data, bits) if bits else None) or image
        if page is image and bits and image.format == "JPEG2000" and not image.mode.startswith("I"):
            raise ImageError(f"a JPEG 2000 of {bits}-bit colours that can't be read: save it with 8 bits, or as PNG")
        if image.format == "AVIF":  # Pillow sets the orientation from the file's own transforms; those of HEIC are done
            page = ImageOps.exif_transpose(page)
            height, width = page.height, page.width
        return DecodedPage(np.asarray(_to_rgb(page)), reduced, height, width)


def _decode_wide(data: bytes, layout: SampleLayout, max_pixels: int) -> DecodedPage:
    """Decode a TIFF's page whose samples Pillow can't read."""
    size_bytes = layout.padded_width_px * layout.height_px * layout.samples * layout.bits // 8
    if size_bytes > _MAX_BYTES_PER_PIXEL * max_pixels:
        raise ImageError(
            f"{describe_layout(layout)}: {layout.width_px} x {layout.height_px} px take {size_bytes} bytes, more than "
            f"{_MAX_BYTES_PER_PIXEL} x data.max_image_pixels = {_MAX_BYTES_PER_PIXEL * max_pixels}"
        )
    return DecodedPage(np.asarray(_to_rgb(read_wide_page(data, layout))), 1, layout.height_px, layout.width_px)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} px is more than data.max_image_pixels = {max_pixels}")


def _check_layout(layout: SampleLayout, max_pixels: int) -> None:
    """Refuse a TIFF whose page or tiles are too large; decoders allocate entire tiles, even for a small page."""
    _check_size(layout.width_px, layout.height_px, max_pixels)
    tile_px = (layout.tile_width_px or 0) * (layout.tile_height_px or 0)
    if max(tile_px, layout.padded_width_px * layout.height_px // 4) > max_pixels:
        size = f"{layout.tile_width_px} x {layout.tile_height_px} px"
        raise ImageError(f"tiles of {size}, too large for data.max_image_pixels = {max_pixels}")


def _choose_reduction(longest_px: int, shortest_px: int, size_px: int) -> int:
    """Return the largest of libjpeg's reductions that leaves the page at least twice `size_px`.

    With less left for the area filter, libjpeg's own, sharper filter would show.
    """
    fitting = (factor for factor in (8, 4, 2) if longest_px >= 2 * size_px * factor and shortest_px >= factor)
    return next(fitting, 1)


def _set_upright(decoded: DecodedPage, orientation: int) -> DecodedPage:
    """Undo the EXIF orientation, 1 to 8, which says where the stored page's first row and first column belong."""
    page, height, width = decoded.page, decoded.height_px, decoded.width_px
    if orientation >= 5:
        page, height, width = page.transpose(1, 0, 2), width, height
    upside_down, mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    page = page[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return DecodedPage(np.ascontiguousarray(page), decoded.reduced, height, width)


def count_pages(data: bytes) -> int:
    """Count the pages of a TIFF or the frames of a GIF or WEBP; return 1 where they can't be counted."""
    if is_tiff(data):
        return count_tiff_pages(data)
    try:
        with Image.open(io.BytesIO(data), formats=("GIF", "WEBP")) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001 (another format, or damaged after the first frame)
        return 1


def fit_page(image: np.ndarray, size_px: int) -> np.ndarray:
    """Scale (h, w, 3) uint8 to longest side size_px and centre it on white: (size_px, size_px, 3) uint8."""
    return pad_page(scale_page(image, size_px), size_px)


def scale_page(image: np.ndarray, size_px: int) -> np.ndarray:
    """Scale (h, w, 3) uint8 to longest side size_px."""
    return _scale(image, image.shape[0], image.shape[1], size_px)


def _scale(image: np.ndarray, height: int, width: int, size_px: int) -> np.ndarray:
    """Scale an image of a page whose full size is `height` x `width` to longest side size_px."""
    scale = size_px / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(image, (new_width, new_height), interpolation=interpolation)
    return scaled


def pad_page(scaled: np.ndarray, size_px: int) -> np.ndarray:
    """Centre (h, w, 3) uint8, no side longer than size_px, on a white (size_px, size_px, 3) page."""
    height, width = scaled.shape[:2]
    page = np.full((size_px, size_px, 3), WHITE, dtype=np.uint8)
    top, left = (size_px - height) // 2, (size_px - width) // 2
    page[top : top + height, left : left + width] = scaled
    return page


def load_page(data: bytes, max_pixels: int, size_px: int) -> np.ndarray:
    """Decode file bytes to (h, w, 3) uint8 with longest side size_px, as the page store keeps it.

    Raises:
        ImageError: see `decode_image`.
    """
    return decode_reduced(data, max_pixels, size_px).scale(size_px)


def shrink_page(page: np.ndarray, size_px: int) -> np.ndarray:
    """Shrink a stored page to longest side size_px.

    Stored pages are usually less than twice as large. They go through the bilinear filter that training pages go
    through when they are rotated and zoomed.
    """
    longest = max(page.shape[:2])
    if longest == size_px:
        return page
    height, width = (max(1, round(side * size_px / longest)) for side in page.shape[:2])
    interpolation = cv2.INTER_LINEAR if longest < 2 * size_px else cv2.INTER_AREA
    shrunk: np.ndarray = cv2.resize(page, (width, height), interpolation=interpolation)
    return shrunk


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow has scaled JPEG 2000 and PPM by the white that they state; PNG states none below 16 bits.
        white = None if image.format == "PNG" else 65535
        values = np.asarray(image)
        return Image.fromarray(scale_to_8_bits(values, 8 * values.itemsize, white)).convert("RGB")
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):  # an all-zero channel is unused, and would hide the page
            page = Image.new("RGBA", image.size, (WHITE, WHITE, WHITE, WHITE))
            image = Image.alpha_composite(page, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert always copies
