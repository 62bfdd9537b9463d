"""Parser of torch's out-of-memory messages: whether the GPU is full, and how much memory other processes hold."""

import re

SIGNIFICANT_GIB = 1.0  # other processes count if they hold more; a driver and an idle desktop take several hundred MiB
_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_GIB = {"bytes": 2.0**-30, "KiB": 2.0**-20, "MiB": 2.0**-10, "GiB": 1.0, "TiB": 2.0**10}
_AMOUNTS = tuple(
    re.compile(words.replace("AMOUNT", r"([\d.]+) (bytes|[KMGT]iB)"))
    for words in ("total capacity of AMOUNT", "of which AMOUNT is free", "this process has AMOUNT memory in use")
)


def is_full(message: str) -> bool:
    """Return whether this is one of torch's messages for a full GPU."""
    return any(words in message for words in _FULL)


def measure_others_gib(message: str) -> float:
    """Return the GiB that other processes hold; 0 if the message gives no amounts, as before torch 2.1."""
    matches = [pattern.search(message) for pattern in _AMOUNTS]
    total, free, own = [float(match[1]) * _GIB[match[2]] if match else None for match in matches]
    return 0.0 if total is None or free is None or own is None else max(0.0, total - free - own)
