"""Which process of a group this is, before there is a group."""

import os
from collections.abc import Mapping


def rank_by_environment(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(environment.get("RANK", "0"))
