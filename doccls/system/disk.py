"""Free disk space, and sizes as text."""

import errno
import shutil
from contextlib import suppress
from pathlib import Path


def measure_free(folder: Path) -> int:
    """Return the free bytes on the folder's disk for this user; quotas are not considered."""
    return shutil.disk_usage(folder).free


def describe_shortage(error: OSError, folder: Path, needed_bytes: int | None) -> str:
    """Return what is needed and free, such as `: 5.2 MiB needed, 1.0 MiB free`, if the disk or quota is full.

    Empty for any other error. `None` bytes are unknown. What a quota leaves free is unknown, too.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    amounts = [] if needed_bytes is None else [f"{_format_small(needed_bytes)} needed"]
    if error.errno == errno.ENOSPC:
        with suppress(OSError):
            amounts.append(f"{_format_small(measure_free(folder))} free")
    return f": {', '.join(amounts)}" if amounts else ""


def _format_small(count_bytes: int) -> str:
    return format_size(count_bytes) if count_bytes >= 2**20 else f"{count_bytes:,} bytes"


def format_size(count_bytes: int) -> str:
    """Return the size in MiB or GiB as text, with one decimal."""
    mib = count_bytes / 2**20
    return f"{mib:.1f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
