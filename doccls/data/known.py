"""What the look at the images found, kept: an image that has not changed since is not read and decoded again."""

import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from doccls.data.inspection import ImageFact, ImageLook
from doccls.run.artifacts import write_text

_FORMAT = "doccls-images-3"


def read_known(file: Path, max_pixels: int) -> dict[Path, ImageLook]:
    """The looks kept in `file` at that limit of pixels; none if it is missing, damaged or of another limit."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (content["format"], content["max_image_pixels"]) != (_FORMAT, max_pixels):
            return {}
        return {
            Path(path): ImageLook(size_bytes, mtime_ns, ImageFact(*fact))
            for path, size_bytes, mtime_ns, *fact in content["images"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # it saves time and decides nothing: the images are looked at


def write_known(file: Path, looks: Mapping[Path, ImageLook], max_pixels: int) -> None:
    """Keep the looks, whole; unless they stand there already. What could not be read is looked at again."""
    looks = {path: look for path, look in looks.items() if look.fact.digest}
    if read_known(file, max_pixels) == looks:
        return
    rows = [[str(path), look.size_bytes, look.mtime_ns, *astuple(look.fact)] for path, look in looks.items()]
    content = {"format": _FORMAT, "max_image_pixels": max_pixels, "images": rows}
    write_text(file, json.dumps(content, separators=(",", ":")) + "\n")


def is_unchanged(path: Path, look: ImageLook) -> bool:
    """Whether the file has the size and the time of change that it had at the look."""
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (look.size_bytes, look.mtime_ns)
