"""The processor's cores, and a process's share of them."""

import os
from collections.abc import Mapping

CORES = "DOCCLS_CORES"
"""By which who starts several folds on a machine tells each process how many of its cores it may use."""


def count_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_own_cores(environment: Mapping[str, str]) -> int:
    """This process's share of them: by its launcher's word, or as one of the ranks of its machine."""
    told = environment.get(CORES)
    return max(1, int(told) if told else count_cores() // int(environment.get("LOCAL_WORLD_SIZE", "1")))
