"""The C library's allocator, told to keep freed memory for what is allocated next."""

import ctypes
import sys
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
_NEVER, _NO_MAPPING = -1, 0


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Keep what this process frees until it ends; whether that could be arranged.

    glibc gives large tensors back to the kernel as soon as they are freed, and gets them anew for the next layer,
    zeroed page by page: a third of the time of a step on a CPU. What MALLOC_* or GLIBC_TUNABLES say stays as it is.
    """
    chosen = any(name.startswith("MALLOC_") for name in environment) or "glibc.malloc" in environment.get(
        "GLIBC_TUNABLES", ""
    )
    if chosen or sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library
        return False
    return bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER) and libc.mallopt(_MMAP_MAX, _NO_MAPPING))
