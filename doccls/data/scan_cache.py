"""The scan cache, a file of image scans: an unchanged image is not read and decoded again.

The file is in the page store or, for scans that no store holds, in the run's folder. Facts that the store's segments
hold are not repeated: such a row ends with the digest, by which they are found.
"""

import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from doccls.config.paths import read_regular_file
from doccls.data.image_scan import ImageFact, ImageScan
from doccls.system.atomic_files import write_text

_FORMAT = "doccls-images-5"


def read_scan_cache(file: Path, max_pixels: int, facts: Mapping[str, ImageFact]) -> dict[Path, ImageScan]:
    """Read the scans in `file`; none if it is missing, damaged or made with another `max_pixels`.

    `facts` are those of the store's segments, by digest; empty without a store.
    """
    try:
        content = json.loads(read_regular_file(file)[1])
        if (content["format"], content["max_image_pixels"]) != (_FORMAT, max_pixels):
            return {}
        return {
            Path(path): ImageScan(size_bytes, mtime_ns, ImageFact(digest, *fact) if fact else facts[digest])
            for path, size_bytes, mtime_ns, digest, *fact in content["images"]
            if fact or digest in facts
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # the cache only saves time: the images are scanned again


def write_scan_cache(
    file: Path, scans: Mapping[Path, ImageScan], max_pixels: int, facts: Mapping[str, ImageFact]
) -> None:
    """Write the scans unless the file holds them already. Unreadable files are left out, and so scanned again."""
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
    """Return whether the file still has the size and mtime of its scan."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (scan.size_bytes, scan.mtime_ns)
