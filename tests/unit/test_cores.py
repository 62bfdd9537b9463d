"""How many cores there are, and how many of them are this process's."""

import os

import pytest

from doccls.run.cores import count_cores, count_own_cores


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert count_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert count_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores() == 1


@pytest.mark.parametrize(
    ("environment", "own"),
    [({}, 12), ({"LOCAL_WORLD_SIZE": "4"}, 3), ({"LOCAL_WORLD_SIZE": "16"}, 1),
     ({"DOCCLS_CORES": "5", "LOCAL_WORLD_SIZE": "4"}, 5), ({"DOCCLS_CORES": "0"}, 1)],
)  # fmt: skip
def test_a_processs_own_are_told_or_shared(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], own: int
) -> None:
    monkeypatch.setattr("doccls.run.cores.count_cores", lambda: 12)
    assert count_own_cores(environment) == own
