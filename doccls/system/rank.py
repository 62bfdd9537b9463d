"""The rank of this process, as known before the process group exists."""

import os
from collections.abc import Mapping

from doccls.errors import UserError
from doccls.system.variables import parse_flag, parse_whole_number

# Environment variable: `cuda` for a process that was given a GPU and must not train on anything else.
DEVICE = "DOCCLS_DEVICE"
# Environment variable: a new file for the rendezvous of the ranks on one machine, which needs no free port. `launcher`
# sets it.
MEETING_FILE = "DOCCLS_MEETING_FILE"
_MAX_PORT = 65535


def rank_by_environment(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank that the launcher gave this process; 0 without a launcher, or if RANK is not a number.

    `check_group_variables` refuses the latter.
    """
    try:
        return parse_whole_number(environment, "RANK", 0)
    except UserError:
        return 0


def has_meeting_address(environment: Mapping[str, str]) -> bool:
    """Return whether MASTER_ADDR and MASTER_PORT are an address, of which a group of one process can make use."""
    return "MASTER_ADDR" in environment and environment.get("MASTER_PORT", "").strip().isdecimal()


def check_group_variables(environment: Mapping[str, str]) -> None:
    """Check the variables that place this process in a group, as torchrun, Accelerate and `launcher` set them.

    Raises:
        UserError: one of them is not a number, is missing, or does not fit the others.
    """
    world_size = parse_whole_number(environment, "WORLD_SIZE", 1, at_least=1)
    parse_whole_number(environment, "LOCAL_WORLD_SIZE", 1, at_least=1)
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        number = parse_whole_number(environment, name, 0)
        if number >= world_size:
            size = f"WORLD_SIZE={world_size}" if "WORLD_SIZE" in environment else "WORLD_SIZE is not set"
            raise UserError(
                f"the environment has {name}={number}, but {size}: processes are numbered from 0 to WORLD_SIZE - 1. "
                "For a single process, unset both; for several, use `accelerate launch` or `doccls-launch run`"
            )
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"):
        parse_flag(environment, name)
    if world_size > 1:
        # Otherwise it means nothing: in Kubernetes, a service named `master` makes it tcp://10.0.0.1:29500.
        if parse_whole_number(environment, "MASTER_PORT", 0) > _MAX_PORT:
            raise UserError(f"MASTER_PORT={environment['MASTER_PORT']}: a port is at most {_MAX_PORT}")
        parse_whole_number(environment, "OMP_NUM_THREADS", 0)  # Accelerate reads it
        needed = ["RANK"] if MEETING_FILE in environment else ["RANK", "MASTER_ADDR", "MASTER_PORT"]
        missing = [name for name in needed if not environment.get(name)]
        if missing:
            raise UserError(
                f"WORLD_SIZE={world_size}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: "
                "for a single process unset WORLD_SIZE; for several, use `accelerate launch` or `doccls-launch run`, "
                "which set them (docs/distributed.md)"
            )
