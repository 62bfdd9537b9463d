"""Which process of a group this is, before there is a group."""

import os
from collections.abc import Mapping

MEETING_FILE = "DOCCLS_MEETING_FILE"
"""Environment variable: a new file through which the ranks of one machine find each other, instead of a port that must
be free. `launcher` sets it."""


def rank_by_environment(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(environment.get("RANK", "0"))
