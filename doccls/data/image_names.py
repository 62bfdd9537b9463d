"""The image file of each ID, found by exact name or by one that differs only in case or Unicode normalization."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from doccls.config.paths import list_entries
from doccls.config.schema import IMAGE_EXTENSIONS
from doccls.data.messages import format_examples, format_row

_COMMON_EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")


@dataclass(frozen=True)
class ResolvedImages:
    """The image file of each ID, and the IDs without one."""

    names: tuple[str | None, ...]  # file name per ID, relative to the image folder; None where there is no file
    missing: tuple[str, ...]  # a line per ID without a file, with the paths that were tried
    refused: str | None  # a message about IDs that are empty or leave the folder; None if there are none


def resolve_images(ids: Sequence[str], lines: Iterable[int], folder: Path, image_ext: str) -> ResolvedImages:
    """Find each ID's image file in `folder`; reject IDs that are absolute, contain `..` or are empty.

    Args:
        ids: The ID of each row.
        lines: The line of each row in its file, for messages.
        folder: The folder of the images.
        image_ext: The extension to try first for IDs without one.
    """
    folders = _Folders(folder)
    name_of: dict[str, str | None] = {}
    missing: list[str] = []
    escaping: list[str] = []
    for line, sample_id in zip(lines, ids, strict=True):
        if sample_id not in name_of:
            candidates = () if _leaves_folder(sample_id) else list_candidates(sample_id, image_ext)
            name_of[sample_id] = next((match for name in candidates if (match := folders.find(name))), None)
        if name_of[sample_id] is None:
            if _leaves_folder(sample_id):
                escaping.append(format_row(line, sample_id))
            else:
                missing.append(f"{format_row(line, sample_id)}: tried {_render_tried(sample_id, folder, image_ext)}")
    heading = "IDs that are empty or leave the image folder (absolute, or with `..`)"
    refused = format_examples(heading, escaping) if escaping else None
    return ResolvedImages(tuple(name_of[sample_id] for sample_id in ids), tuple(missing), refused)


def list_candidates(sample_id: str, image_ext: str) -> tuple[str, ...]:
    """Return the file names to try, in order. Nothing is appended to a common extension: never `x.jpg.jpg`.

    A converter may have written `x.heic.jpg`, so the name comes first for a rarer extension, and then longer ones.
    """
    extension = PurePosixPath(sample_id).suffix.lower()
    if extension in _COMMON_EXTENSIONS:
        return (sample_id,)
    appended = tuple(f"{sample_id}{other}" for other in dict.fromkeys((image_ext, *IMAGE_EXTENSIONS)))
    return (sample_id, *appended) if extension in IMAGE_EXTENSIONS else appended


def _render_tried(sample_id: str, folder: Path, image_ext: str) -> str:
    """Render all paths that were tried, as a shell writes them: `train/x{.jpg,.png}`."""
    endings = [name.removeprefix(sample_id) for name in list_candidates(sample_id, image_ext)]
    return f"{folder / sample_id}{{{','.join(endings)}}}" if len(endings) > 1 else f"{folder / sample_id}"


def _leaves_folder(sample_id: str) -> bool:
    posix, windows = PurePosixPath(sample_id), PureWindowsPath(sample_id)
    return (
        not sample_id.strip()
        or "\0" in sample_id
        or posix.is_absolute()
        or bool(windows.drive or windows.root)
        or ".." in windows.parts
    )


@dataclass(frozen=True)
class _Listing:
    """The files and subfolders of a folder."""

    files: "_Names"
    folders: "_Names"


class _Folders:
    """Cached listings of a folder and its subfolders."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listings: dict[str, _Listing | None] = {}
        self._folder_names: dict[str, str | None] = {"": ""}

    def find(self, path: str) -> str | None:
        """Return the name of the file, relative to the root; None if there is none.

        A file in a folder that can't be listed is taken to exist: the scan says why it can't be read.
        """
        folder, name = os.path.split(os.path.normpath(path))  # so that `./x.jpg` and `x.jpg` give one name
        found = self._find_folder(folder)
        listing = None if found is None else self._list(found)
        if listing is None:
            return None if found is None else _join(found, name)
        match = listing.files.get(name)
        return None if match is None else _join(found or "", match)

    def _find_folder(self, path: str) -> str | None:
        if path not in self._folder_names:
            parent, name = os.path.split(path)
            found = self._find_folder(parent)
            listing = None if found is None else self._list(found)
            match = name if listing is None else listing.folders.get(name) or listing.files.get(name)
            self._folder_names[path] = None if found is None or match is None else _join(found, match)
        return self._folder_names[path]

    def _list(self, folder: str) -> _Listing | None:
        if folder not in self._listings:
            self._listings[folder] = _list_folder(self._root / folder)
        return self._listings[folder]


def _list_folder(folder: Path) -> _Listing | None:
    """Return the listing; None for a folder that can't be listed."""
    try:
        files, folders = list_entries(folder)
    except (FileNotFoundError, NotADirectoryError):
        return _Listing(_Names([]), _Names([]))
    except (OSError, ValueError):
        return None
    return _Listing(_Names(files), _Names(folders))


class _Names:
    """Names of files, by exact form, then by composed (NFC) form, then by that in lower case."""

    def __init__(self, names: Iterable[str]) -> None:
        """Key the names; of several with one composed or lower-case form, the first in sorted order is found."""
        ordered = sorted(names, reverse=True)
        composed = {_compose(name): name for name in ordered}
        self._name_of = {_compose(name).lower(): name for name in ordered} | composed | {name: name for name in ordered}

    def get(self, name: str) -> str | None:
        """Return the name that best matches; None if none does."""
        composed = _compose(name)
        return self._name_of.get(name) or self._name_of.get(composed) or self._name_of.get(composed.lower())


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _compose(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)
