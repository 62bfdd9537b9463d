"""Slots: the right devices for every combination of options, and no device in too many slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pynvml
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from doccls.config import Config
from doccls.errors import UserError
from launcher import placement
from launcher.devices import Device, list_cpus
from launcher.parser import build_parser
from launcher.placement import choose_slots
from launcher.plan import Slot, assign_slots, make_slots

MakeConfig = Callable[..., Config]
UUIDS = [f"GPU-{digit * 8}" for digit in "abcdefgh"]
# CUDA_VISIBLE_DEVICES -> the visible GPUs of eight, in order
VISIBLE = {
    None: [0, 1, 2, 3, 4, 5, 6, 7],
    "": [],
    "-1": [],
    "6": [6],
    "0,1,2,3": [0, 1, 2, 3],
    "7,3,5": [7, 3, 5],
    "1,-1,2": [1],
    f"{UUIDS[4]},GPU-b, 0": [4, 1, 0],
    "7,6,5,4,3,2,1,0": [7, 6, 5, 4, 3, 2, 1, 0],
}


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake a driver with eight GPUs, and unset CUDA_VISIBLE_DEVICES."""
    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 8,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: UUIDS[handle],
        "nvmlDeviceGetName": lambda handle: "NVIDIA H100",
    }.items():
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake a machine without driver and with four cores, and unset CUDA_VISIBLE_DEVICES."""

    def fail() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setattr(placement, "count_cores", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def choose(config: Config, *args: str) -> tuple[Slot, ...]:
    """Return the slots of `doccls-launch run --config c.yaml <args>`."""
    return choose_slots(build_parser().parse_args(["run", "--config", "c.yaml", *args]), config).slots


def list_uuids(slots: Sequence[Slot]) -> list[list[str | None]]:
    return [[device.uuid for device in slot.devices] for slot in slots]


def expect_slots(gpus: Sequence[int], ranks: int, packing: int) -> list[list[str]]:
    """Compute the expected slots independently: all groups of GPUs, repeated for each fold that shares a GPU."""
    groups = []
    remaining = list(gpus)
    while len(remaining) >= ranks:
        group, remaining = remaining[:ranks], remaining[ranks:]
        groups.append([UUIDS[number] for number in group])
    return [group for _ in range(packing) for group in groups]


# --- GPUs -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("packing", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("visible", VISIBLE)
def test_slots_have_the_right_gpus_for_every_combination(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig, visible: str | None, ranks: int, packing: int
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    args = ["--gpus-per-fold", str(ranks), "--folds-per-gpu", str(packing)]
    expected = expect_slots(VISIBLE[visible], ranks, packing)
    if not expected:
        available = f"there are {len(VISIBLE[visible])}" if VISIBLE[visible] else "no GPU is visible"
        with pytest.raises(UserError, match=available):
            choose(make_config(), *args)
        return
    slots = choose(make_config(), *args)
    assert list_uuids(slots) == expected
    assert [slot.number for slot in slots] == list(range(len(expected)))


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("wanted", "gpus"), [("0,1,2", [0, 1, 2]), ("7,0", [7, 0]), (f"5,{UUIDS[2]}", [5, 2]), ("3", [3])]
)
@pytest.mark.parametrize(("ranks", "packing"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)])
def test_slots_use_only_the_wanted_gpus(
    make_config: MakeConfig, wanted: str, gpus: list[int], ranks: int, packing: int
) -> None:
    args = ["--gpus", wanted, "--gpus-per-fold", str(ranks), "--folds-per-gpu", str(packing)]
    expected = expect_slots(gpus, ranks, packing)
    if not expected:
        with pytest.raises(UserError, match=f"takes {ranks} devices, and there are {len(gpus)}: gpu"):
            choose(make_config(), *args)
        return
    assert list_uuids(choose(make_config(), *args)) == expected


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("args", [["--gpus", "8"], ["--gpus", "0,0"], ["--gpus-per-fold", "9"], ["--gpus", "-1"]])
def test_more_gpus_than_available_are_rejected(make_config: MakeConfig, args: list[str]) -> None:
    with pytest.raises(UserError):
        choose(make_config(), *args)


@pytest.mark.usefixtures("eight_gpus")
def test_gpu_in_exclusive_mode_is_not_shared(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    mode = pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeMode", lambda handle: mode if handle == 1 else 0)
    assert len(choose(make_config())) == 8
    assert len(choose(make_config(), "--gpus", "0,2", "--folds-per-gpu", "2")) == 4
    with pytest.raises(UserError, match=r"--folds-per-gpu 2: the compute mode of gpu 1 allows one process"):
        choose(make_config(), "--folds-per-gpu", "2")


@pytest.mark.usefixtures("eight_gpus")
def test_busy_gpus_are_used_or_excluded(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    held = {handle: (10 if handle < 6 else 0) * 2**30 for handle in range(8)}
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=held[handle], total=80 * 2**30)
    )
    assert list_uuids(choose(make_config())) == [[uuid] for uuid in UUIDS]
    assert list_uuids(choose(make_config(), "--exclude-busy")) == [[UUIDS[6]], [UUIDS[7]]]
    with pytest.raises(UserError, match=r"gpu 1 is not used: other processes hold 10.0 of its 80.0 GiB of memory: "):
        choose(make_config(), "--gpus", "1", "--exclude-busy")


def test_driver_is_not_queried_if_no_gpu_is_meant(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    def fail() -> None:
        raise pynvml.NVMLError_LibRmVersionMismatch

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert choose(make_config(), "--slots", "1")[0].name == "cpu 0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose(make_config())[0].name == "cpu 0"
    with pytest.raises(UserError, match="driver does not answer"):
        choose(make_config(), "--gpus", "0")


@pytest.mark.usefixtures("no_gpus")
def test_unsupported_gpu_is_not_replaced_by_cpus(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    monkeypatch.setattr(placement, "find_other_accelerator", lambda: "this machine has an AMD GPU")
    with pytest.raises(
        UserError, match=r"this machine has an AMD GPU, but doccls-launch supports only NVIDIA GPUs and CPUs"
    ):
        choose(make_config())
    assert choose(make_config(), "--slots", "2")[1].name == "cpu 1"


@pytest.mark.usefixtures("eight_gpus")
def test_hidden_gpu_is_rejected(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="gpu 2 not visible"):
        choose(make_config(), "--gpus", "1,2")


@pytest.mark.usefixtures("eight_gpus")
def test_num_processes_sets_gpus_per_fold(make_config: MakeConfig) -> None:
    config = make_config(train={"num_processes": 4})
    assert list_uuids(choose(config)) == [UUIDS[:4], UUIDS[4:]]
    assert choose(config, "--gpus-per-fold", "4") == choose(config)
    with pytest.raises(UserError, match=r"--gpus-per-fold 2, but train\.num_processes = 4"):
        choose(config, "--gpus-per-fold", "2")
    with pytest.raises(UserError, match="one fold takes 4 devices, and there are 3: gpu 0, gpu 1, gpu 2"):
        choose(config, "--gpus", "0,1,2")


@pytest.mark.usefixtures("eight_gpus")
def test_batch_smaller_than_ranks_is_rejected(make_config: MakeConfig) -> None:
    config = make_config(train={"batch_size": 3})
    assert len(choose(config, "--gpus-per-fold", "3")) == 2
    with pytest.raises(UserError, match=r"train\.batch_size = 3 is too small for 4 processes"):
        choose(config, "--gpus-per-fold", "4")


# --- CPUs -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eight_gpus")
def test_cpu_slots_ignore_gpus(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "what")  # invalid, but never read
    assert [slot.name for slot in choose(make_config(), "--slots", "3")] == ["cpu 0", "cpu 1", "cpu 2"]


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("args", [["--gpus", "0"], ["--gpus-per-fold", "1"], ["--folds-per-gpu", "2"]])
def test_cpu_slots_with_gpu_options_are_rejected(make_config: MakeConfig, args: list[str]) -> None:
    with pytest.raises(UserError, match="--slots trains on CPUs"):
        choose(make_config(), "--slots", "2", *args)


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize(
    ("train", "args", "names"),
    [
        ({"cpu_threads": 1}, [], ["cpu 0", "cpu 1", "cpu 2", "cpu 3"]),
        ({"cpu_threads": 2}, [], ["cpu 0", "cpu 1"]),
        ({"cpu_threads": 3}, [], ["cpu 0"]),
        ({"cpu_threads": 64}, [], ["cpu 0"]),
        ({"cpu_threads": 64}, ["--slots", "2"], ["cpu 0", "cpu 1"]),
        ({"cpu_threads": 1, "num_processes": 2}, [], ["cpu 0,1", "cpu 2,3"]),
        ({"cpu_threads": 4, "num_processes": 2}, [], ["cpu 0,1"]),
        ({"cpu_threads": 1, "num_processes": 2}, ["--slots", "5"], ["cpu 0,1", "cpu 2,3"]),
    ],
)
def test_cpu_slots_fit_the_cores_or_the_options(
    make_config: MakeConfig, train: dict[str, int], args: list[str], names: list[str]
) -> None:
    assert [slot.name for slot in choose(make_config(train=train), *args)] == names


@pytest.mark.usefixtures("no_gpus")
def test_gpu_options_without_gpus_are_rejected(make_config: MakeConfig) -> None:
    for args in (["--gpus-per-fold", "1"], ["--folds-per-gpu", "2"]):
        with pytest.raises(UserError, match="no GPU is visible"):
            choose(make_config(), *args)
    with pytest.raises(UserError, match=r"--gpus 0: '0': no such GPU \(this machine's: none\)"):
        choose(make_config(), "--gpus", "0")
    with pytest.raises(UserError, match="one fold takes 2 devices, and there are 1: cpu 0"):
        choose(make_config(train={"num_processes": 2}), "--slots", "1")


# --- any devices ------------------------------------------------------------------------------------------------------


def test_slot_is_named_after_its_devices() -> None:
    assert Slot(0, (Device("gpu 3", "GPU-x"),)).name == "gpu 3"
    assert Slot(5, (Device("gpu 0", "GPU-x"), Device("gpu 12", "GPU-y"))).name == "gpu 0,12"
    assert Slot(1, tuple(list_cpus(2))).name == "cpu 0,1"


@given(st.integers(0, 70), st.integers(1, 9), st.integers(1, 5))
def test_each_device_is_in_as_many_slots_as_may_share_it(count: int, ranks: int, packing: int) -> None:
    assume(count >= ranks)
    devices = list_cpus(count)
    slots = make_slots(devices, ranks, packing)
    assert all(len(set(slot.devices)) == len(slot.devices) == ranks for slot in slots)
    uses = Counter(device for slot in slots for device in slot.devices)
    assert set(uses.values()) == {packing}
    assert count - len(uses) < ranks
    assert [slot.number for slot in slots] == list(range(len(slots)))
    first = slots[: count // ranks]  # each group once, before any is shared
    assert len({slot.devices for slot in first}) == len(first)
    for slot in slots:  # two slots share all devices or none
        for other in first:
            assert slot.devices == other.devices or not set(slot.devices) & set(other.devices)


@given(st.integers(0, 8), st.integers(1, 9))
def test_fewer_devices_than_a_fold_needs_are_rejected(count: int, ranks: int) -> None:
    assume(count < ranks)
    with pytest.raises(UserError, match=f"takes {ranks} devices, and there are {count}: "):
        make_slots(list_cpus(count), ranks)


def test_mig_devices_are_named_once() -> None:
    mig_devices = [Device(name, name, "MIG") for name in ("MIG-a", "MIG-b")]
    assert make_slots(mig_devices, 1)[0].name == "MIG-a" and make_slots(mig_devices, 2)[0].name == "MIG-a,MIG-b"


# --- assignment -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0.1, 50), st.booleans()), max_size=24),
    st.integers(1, 8), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
def test_simulated_launch_with_random_failures(
    folds: list[tuple[float, bool]], count: int, ranks: int, packing: int
) -> None:
    """Run folds (time, fails) through the launcher's own assignment, with a simulated clock."""
    assume(count >= ranks)
    slots = make_slots(list_cpus(count), ranks, packing)
    waiting = list(range(len(folds)))
    running: dict[int, tuple[float, Slot]] = {}
    started: list[int] = []
    ended: list[int] = []
    now = 0.0
    while waiting or running:
        for fold, slot in assign_slots(waiting, [slot for _, slot in running.values()], slots):
            waiting.remove(fold)
            started.append(fold)
            running[fold] = (now + folds[fold][0], slot)
        uses = Counter(device for _, slot in running.values() for device in slot.devices)
        assert all(number <= packing for number in uses.values())
        assert len({slot.number for _, slot in running.values()}) == len(running)
        assert len(running) == min(len(slots), len(running) + len(waiting)), "no slot is free while a fold waits"
        first = min(running, key=lambda fold: (running[fold][0], fold))
        now = running.pop(first)[0]
        ended.append(first)  # failed or not, its slot is free and the other folds continue
    assert started == list(range(len(folds))), "in order, each once"
    assert sorted(ended) == started
    times = [time for time, _ in folds]
    bound = sum(times) / len(slots) + (1 - 1 / len(slots)) * max(times, default=0.0)
    assert now <= bound * (1 + 1e-9)


def test_fold_takes_the_least_shared_devices() -> None:
    slots = make_slots(list_cpus(2), 1, 2)  # cpu 0, cpu 1, cpu 0, cpu 1
    (start,) = assign_slots([7], [slots[0], slots[2]], slots)
    assert start == (7, slots[1])
    assert assign_slots([], [], slots) == [] and assign_slots([1], slots, slots) == []
