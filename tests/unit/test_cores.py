"""The number of usable cores, and the share of one process."""

import os
from pathlib import Path

import pytest

from doccls.system.cores import count_cores, count_own_cores


def test_only_cores_of_this_process_affinity_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert count_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert count_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores() == 1


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/kube/pod\n", {"kube/cpu.max": "350000 100000\n", "kube/pod/cpu.max": "max 100000\n"}, 3),
        ("0::/kube/pod\n", {"kube/cpu.max": "900000 100000\n", "kube/pod/cpu.max": "50000 100000\n"}, 1),
        (
            "12:memory:/docker\n4:cpuacct,cpu:/docker\n",  # the order of this mount differs between systems
            {"cpu/docker/cpu.cfs_quota_us": "200000\n", "cpu/docker/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/gone\n", {}, 8),
        (None, {}, 8),
    ],
)
def test_container_quota_limits_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str | None, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("doccls.system.cores._CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("doccls.system.cores._OWN_CGROUPS", tmp_path / "own")
    if own is not None:
        (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    assert count_cores() == cores


@pytest.mark.parametrize(
    ("environment", "cores"),
    [({}, 12), ({"LOCAL_WORLD_SIZE": "4"}, 3), ({"LOCAL_WORLD_SIZE": "16"}, 1),
     ({"DOCCLS_PROCESSES_HERE": "6", "LOCAL_WORLD_SIZE": "2"}, 2), ({"DOCCLS_PROCESSES_HERE": "0"}, 12)],
)  # fmt: skip
def test_share_of_cores_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr("doccls.system.cores.count_cores", lambda: 12)
    assert count_own_cores(environment) == cores
