"""The pages to predict: the rows of a sample submission, or every image of a folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from doccls.config import Config
from doccls.config.paths import check_paths, describe_error, list_entries
from doccls.config.schema import IMAGE_EXTENSIONS
from doccls.data.image_names import resolve_images
from doccls.data.messages import format_examples
from doccls.data.packed import PackedPaths, PackedTexts
from doccls.data.scan import scan_rows
from doccls.data.store import StoreChoice, StoredPages
from doccls.data.table import read_table, require_columns
from doccls.errors import UserError
from doccls.reporting.progress import ConsoleReporter


@dataclass(frozen=True, eq=False)
class TestPages:
    """The pages to predict, in order."""

    ids: PackedTexts
    paths: PackedPaths  # None for a missing or bad image (if --on-bad-image is `skip`)
    problems: tuple[str, ...]
    columns: tuple[str, ...] | None = None  # of the sample submission; None for the images of a folder
    stored: StoredPages | None = None  # their decoded pages, if there is a store


def read_sample_pages(config: Config, store: StoreChoice | None = None) -> TestPages:
    """Read the rows of the sample submission, in its order, and scan their images, which the store then keeps.

    Raises:
        UserError: no sample or folder, no ID column, or (unless data.on_bad_image is `skip`) images missing or bad.
    """
    data = config.data
    check_paths({"data.sample_csv": (data.sample_csv, "file"), "data.image_dir_test": (data.image_dir_test, "folder")})
    assert data.sample_csv is not None and data.image_dir_test is not None
    table = read_table(data.sample_csv, "data.sample_csv", [data.id_col])
    require_columns(table, data.sample_csv, {"data.id_col": data.id_col})
    ids = table.cells[data.id_col]
    images = resolve_images(ids, table.lines_N.tolist(), data.image_dir_test, data.image_ext)
    if images.refused is not None:
        raise UserError(images.refused)
    problems = []
    if images.missing:
        problems.append(format_examples(f"test images missing in {data.image_dir_test}", images.missing))
    pages = _scan(data.image_dir_test, ids, images.names, problems, config, store, "give their rows class frequencies")
    return TestPages(pages.ids, pages.paths, (*table.warnings, *pages.problems), table.columns, pages.stored)


def read_folder_pages(folder: Path, config: Config, store: StoreChoice | None = None) -> TestPages:
    """Find all images in a folder and its subfolders, and scan them, which the store then keeps.

    The ID of an image is its path in the folder, with `/` and its extension. Names that start with a dot are left out.

    Raises:
        UserError: there are none, a subfolder can't be listed, a name can't be written in UTF-8, or (unless
            data.on_bad_image is `skip`) images are bad.
    """
    names = sorted(_find_images(folder, "", frozenset()))
    if not names:
        raise UserError(
            f"--images: no images in {folder} or its subfolders (extensions: {', '.join(IMAGE_EXTENSIONS)})"
        )
    unwritable = [repr(name) for name in names if not _is_utf8(name)]
    if unwritable:
        raise UserError(f"--images {folder}: {format_examples('names that are not UTF-8 text; rename', unwritable)}")
    return _scan(folder, names, names, [], config, store, "leave their rows without a prediction")


def _scan(
    folder: Path,
    ids: Sequence[str],
    names: Sequence[str | None],
    problems: list[str],
    config: Config,
    store: StoreChoice | None,
    remedy: str,
) -> TestPages:
    """Scan the images of these names, None where there is no file; `problems` are those of missing files.

    Raises:
        UserError: (unless data.on_bad_image is `skip`) images are missing or bad; `remedy` is what `skip` would do.
    """
    resolved = PackedPaths(folder, names)
    rows = scan_rows(resolved, config, {}, store, ConsoleReporter())
    if rows.bad:
        bad = sorted({(names[row], f"{resolved[row]}: {why}") for row, why in rows.bad.items()})
        problems = [*problems, format_examples("images that can't be used", [line for _, line in bad])]
    if problems and config.data.on_bad_image == "error":
        raise UserError("\n".join([*problems, f"(--on-bad-image skip would {remedy})"]))
    usable = (None if fact is None else name for name, fact in zip(names, rows.usable, strict=True))
    return TestPages(PackedTexts(ids), PackedPaths(folder, usable), tuple(problems), stored=rows.stored)


def _find_images(root: Path, folder: str, parents: frozenset[Path]) -> Iterator[str]:
    """Yield the paths, relative to the root, of the images in a folder under it.

    Links are followed, but not to a folder that they are in: `parents` are the real paths of those.
    """
    real = (root / folder).resolve()
    if real in parents:
        return
    try:
        files, folders = list_entries(root / folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--images: {describe_error(error, root / folder, 'folder')}") from error
    prefix = f"{folder}/" if folder else ""
    for name in files:
        if not name.startswith(".") and PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS:
            yield prefix + name
    for name in folders:
        if not name.startswith("."):
            yield from _find_images(root, prefix + name, parents | {real})


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
