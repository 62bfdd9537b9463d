"""`doccls preview`: one picture of what the model sees: a few pages, each clean, augmented and damaged."""

import argparse
import io
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from doccls.config import Config
from doccls.config.arguments import add_config_arguments, load_arguments_with_warnings
from doccls.config.files import check_inputs
from doccls.config.paths import (
    describe_error,
    find_file_output_problem,
    format_path,
    resolve_option,
)
from doccls.data.image_scan import scan_files
from doccls.data.manifest import Manifest, read_manifest
from doccls.errors import UserError
from doccls.system.atomic_files import write_bytes

_MAX_PAGES, _PAGES_PER_BLOCK, _EPOCHS = 12, 6, 3
_CELL_PX, _GAP_PX, _HEADINGS_PX, _CAPTION_PX = 160, 6, 44, 26
_BACKGROUND, _INK, _FAINT_INK = (214, 218, 224), (20, 20, 20), (90, 90, 90)
# Those with many scripts come first; Pillow's own, which is used if none is installed, has only English letters.
_FONTS = (
    "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "FreeSans.ttf", "arial.ttf",
    "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf",
)  # fmt: skip
_FONT_PX = 14
_MAX_CHARACTERS = 200
# Only files with this mark at their start are replaced, so that no picture can take the place of a page.
_MARK = "Written by doccls preview"
_MARK_SEARCH_BYTES = 1024
_PNG_START = b"\x89PNG"

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Heading:
    """The two lines over a column."""

    title: str
    note: str


@dataclass(frozen=True, eq=False)
class PreviewRow:
    """The variants of a page, one per column, with its label and ID."""

    label: str
    sample_id: str
    variants: tuple[np.ndarray, ...]  # each (size, size, 3) uint8


@dataclass(frozen=True)
class Layout:
    """The positions of everything in a picture of `rows` rows: blocks of six, side by side."""

    rows: int
    columns: int
    cell_px: int

    @property
    def block_px(self) -> int:
        """The width of a block."""
        return self.columns * self._column_px + _GAP_PX

    @property
    def size_px(self) -> tuple[int, int]:
        """The width and height of the picture."""
        blocks, tallest = -(-self.rows // _PAGES_PER_BLOCK), min(self.rows, _PAGES_PER_BLOCK)
        return _GAP_PX + blocks * (self.block_px + _GAP_PX), _HEADINGS_PX + tallest * self._row_px + 2 * _GAP_PX

    @property
    def _column_px(self) -> int:
        return max(self.cell_px, _CELL_PX) + _GAP_PX  # wide enough for the headings

    @property
    def _row_px(self) -> int:
        return _CAPTION_PX + self.cell_px + _GAP_PX

    def locate(self, row: int, column: int) -> tuple[int, int]:
        """Return the left and top edge of a cell."""
        block, line = divmod(row, _PAGES_PER_BLOCK)
        left = 2 * _GAP_PX + block * (self.block_px + _GAP_PX) + column * self._column_px
        return left, _HEADINGS_PX + line * self._row_px + _CAPTION_PX


# --- command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls preview`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("preview.png"), metavar="FILE",
        help="the picture, a .png file (default: preview.png); only an earlier preview is replaced",
    )  # fmt: skip


def preview(arguments: argparse.Namespace) -> int:
    """Write the picture and return the exit code. Only pages that it may show are read.

    Raises:
        UserError: the config or its data can't be used, or the picture can't be written there.
    """
    output = resolve_option(arguments.output, "--output")
    loaded = load_arguments_with_warnings(arguments)
    config = loaded.config
    for warning in (*loaded.warnings, *check_inputs(config)):
        print(f"[WARNING] {warning}")
    _check_output(output, [folder for folder in (config.data.image_dir_train, config.data.image_dir_test) if folder])
    manifest = read_manifest(config.data)
    for warning in manifest.warnings:
        print(f"[WARNING] {warning}")
    samples = choose_samples(manifest.targets_N, lambda sample: _is_usable(manifest, sample, config))
    if not samples:
        raise UserError(f"{config.data.train_csv}: no row has a usable image")
    rows = draw_rows(config, manifest, samples)
    content = encode_picture(render_picture(rows, list_headings(config)))
    _check_output(output, {path.resolve().parent for path in manifest.paths if path is not None})
    try:
        write_bytes(output, content)
    except OSError as error:
        raise UserError(f"--output: {describe_error(error, output, 'file')}") from error
    print(f"[PREVIEW] {len(rows)} {'page' if len(rows) == 1 else 'pages'}: {format_path(output)}")
    return 0


