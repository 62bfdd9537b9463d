"""What a command costs: wall time, the CPU time of all that it starts, and the most memory that these hold at once."""

import ctypes
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.2
_LIMIT_S = 1800.0


@dataclass(frozen=True)
class Cost:
    """Of one run of a command."""

    wall_s: float
    cpu_s: float
    """User and system, of the command and all its descendants."""
    memory_mib: float
    """The most that they held at once, shared pages divided among those who share them (PSS)."""
    output: str


def adopt_orphans() -> None:
    """Grandchildren whose parents are gone (loader workers of a fork server) become ours: their CPU time is seen."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> Cost:
    """Run the command in `folder` to its end; nothing else of ours may run.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    own, started_s, before_s, most = psutil.Process().children(), time.perf_counter(), _count_cpu(), 0
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            most = max(most, _count_memory(process.pid))
            if time.perf_counter() - started_s > _LIMIT_S:
                process.kill()
            time.sleep(_LOOK_S)
    _reap_orphans(own)
    wall_s = time.perf_counter() - started_s
    output = log.read_text(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{output[-3000:]}")
    return Cost(wall_s, _count_cpu() - before_s, most / 2**20, output)


def _count_cpu() -> float:
    """Of all children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _count_memory(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.Error:
        return 0  # one has just ended
    return total


def _reap_orphans(own: Sequence[psutil.Process]) -> None:
    """Wait for the end of those that we were left, so that their time is counted; `own` were ours before."""
    for orphan in psutil.Process().children():
        if orphan not in own:
            orphan.wait(_LIMIT_S)
