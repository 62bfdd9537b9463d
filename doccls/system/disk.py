"""Free disk space, and sizes as text."""

import shutil
from pathlib import Path


def measure_free(folder: Path) -> int:
    """Return the free bytes on the folder's disk for this user; quotas are not considered."""
    return shutil.disk_usage(folder).free


def format_size(count_bytes: int) -> str:
    """Return the size in MiB or GiB as text, with one decimal."""
    mib = count_bytes / 2**20
    return f"{mib:.1f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
