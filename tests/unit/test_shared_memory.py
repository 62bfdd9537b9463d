"""The loader plan: the number of workers, and the prefetched batches that fit into shared memory."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from doccls.data import shared_memory
from doccls.data.shared_memory import LoaderPlan, choose_workers, expects_workers, fit_prefetch, plan_loader
from doccls.errors import RankLocalError

BATCH = 32 * 300 * 300 * 3
MIB = 2**20
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free_mib", "num_workers", "batches"), [(64, 2, 2), (64, 1, 4), (64, 8, 0), (1024, 2, 4), (512, 16, 3), (24, 1, 0)]
)
def test_prefetched_batches_fit(free_mib: int, num_workers: int, batches: int) -> None:
    assert fit_prefetch(free_mib * MIB, BATCH, num_workers) == batches
    assert (batches * num_workers + 2) * BATCH <= free_mib * MIB or batches == 0


Shm = Callable[[int], None]


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shm:
    """Return `shm(bytes)`, which sets the size of a /dev/shm that is entirely free."""
    monkeypatch.setattr(shared_memory, "_SHM", tmp_path)

    def act(free: int) -> None:
        monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: Usage(free, 0, free))

    return act


@pytest.fixture
def docker(shm: Shm) -> None:
    """Set the size of /dev/shm to the default of `docker run`."""
    shm(64 * MIB)


@pytest.mark.usefixtures("docker")
def test_prefetch_is_reduced_to_fit_with_remark() -> None:
    planned = plan_loader(2, BATCH, True, True, environment={})
    (remark,) = planned.remarks
    assert planned.prefetch == 2
    assert remark.startswith(
        "/dev/shm has 64 MiB free of 64 MiB: workers prefetch 2 batches instead of 4 (enlarge /dev/shm: "
    )
    assert plan_loader(1, BATCH, True, True, environment={}) == LoaderPlan(1, 4)


@pytest.mark.usefixtures("docker")
def test_folds_on_one_host_share_its_memory() -> None:
    sharing = {"DOCCLS_PROCESSES_HERE": "4"}
    assert plan_loader(1, BATCH // 8, True, True, environment=sharing).prefetch == 4
    with pytest.raises(RankLocalError, match="needs 110 MiB"):
        plan_loader(1, BATCH, True, True, environment=sharing)


@pytest.mark.usefixtures("docker")
@pytest.mark.parametrize(("num_workers", "ranks", "needed"), [(8, "1", "92 MiB"), (1, "4", "110 MiB")])
def test_too_little_memory_is_rejected_with_the_required_size(num_workers: int, ranks: str, needed: str) -> None:
    usage = "/dev/shm has 64 MiB free of 64 MiB"
    message = f"{usage}, but data.num_workers = {num_workers} with 8438 KiB per batch needs {needed}: lower "
    with pytest.raises(RankLocalError, match=message):
        plan_loader(num_workers, BATCH, True, True, environment={"LOCAL_WORLD_SIZE": ranks})


def test_no_workers_or_systems_without_dev_shm_need_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory.sys, "platform", "darwin")
    monkeypatch.setattr(shared_memory, "_SHM", Path("/nowhere/at/all"))
    assert plan_loader(8, BATCH, True, True, environment={}) == LoaderPlan(8, 4)
    assert plan_loader(0, BATCH, True, True, environment={}) == LoaderPlan(0, 4)
    assert shared_memory.describe_shared_memory() == "lower data.num_workers"


# --- how many workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "on_gpu", "stored", "workers"),
    [(16, True, True, 8), (16, True, False, 8), (4, True, True, 3), (1, True, True, 1), (0, True, True, 1),
     (16, False, True, 0), (16, False, False, 2), (1, False, False, 1), (0, False, False, 1)],
)  # fmt: skip
def test_workers_are_chosen_only_where_useful(cores: int, on_gpu: bool, stored: bool, workers: int) -> None:
    assert choose_workers(cores, on_gpu, stored) == workers


@pytest.mark.parametrize(("cores", "page_ms", "workers"), [(64, 2.9, 8), (64, 20.4, 21), (16, 20.4, 15), (4, 20.4, 3)])
def test_slow_pages_get_more_than_eight_workers(cores: int, page_ms: float, workers: int) -> None:
    assert choose_workers(cores, True, True, page_ms / 1000) == workers


def test_stated_workers_are_used_without_remark(shm: Shm) -> None:
    shm(2**30)
    for workers in (0, 3):
        assert plan_loader(workers, BATCH, True, True, environment={}) == LoaderPlan(workers, 4)


def test_auto_workers_are_reported_shared_among_ranks_and_fit(shm: Shm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doccls.system.cores.count_cores", lambda: 12)
    shm(2**30)
    assert plan_loader("auto", BATCH, True, True, environment={}) == LoaderPlan(
        8, 4, ("loader workers: 8 (data.num_workers: auto, 12 cores)",)
    )
    assert plan_loader("auto", BATCH, True, True, environment={"LOCAL_WORLD_SIZE": "4"}).workers == 2
    shm(int(6 * BATCH / 0.9))
    plan = plan_loader("auto", BATCH, True, True, environment={})
    assert (plan.workers, plan.prefetch) == (3, 1) and "workers prefetch 1 batches instead of 4" in plan.remarks[1]
    shm(BATCH)
    assert plan_loader("auto", BATCH, True, True, environment={}) == LoaderPlan(
        0, 4, ("loader workers: 0 (data.num_workers: auto, 12 cores)",)
    )
    assert plan_loader("auto", BATCH, False, True, environment={}).workers == 0


def test_workers_are_expected_with_a_gpu_or_without_a_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for gpu in (False, True):
        monkeypatch.setattr(shared_memory, "_GPU", tmp_path if gpu else tmp_path / "nowhere")
        assert [expects_workers("auto", stored) for stored in (True, False)] == [gpu, True]
        assert [expects_workers(workers, True) for workers in (0, 2)] == [False, True]


@pytest.mark.parametrize("obstacle", ["this machine has no /dev/shm", "/dev/shm can't be written to"])
def test_without_shared_memory_there_are_no_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, obstacle: str
) -> None:
    monkeypatch.setattr(shared_memory.sys, "platform", "linux")
    if "no /dev/shm" in obstacle:
        monkeypatch.setattr(shared_memory, "_SHM", tmp_path / "missing")
    monkeypatch.setattr(shared_memory.os, "access", lambda path, mode: False)
    planned = plan_loader("auto", BATCH, True, True, environment={})
    assert planned.workers == 0 and planned.remarks[0].startswith(f"loader workers: 0, since {obstacle} (provide it: ")
    assert plan_loader(0, BATCH, True, True, environment={}) == LoaderPlan(0, 4)
    with pytest.raises(RankLocalError, match=rf"^{obstacle}, but data.num_workers = 2: set it to 0 or auto, or "):
        plan_loader(2, BATCH, True, True, environment={})
