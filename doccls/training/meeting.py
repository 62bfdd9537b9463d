"""The rendezvous of the ranks at MASTER_ADDR and MASTER_PORT, which says for whom it waits.

torch's own waits in silence until its timeout if some of the processes were never started.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, and not in its __all__

from doccls.errors import PortTakenError, UserError

_PATIENCE_S = 20.0  # machines of one job start seconds apart
_POLL_S = 0.05
_MAX_LISTED = 8
_ADDRESS_IN_USE = "address already in use"


class MeetingError(UserError):
    """The processes of a group did not find each other."""


@dataclass(frozen=True)
class MeetingPoint:
    """Where the ranks of a group meet."""

    rank: int
    world_size: int
    host: str
    port: int
    has_agent: bool = False  # torchrun's agent listens there, not rank 0
    attempt: str = "0"  # number of torchrun's restart

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "MeetingPoint":
        """Read the variables that `doccls.system.rank.check_group_variables` has checked."""
        return cls(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def __str__(self) -> str:
        return f"{self.host}:{self.port} (MASTER_ADDR, MASTER_PORT)"


def meet(point: MeetingPoint, timeout: timedelta, say: Callable[[str], None], patience_s: float = _PATIENCE_S) -> Store:
    """Wait until all ranks have arrived, and return the store through which they form their group. All ranks must call.

    After `patience_s` the ranks that know more than that rank 0 is there `say` once for whom they wait.

    Raises:
        PortTakenError: another process listens at the port.
        MeetingError: some did not arrive before the timeout; says which.
    """
    start_s = time.monotonic()
    others = [rank for rank in range(point.world_size) if rank != point.rank]
    missing = [0]  # at first an answer at the address, which even rank 0 does not get if it is another machine's
    has_arrived = False

    def remind() -> None:
        if missing and (point.rank == 0 or not has_arrived):
            times = f"{patience_s:.0f} s so far, at most {timeout.total_seconds():.0f} s"
            say(f"[WARNING] {_describe_wait(point, missing, times)}")

    reminder = threading.Timer(patience_s, remind)
    reminder.daemon = True
    reminder.start()
    try:
        store = PrefixStore(f"doccls/{point.attempt}", _connect(point, timeout))
        has_arrived, missing = True, others
        store.set(_name_key(point.rank), "")
        while missing := [rank for rank in missing if not store.check([_name_key(rank)])]:
            if time.monotonic() - start_s > timeout.total_seconds():
                raise MeetingError(_describe_wait(point, missing, f"given up after {timeout.total_seconds():.0f} s"))
            time.sleep(_POLL_S)
    except RuntimeError as error:  # torch.distributed.DistError: the store is gone
        raise MeetingError(_describe_wait(point, missing, "given up, since rank 0 has ended")) from error
    finally:
        reminder.cancel()
    return store


def _connect(point: MeetingPoint, timeout: timedelta) -> TCPStore:
    listens = point.rank == 0 and not point.has_agent
    try:
        return TCPStore(point.host, point.port, point.world_size, listens, timeout, wait_for_workers=False)
    except RuntimeError as error:  # torch.distributed.DistNetworkError, or what older versions of torch raised
        reason = str(error).partition("\n")[0].rstrip(".")
        if _ADDRESS_IN_USE in str(error).lower():
            raise PortTakenError(
                f"MASTER_PORT={point.port} on {socket.gethostname()} is in use by another process: choose another port "
                "(accelerate launch --main_process_port PORT)"
            ) from error
        raise MeetingError(_describe_wait(point, [0], f"given up, {reason}")) from error


def _describe_wait(point: MeetingPoint, missing: list[int], outcome: str) -> str:
    listed = ", ".join(map(str, missing[:_MAX_LISTED])) + ", ..." * (len(missing) > _MAX_LISTED)
    whom = "itself" if missing == [point.rank] else f"rank{'s' if len(missing) > 1 else ''} {listed}"
    return (
        f"rank {point.rank} of {point.world_size} (process {os.getpid()} on {socket.gethostname()}) waits for {whom} "
        f"at {point}: {outcome}. Was each process of the group started, and can it reach that address?"
    )


def _name_key(rank: int) -> str:
    return f"rank{rank}"