def _check_output(output: Path, image_folders: Iterable[Path]) -> None:
    """Check that the picture may be written to the path: never among the images, nor over a foreign file.

    Raises:
        UserError: it may not.
    """
    problem = find_file_output_problem(output, "picture", ".png", "preview", _is_earlier_preview)
    if problem is not None:
        raise UserError(f"--output: {problem}")
    for folder in image_folders:
        if any(parent.samefile(folder) for parent in output.parents):
            raise UserError(
                f"--output: {format_path(output)} is in a folder of the images, {format_path(folder)}: choose another "
                "folder"
            )


def _is_earlier_preview(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_MARK_SEARCH_BYTES)
    return start.startswith(_PNG_START) and _MARK.encode() in start


# --- pages -----------------------------------------------------------------------------------------------------------


def choose_samples(targets_N: np.ndarray, is_usable: Callable[[int], bool]) -> list[int]:
    """Choose up to twelve usable samples: one per class in the order of classes, then a second of each, and so on.

    Of more than twelve classes, those are chosen that are evenly spread over the order. A class's samples are spread
    over the table. `is_usable` is only asked about samples that are to be chosen.
    """
    counts_C = np.bincount(targets_N)
    samples_by_class = np.split(np.argsort(targets_N, kind="stable"), np.cumsum(counts_C)[:-1])
    classes = _spread(len(counts_C), _MAX_PAGES)
    wanted = -(-_MAX_PAGES // len(counts_C))
    queues = {
        target: filter(is_usable, samples_by_class[target][_spread(int(counts_C[target]), wanted)].tolist())
        for target in classes.tolist()
    }
    chosen: list[tuple[int, int, int]] = []
    for turn in range(_MAX_PAGES):
        for target, queue in queues.items():
            sample = next(queue, None) if len(chosen) < _MAX_PAGES else None
            if sample is not None:
                chosen.append((turn, target, sample))
    return [sample for _, _, sample in sorted(chosen)]


def _spread(count: int, wanted: int) -> np.ndarray:
    """Return all of 0 to count - 1: first `wanted` of them, evenly spread, then the others; (count,) int64."""
    first = np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))
    return np.concatenate([first, np.setdiff1d(np.arange(count), first)])


def _is_usable(manifest: Manifest, sample: int, config: Config) -> bool:
    """Return whether the sample has an image that can be decoded.

    Raises:
        UserError: it can't be, and data.on_bad_image is not `skip`.
    """
    path = manifest.paths[sample]
    if path is None:
        return False
    (scanned,) = scan_files([path], config.data.max_image_pixels, config.page_px, {}, keep_pages=False)
    if scanned.fact.problem is None:
        return True
    message = f"{manifest.describe(sample)}: {path}: {scanned.fact.problem}"
    if config.data.on_bad_image != "skip":
        raise UserError(f"an image that can't be used: {message}\n(data.on_bad_image: skip leaves such rows out)")
    print(f"[WARNING] an image that can't be used is not shown: {message}")
    return False


def draw_rows(config: Config, manifest: Manifest, samples: Sequence[int]) -> list[PreviewRow]:
    """Draw the samples as training does: clean, augmented in the first epochs of its first fold, damaged."""
    from doccls.data.dataset import AugmentationKey, SampleKey, build_dataset  # torch takes seconds to import

    valid = config.valid.model_copy(update={"damage": _find_level(config)})
    dataset = build_dataset(config.model_copy(update={"valid": valid}), manifest)
    fold = config.data.list_wanted()[0]

    def draw(sample: int) -> tuple[np.ndarray, ...]:
        augmented = [SampleKey(sample, AugmentationKey(fold, epoch)) for epoch in range(_EPOCHS)]
        keys = [SampleKey(sample), *augmented, SampleKey(sample, is_damaged=True)]
        return tuple(dataset[key][0] for key in keys)

    return [
        PreviewRow(manifest.classes[manifest.targets_N[sample]], manifest.ids[sample], draw(sample))
        for sample in samples
    ]


