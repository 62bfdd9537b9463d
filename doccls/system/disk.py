"""What a disk has room for, and how sizes are told."""

import shutil
from pathlib import Path


def measure_free(folder: Path) -> int:
    """Bytes that this user may still write; what a quota leaves is not seen."""
    return shutil.disk_usage(folder).free


def format_size(count_bytes: int) -> str:
    """For people."""
    mib = count_bytes / 2**20
    return f"{mib:.1f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
