"""How many batches ahead have room in shared memory."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from doccls.data import shared_memory as room
from doccls.data.shared_memory import LoaderPlan, choose_workers, expects_workers, fit_prefetch, plan_loader
from doccls.errors import RankLocalError

BATCH = 32 * 300 * 300 * 3
MIB = 2**20
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free_mib", "num_workers", "batches"), [(64, 2, 2), (64, 1, 4), (64, 8, 0), (1024, 2, 4), (512, 16, 3), (24, 1, 0)]
)
def test_what_is_made_ahead_has_room(free_mib: int, num_workers: int, batches: int) -> None:
    assert fit_prefetch(free_mib * MIB, BATCH, num_workers) == batches
    assert (batches * num_workers + 2) * BATCH <= free_mib * MIB or batches == 0


Shm = Callable[[int], None]


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shm:
    """`shm(bytes)`: so much of /dev/shm is free."""
    monkeypatch.setattr(room, "_SHM", tmp_path)

    def act(free: int) -> None:
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Usage(free, 0, free))

    return act


@pytest.fixture
def docker(shm: Shm) -> None:
    """/dev/shm as `docker run` gives it."""
    shm(64 * MIB)


@pytest.mark.usefixtures("docker")
def test_it_is_made_to_fit_and_said() -> None:
    planned = plan_loader(2, BATCH, True, True, environment={})
    (remark,) = planned.remarks
    assert planned.prefetch == 2
    assert remark.startswith(
        "/dev/shm has 64 MiB free of 64 MiB: workers prefetch 2 batches instead of 4 (enlarge /dev/shm: "
    )
    assert plan_loader(1, BATCH, True, True, environment={}) == LoaderPlan(1, 4)


@pytest.mark.usefixtures("docker")
def test_four_folds_of_a_machine_share_its_room() -> None:
    sharing = {"DOCCLS_PROCESSES_HERE": "4"}
    assert plan_loader(1, BATCH // 8, True, True, environment=sharing).prefetch == 4
    with pytest.raises(RankLocalError, match="needs 110 MiB"):
        plan_loader(1, BATCH, True, True, environment=sharing)


@pytest.mark.usefixtures("docker")
@pytest.mark.parametrize(("num_workers", "ranks", "needed"), [(8, "1", "92 MiB"), (1, "4", "110 MiB")])
def test_too_little_for_one_is_refused_with_what_is_needed(num_workers: int, ranks: str, needed: str) -> None:
    usage = "/dev/shm has 64 MiB free of 64 MiB"
    message = f"{usage}, but data.num_workers = {num_workers} with 8438 KiB per batch needs {needed}: lower "
    with pytest.raises(RankLocalError, match=message):
        plan_loader(num_workers, BATCH, True, True, environment={"LOCAL_WORLD_SIZE": ranks})


def test_no_worker_needs_none_and_elsewhere_there_is_no_such_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SHM", Path("/nowhere/at/all"))
    assert plan_loader(8, BATCH, True, True, environment={}) == LoaderPlan(8, 4)
    assert plan_loader(0, BATCH, True, True, environment={}) == LoaderPlan(0, 4)
    assert room.describe_shared_memory() == "lower data.num_workers"


# --- how many workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "on_gpu", "stored", "workers"),
    [(16, True, True, 8), (16, True, False, 8), (4, True, True, 3), (1, True, True, 1), (0, True, True, 1),
     (16, False, True, 0), (16, False, False, 2), (1, False, False, 1), (0, False, False, 1)],
)  # fmt: skip
def test_workers_only_where_they_pay(cores: int, on_gpu: bool, stored: bool, workers: int) -> None:
    assert choose_workers(cores, on_gpu, stored) == workers


@pytest.mark.parametrize(("cores", "page_ms", "workers"), [(64, 2.9, 8), (64, 20.4, 21), (16, 20.4, 15), (4, 20.4, 3)])
def test_slow_pages_get_more_workers_than_eight(cores: int, page_ms: float, workers: int) -> None:
    assert choose_workers(cores, True, True, page_ms / 1000) == workers


def test_what_is_stated_is_taken_without_a_word(shm: Shm) -> None:
    shm(2**30)
    for workers in (0, 3):
        assert plan_loader(workers, BATCH, True, True, environment={}) == LoaderPlan(workers, 4)


def test_what_is_chosen_is_told_shared_among_the_machines_ranks_and_fits(
    shm: Shm, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_the_worker_server_is_started_early_where_workers_are_likely(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for gpu in (False, True):
        monkeypatch.setattr(room, "_GPU", tmp_path if gpu else tmp_path / "nowhere")
        assert [expects_workers("auto", stored) for stored in (True, False)] == [gpu, True]
        assert [expects_workers(workers, True) for workers in (0, 2)] == [False, True]
