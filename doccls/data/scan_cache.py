"""What the scan found, kept in a file: an image that has not changed since is not read and decoded again."""

import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from doccls.data.image_scan import ImageFact, ImageScan
from doccls.run.artifacts import write_text

_FORMAT = "doccls-images-3"


def read_scan_cache(file: Path, max_pixels: int) -> dict[Path, ImageScan]:
    """The scans in `file` at that limit of pixels; none if it is missing, damaged or of another limit."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (content["format"], content["max_image_pixels"]) != (_FORMAT, max_pixels):
            return {}
        return {
            Path(path): ImageScan(size_bytes, mtime_ns, ImageFact(*fact))
            for path, size_bytes, mtime_ns, *fact in content["images"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # it saves time and decides nothing: the images are scanned


def write_scan_cache(file: Path, scans: Mapping[Path, ImageScan], max_pixels: int) -> None:
    """Write the scans, unless the file holds them already. What could not be read is scanned again."""
    scans = {path: scan for path, scan in scans.items() if scan.fact.digest}
    if read_scan_cache(file, max_pixels) == scans:
        return
    rows = [[str(path), scan.size_bytes, scan.mtime_ns, *astuple(scan.fact)] for path, scan in scans.items()]
    content = {"format": _FORMAT, "max_image_pixels": max_pixels, "images": rows}
    write_text(file, json.dumps(content, separators=(",", ":")) + "\n")


def is_unchanged(path: Path, scan: ImageScan) -> bool:
    """Whether the file has the size and the time of change that it had when it was scanned."""
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (scan.size_bytes, scan.mtime_ns)
