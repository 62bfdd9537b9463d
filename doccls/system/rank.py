"""Which process of a group this is, before there is a group."""

import os
from collections.abc import Mapping

DEVICE = "DOCCLS_DEVICE"
"""Environment variable: `cuda` for a process that was given a GPU, and is not to train on anything else."""
MEETING_FILE = "DOCCLS_MEETING_FILE"
"""Environment variable: a new file through which the ranks of one machine find each other, instead of a port that must
be free. `launcher` sets it."""


def rank_by_environment(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(environment.get("RANK", "0"))
