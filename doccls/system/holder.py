"""A process as it describes itself to others that share its files, on this machine or another one."""

import json
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from doccls.system.lifeline import LAUNCHED

_TOKEN = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as it describes itself."""

    what: str  # such as `run v001-abc is being launched`
    pid: int
    host: str
    since: str
    boot: str  # the machine's boot ID; empty where the system has none
    namespace: str  # the PID namespace: each container has its own
    started: str  # start time of the process, since another process may get its PID later
    token: str  # ID of this acquisition, 16 hexadecimal digits
    launch: str = ""  # ID of the launch (`doccls.system.lifeline.LAUNCHED`); empty for a process started by hand

    def __str__(self) -> str:
        return f"{self.what} by process {self.pid} on {self.host} since {self.since}"


def describe_self(what: str) -> Holder:
    """Describe this process as one that does `what`, with a new token."""
    return Holder(
        what=what,
        pid=os.getpid(),
        host=socket.gethostname(),
        since=datetime.now().isoformat(timespec="seconds"),
        boot=_read_boot(),
        namespace=_read_namespace(),
        started=read_start(os.getpid()) or "",
        token=secrets.token_hex(8),
        launch=os.environ.get(LAUNCHED, ""),
    )


def is_visible(holder: Holder) -> bool:
    """Return whether the holder is on this machine and in this PID namespace, so that its PID is valid here."""
    here = (socket.gethostname(), _read_boot(), _read_namespace())
    return (holder.host, holder.boot, holder.namespace) == here


def render_holder(holder: Holder) -> bytes:
    """Return the content of a file that names the holder."""
    return json.dumps(asdict(holder)).encode()


def parse_holder(text: bytes) -> Holder | None:
    """Return the holder that a file names; None if it is not complete."""
    with suppress(ValueError, TypeError):
        holder = Holder(**json.loads(text))
        if _TOKEN.fullmatch(holder.token):  # it becomes part of a file name
            return holder
    return None


def _read_boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _read_namespace() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def read_start(pid: int) -> str | None:
    """Return the start time of a process on this machine as a stable string; None if there is no such process.

    Empty where the system hides it, as for another user's process if /proc is mounted with hidepid.
    """
    try:
        if os.name == "posix":
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        # In clock ticks since boot, which setting the clock does not change: proc(5). A zombie holds nothing.
        return None if fields[0] in "ZX" else fields[19]
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return "" if os.name == "posix" else None