def list_headings(config: Config) -> list[Heading]:
    """Return the heading of each column of `draw_rows`."""
    fold, level = config.data.list_wanted()[0], _find_level(config)
    return [
        Heading("clean", "as validated"),
        *(Heading(f"augmented, epoch {epoch + 1}", f"as in fold {fold}") for epoch in range(_EPOCHS)),
        Heading(f"damaged: {level}", "as validated" if config.valid.has_damage else "valid.damage: none"),
    ]


def _find_level(config: Config) -> str:
    return config.valid.damage if config.valid.has_damage else "scan"


# --- picture ---------------------------------------------------------------------------------------------------------


def render_picture(rows: Sequence[PreviewRow], headings: Sequence[Heading]) -> Image.Image:
    """Render the rows under the headings, each with its label and ID over it."""
    layout = Layout(len(rows), len(headings), find_cell_px(rows[0].variants[0].shape[0]))
    picture = Image.new("RGB", layout.size_px, _BACKGROUND)
    draw, font = ImageDraw.Draw(picture), _load_font()
    for first in range(0, len(rows), _PAGES_PER_BLOCK):
        for column, heading in enumerate(headings):
            left = layout.locate(first, column)[0]
            for line, (text, ink) in enumerate(((heading.title, _INK), (heading.note, _FAINT_INK))):
                position = (left, _GAP_PX + line * (_FONT_PX + 3))
                draw.text(position, shorten(text, max(layout.cell_px, _CELL_PX), font), ink, font)
    for number, row in enumerate(rows):
        left, top = layout.locate(number, 0)
        label = shorten(f"class {row.label}", layout.block_px // 2, font)
        draw.text((left, top - 5), label, _INK, font, anchor="ls")
        used_px = int(font.getlength(label)) + 3 * _GAP_PX
        sample_id = shorten(row.sample_id, layout.block_px - 2 * _GAP_PX - used_px, font)
        draw.text((left + used_px, top - 5), sample_id, _FAINT_INK, font, anchor="ls")
        for column, variant in enumerate(row.variants):
            picture.paste(Image.fromarray(resize_variant(variant, layout.cell_px)), layout.locate(number, column))
    return picture


def find_cell_px(size_px: int) -> int:
    """Return the side of the cells: a multiple of a small page's side, which leaves its pixels as they are."""
    return size_px * max(1, round(_CELL_PX / size_px)) if size_px <= 1.25 * _CELL_PX else _CELL_PX


def resize_variant(variant: np.ndarray, cell_px: int) -> np.ndarray:
    """Resize a page to the cell's side."""
    interpolation = cv2.INTER_AREA if cell_px < variant.shape[0] else cv2.INTER_NEAREST
    resized: np.ndarray = cv2.resize(variant, (cell_px, cell_px), interpolation=interpolation)
    return resized


def shorten(text: str, width_px: int, font: _Font) -> str:
    """Leave out the middle of a text that is wider than `width_px`, and replace characters that can't be shown."""
    is_cut = len(text) > _MAX_CHARACTERS
    start, end = text[: _MAX_CHARACTERS // 2], text[-_MAX_CHARACTERS // 2 :]
    shown = _escape(start + end if is_cut else text)
    short, kept = f"{_escape(start)}...{_escape(end)}" if is_cut else shown, len(shown)
    while font.getlength(short) > width_px and kept:
        kept -= 1
        short = f"{shown[: kept - kept // 2]}...{shown[len(shown) - kept // 2 :]}"
    return short


def _escape(text: str) -> str:
    """Replace spaces of any kind by a plain one, drop invisible marks, and show `?` for what is no character."""
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "?"
        for character in text
        if unicodedata.category(character) != "Cf"
    )


def _load_font() -> _Font:
    """Load the installed font with the most scripts."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, _FONT_PX)
        except OSError:
            continue
    return ImageFont.load_default(_FONT_PX)


def encode_picture(picture: Image.Image) -> bytes:
    """Encode the picture as PNG, with the mark of a preview at its start."""
    file, mark = io.BytesIO(), PngInfo()
    mark.add_text("Software", _MARK)
    picture.save(file, "PNG", pnginfo=mark)
    return file.getvalue()
