"""The cost of a command: wall time, and the CPU time and peak memory of all its processes."""

import ctypes
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.2
_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Cost:
    """The cost and output of one run of a command."""

    wall_s: float
    cpu_s: float  # user and system time of the command and all its descendants
    memory_mib: float  # peak of their summed PSS: shared pages are divided among the processes that share them
    output: str


def adopt_orphans() -> None:
    """Adopt orphaned descendants (loader workers of a fork server), so that their CPU time is counted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> Cost:
    """Run the command in `folder` and measure it; this process must run no other command meanwhile.

    Raises:
        RuntimeError: The command failed; the message ends with its last lines.
    """
    earlier_children, started_s, before_s = psutil.Process().children(), time.perf_counter(), _measure_cpu_s()
    peak_bytes = 0
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _measure_memory_bytes(process.pid))
            if time.perf_counter() - started_s > _TIMEOUT_S:
                process.kill()
            time.sleep(_POLL_S)
    _reap_orphans(earlier_children)
    wall_s = time.perf_counter() - started_s
    output = log.read_text(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{output[-3000:]}")
    return Cost(wall_s, _measure_cpu_s() - before_s, peak_bytes / 2**20, output)


def _measure_cpu_s() -> float:
    """Return the CPU time of all children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _measure_memory_bytes(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        return 0  # a process has just ended
    return total


def _reap_orphans(earlier: Sequence[psutil.Process]) -> None:
    """Wait for all children but `earlier`, so that the CPU time of orphans is counted."""
    for orphan in psutil.Process().children():
        if orphan not in earlier:
            orphan.wait(_TIMEOUT_S)
