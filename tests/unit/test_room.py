"""How many batches ahead have room in shared memory."""

from collections import namedtuple
from pathlib import Path

import pytest

from doccls.data import room
from doccls.data.room import fit_prefetch, plan_prefetch
from doccls.errors import OwnError

BATCH = 32 * 300 * 300 * 3
MIB = 2**20
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free_mib", "num_workers", "batches"), [(64, 2, 2), (64, 1, 4), (64, 8, 0), (1024, 2, 4), (512, 16, 3), (24, 1, 0)]
)
def test_what_is_made_ahead_has_room(free_mib: int, num_workers: int, batches: int) -> None:
    assert fit_prefetch(free_mib * MIB, BATCH, num_workers) == batches
    assert (batches * num_workers + 2) * BATCH <= free_mib * MIB or batches == 0


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """/dev/shm as `docker run` gives it."""
    monkeypatch.setattr(room, "_SHM", tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Usage(64 * MIB, 0, 64 * MIB))


@pytest.mark.usefixtures("docker")
def test_it_is_made_to_fit_and_said() -> None:
    planned = plan_prefetch(BATCH, 2, {})
    assert planned.batches == 2 and planned.remark is not None
    assert planned.remark.startswith(
        "/dev/shm has 64 MiB free of 64 MiB: workers prefetch 2 batches, not 4 (more room: "
    )
    assert plan_prefetch(BATCH, 1, {}) == room.Prefetch(4)


@pytest.mark.usefixtures("docker")
@pytest.mark.parametrize(("num_workers", "ranks", "needed"), [(8, "1", "92 MiB"), (1, "4", "110 MiB")])
def test_too_little_for_one_is_refused_with_what_is_needed(num_workers: int, ranks: str, needed: str) -> None:
    """The processes of a machine share the room."""
    told = (
        rf"/dev/shm has 64 MiB free of 64 MiB, and data.num_workers = {num_workers} with 8438 KiB a batch need {needed}"
    )
    with pytest.raises(OwnError, match=told):
        plan_prefetch(BATCH, num_workers, {"LOCAL_WORLD_SIZE": ranks})


def test_no_worker_needs_none_and_elsewhere_there_is_no_such_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SHM", Path("/nowhere/at/all"))
    assert plan_prefetch(BATCH, 8, {}) == plan_prefetch(BATCH, 0, {}) == room.Prefetch(4)
    assert room.describe_room() == "fewer data.num_workers"
