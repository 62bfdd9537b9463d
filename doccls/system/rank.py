"""The rank of this process, as known before the process group exists."""

import os
from collections.abc import Mapping

# Environment variable: `cuda` for a process that was given a GPU and must not train on anything else.
DEVICE = "DOCCLS_DEVICE"
# Environment variable: a new file for the rendezvous of the ranks on one machine, which needs no free port. `launcher`
# sets it.
MEETING_FILE = "DOCCLS_MEETING_FILE"


def rank_by_environment(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank that the launcher gave this process; 0 without a launcher."""
    return int(environment.get("RANK", "0"))
