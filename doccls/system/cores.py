"""The processor's cores, and a process's share of its machine."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

PROCESSES_HERE = "DOCCLS_PROCESSES_HERE"
"""Environment variable: how many processes share this machine's cores and shared memory. `launcher` sets it."""
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def count_cores() -> int:
    """That this process may use: by its affinity, and by the quota of its container (docker --cpus, Kubernetes)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([float(allowed), *_read_quotas(_CGROUPS, _OWN_CGROUPS)])))


def count_own_cores(environment: Mapping[str, str]) -> int:
    """This process's share of them."""
    return max(1, count_cores() // count_sharing(environment))


def count_sharing(environment: Mapping[str, str]) -> int:
    """Processes that share this machine, with this one: by the launcher's word, or the ranks of one fold."""
    return max(1, int(environment.get(PROCESSES_HERE) or environment.get("LOCAL_WORLD_SIZE") or 1))


def _read_quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """CPU time per time, in cores, of this process's control groups and all above them; cgroup v2 and v1."""
    with suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            group = PurePosixPath(name.lstrip("/"))
            for folder in (group, *group.parents):
                if not controllers:
                    quota, _, period = _read(cgroups / folder / "cpu.max").partition(" ")
                elif "cpu" in controllers.split(","):
                    place = cgroups / "cpu" / folder  # a link, whatever else is mounted with it, in which order
                    quota, period = _read(place / "cpu.cfs_quota_us"), _read(place / "cpu.cfs_period_us")
                else:
                    continue
                if quota.isdecimal() and period.isdecimal() and int(period):  # `max` and -1 are none
                    yield int(quota) / int(period)


def _read(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="ascii").strip()
    return ""
