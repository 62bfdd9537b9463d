"""`python -m fault_launcher run ...`: the launcher, with workers that meet a fault (`fault_train`)."""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from launcher import local
from launcher.cli import main
from launcher.plan import RankCommand


def _with_fault(start_rank: Callable[..., Any], command: RankCommand, *others: Any) -> Any:
    words = tuple("fault_train" if word == "doccls.train" else word for word in command.argv)
    return start_rank(replace(command, argv=words), *others)


if __name__ == "__main__":
    local._start_rank = functools.partial(_with_fault, local._start_rank)
    sys.exit(main())
