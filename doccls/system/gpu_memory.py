"""What torch's out-of-memory message says of a GPU: whether it is full, and how much of it other processes hold."""

import re

MUCH_GIB = 1.0
"""Others that hold more than this count. The driver and an idle desktop take several hundred MiB."""
_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_GIB = {"bytes": 2.0**-30, "KiB": 2.0**-20, "MiB": 2.0**-10, "GiB": 1.0, "TiB": 2.0**10}
_AMOUNTS = tuple(
    re.compile(words.replace("AMOUNT", r"([\d.]+) (bytes|[KMGT]iB)"))
    for words in ("total capacity of AMOUNT", "of which AMOUNT is free", "this process has AMOUNT memory in use")
)


def is_full(message: str) -> bool:
    """Whether these are torch's words for a GPU that is full."""
    return any(words in message for words in _FULL)


def measure_others_gib(message: str) -> float:
    """What is neither free nor this process's own; 0 if the message gives no amounts, as before torch 2.1."""
    found = [pattern.search(message) for pattern in _AMOUNTS]
    total, free, own = [float(one[1]) * _GIB[one[2]] if one else None for one in found]
    return 0.0 if total is None or free is None or own is None else max(0.0, total - free - own)
