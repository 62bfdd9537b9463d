"""What the scan found, kept in a file: an image that has not changed since is not read and decoded again.

The file is in the page store or, for what no store holds, in the run's folder. What the store's segments say about a
file, by its digest, is not repeated: its row ends with the digest.
"""

import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from doccls.data.image_scan import ImageFact, ImageScan
from doccls.system.atomic_files import write_text

_FORMAT = "doccls-images-4"


def read_scan_cache(file: Path, max_pixels: int, facts: Mapping[str, ImageFact]) -> dict[Path, ImageScan]:
    """The scans in `file` at that limit of pixels; none if it is missing, damaged or of another limit.

    `facts` is what the store's segments say, by digest; without a store it is empty.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (content["format"], content["max_image_pixels"]) != (_FORMAT, max_pixels):
            return {}
        return {
            Path(path): ImageScan(size_bytes, mtime_ns, ImageFact(digest, *fact) if fact else facts[digest])
            for path, size_bytes, mtime_ns, digest, *fact in content["images"]
            if fact or digest in facts
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # it saves time and decides nothing: the images are scanned


def write_scan_cache(
    file: Path, scans: Mapping[Path, ImageScan], max_pixels: int, facts: Mapping[str, ImageFact]
) -> None:
    """Write the scans, unless the file holds them already. What could not be read is scanned again."""
    scans = {path: scan for path, scan in scans.items() if scan.fact.digest}
    if read_scan_cache(file, max_pixels, facts) == scans:
        return
    rows = []
    for path, scan in scans.items():
        digest, *fact = astuple(scan.fact)
        is_stored = facts.get(digest) == scan.fact
        rows.append([str(path), scan.size_bytes, scan.mtime_ns, digest, *([] if is_stored else fact)])
    content = {"format": _FORMAT, "max_image_pixels": max_pixels, "images": rows}
    write_text(file, json.dumps(content, separators=(",", ":")) + "\n")


def is_unchanged(path: Path, scan: ImageScan) -> bool:
    """Whether the file has the size and the time of change that it had when it was scanned."""
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (scan.size_bytes, scan.mtime_ns)
