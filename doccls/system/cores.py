"""The number of CPU cores, and the share of one process."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from doccls.system.variables import parse_whole_number

# Environment variable: the number of processes that share this machine's cores and shared memory. `launcher` sets it.
PROCESSES_HERE = "DOCCLS_PROCESSES_HERE"
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def count_cores() -> int:
    """Return the cores this process may use by its affinity and its container's quota (docker --cpus, Kubernetes)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([float(allowed), *_read_quotas(_CGROUPS, _OWN_CGROUPS)])))


def count_own_cores(environment: Mapping[str, str]) -> int:
    """Return this process's share of the cores, at least 1."""
    return max(1, count_cores() // count_sharing_processes(environment))


def count_sharing_processes(environment: Mapping[str, str]) -> int:
    """Return how many processes share this machine, including this one: the launcher's count, or the fold's ranks."""
    ranks = parse_whole_number(environment, "LOCAL_WORLD_SIZE", 1)
    return max(1, parse_whole_number(environment, PROCESSES_HERE, ranks))


def _read_quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's control groups and their ancestors; cgroup v2 and v1."""
    with suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            group = PurePosixPath(name.lstrip("/"))
            for folder in (group, *group.parents):
                if not controllers:
                    quota, _, period = _read(cgroups / folder / "cpu.max").partition(" ")
                elif "cpu" in controllers.split(","):
                    cpu_dir = cgroups / "cpu" / folder  # a link that exists under any mount order, as for `cpuacct,cpu`
                    quota, period = _read(cpu_dir / "cpu.cfs_quota_us"), _read(cpu_dir / "cpu.cfs_period_us")
                else:
                    continue
                if quota.isdecimal() and period.isdecimal() and int(period):  # `max` and -1 mean no quota
                    yield int(quota) / int(period)


def _read(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="ascii").strip()
    return ""
