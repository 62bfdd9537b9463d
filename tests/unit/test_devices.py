"""Devices: NVML's list, selection by CUDA_VISIBLE_DEVICES and --gpus, and the environment of a process."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from doccls.errors import UserError
from launcher import devices
from launcher.devices import (
    Device,
    check_mig,
    choose_gpus,
    find_gpus,
    find_other_accelerator,
    list_cpus,
    render_environment,
    select_usable,
)

UUIDS = [f"GPU-{digit * 4}{digit}0-aaaa" for digit in "01234567"]  # one character after `GPU-` identifies each
GPUS = [Device(f"gpu {index}", uuid, "NVIDIA H100") for index, uuid in enumerate(UUIDS)]
CPUS = list_cpus(4)


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """`calls = fake_nvml(8)` fakes a driver with 8 GPUs; `calls` lists the names of the functions called."""

    def fake(count: int) -> list[str]:
        calls: list[str] = []

        def patch(name: str, function: Callable[..., object]) -> None:
            def called(*arguments: object) -> object:
                calls.append(name)
                return function(*arguments)

            monkeypatch.setattr(pynvml, name, called)

        patch("nvmlInit", lambda: None)
        patch("nvmlShutdown", lambda: None)
        patch("nvmlDeviceGetCount", lambda: count)
        patch("nvmlDeviceGetHandleByIndex", lambda index: ("handle", index))
        patch("nvmlDeviceGetUUID", lambda handle: UUIDS[handle[1]])
        patch("nvmlDeviceGetName", lambda handle: "NVIDIA H100")
        return calls

    return fake


def fail(error: type[Exception]) -> Callable[..., object]:
    def failing(*_: object) -> object:
        raise error

    return failing


def choose(visible: str | None, wanted: str | None = None) -> list[int]:
    """Return the indices chosen from eight GPUs."""
    return [GPUS.index(device) for device in choose_gpus(GPUS, visible, wanted)]


def get_error(visible: str | None, wanted: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        choose_gpus(GPUS, visible, wanted)
    return str(caught.value)


# --- discovery --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 8])
def test_all_gpus_are_found_in_driver_order_and_nvml_is_shut_down(
    fake_nvml: Callable[[int], list[str]], count: int
) -> None:
    calls = fake_nvml(count)
    assert find_gpus() == GPUS[:count]
    assert calls[0] == "nvmlInit" and calls[-1] == "nvmlShutdown"
    assert calls.count("nvmlInit") == calls.count("nvmlShutdown") == 1


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded])
def test_no_gpus_without_driver(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", fail(error))
    monkeypatch.setattr(pynvml, "nvmlShutdown", fail(AssertionError))
    assert find_gpus() == []


def test_broken_driver_is_not_treated_as_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example after a driver update under a running kernel: the user does not want hours on the CPU."""
    monkeypatch.setattr(pynvml, "nvmlInit", fail(pynvml.NVMLError_LibRmVersionMismatch))
    with pytest.raises(UserError, match=r"driver does not answer \(.*\): nvidia-smi may say more; --slots N"):
        find_gpus()


def test_lost_gpu_is_skipped_and_rejected_if_requested(
    monkeypatch: pytest.MonkeyPatch, fake_nvml: Callable[[int], list[str]]
) -> None:
    fake_nvml(8)
    get_handle = pynvml.nvmlDeviceGetHandleByIndex

    def lose_5(index: int) -> object:
        if index == 5:
            raise pynvml.NVMLError_GpuIsLost
        return get_handle(index)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lose_5)
    found = find_gpus()
    assert [device.name for device in found] == [device.name for device in GPUS]
    assert [device for device in found if device.fault] == [Device("gpu 5", fault="GPU is lost")]
    for visible, left in ((None, [*GPUS[:5], *GPUS[6:]]), ("4,5,6", [GPUS[4], GPUS[6]])):
        assert select_usable(choose_gpus(found, visible, None), False) == (left, ["gpu 5 is not used: GPU is lost"])
    for visible in (None, "0,1,5"):
        assert choose_gpus(found, visible, "0,1") == GPUS[:2]
    assert select_usable(choose_gpus(found, "0,1", None), False) == (GPUS[:2], [])
    with pytest.raises(UserError, match=r"--gpus 5,6: gpu 5 can't be used: GPU is lost"):
        choose_gpus(found, None, "5,6")


def test_compute_mode_and_memory_are_read(
    monkeypatch: pytest.MonkeyPatch, fake_nvml: Callable[[int], list[str]]
) -> None:
    fake_nvml(5)
    modes = dict(enumerate((0, 1, 2, 3)))
    held = {0: 600, 1: 30 * 1024}

    def get_mode(handle: tuple[str, int]) -> int:
        if handle[1] not in modes:
            raise pynvml.NVMLError_NotSupported
        return modes[handle[1]]

    def get_memory(handle: tuple[str, int]) -> SimpleNamespace:
        return SimpleNamespace(used=held.get(handle[1], 0) * 2**20, total=80 * 2**30)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeMode", get_mode)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", get_memory)
    found = find_gpus()
    assert [gpu.exclusive for gpu in found] == [False, True, False, True, False]
    assert [bool(gpu.fault) for gpu in found] == [False, False, True, False, False]
    busy = "other processes hold 30.0 of its 80.0 GiB of memory"
    prohibited = "gpu 2 is not used: its compute mode is Prohibited"
    with_busy, without_busy = select_usable(found, False), select_usable(found, True)
    assert with_busy[1] == [f"gpu 1: {busy} (--exclude-busy skips such GPUs)", prohibited]
    assert without_busy[1] == [f"gpu 1 is not used: {busy}", prohibited]
    assert [gpu.name for gpu in with_busy[0]] == ["gpu 0", "gpu 1", "gpu 3", "gpu 4"]
    assert [gpu.name for gpu in without_busy[0]] == ["gpu 0", "gpu 3", "gpu 4"]


@pytest.mark.parametrize(
    ("model", "driver", "disabled"),
    [
        ("NVIDIA GeForce RTX 4090", "535.129.03", True),
        ("NVIDIA GeForce RTX 4090", "550.40.07", False),
        ("NVIDIA GeForce RTX 3090", "535.129.03", False),
    ],
)
def test_nccl_p2p_is_disabled_for_gpus_without_it(
    monkeypatch: pytest.MonkeyPatch, fake_nvml: Callable[[int], list[str]], model: str, driver: str, disabled: bool
) -> None:
    fake_nvml(2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: model)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: driver)
    gpus = find_gpus()
    variables = {"NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"}
    assert variables.intersection(render_environment(gpus, 0, 1)) == (variables if disabled else set())
    assert not variables.intersection(render_environment(gpus[:1], 0, 1))


@pytest.mark.parametrize(
    ("version", "machine", "maker"),
    [
        ("2.8.0+rocm6.4", ("linux", "x86_64"), "AMD"),
        ("2.8.0+xpu", ("linux", "x86_64"), "Intel"),
        ("2.8.0", ("darwin", "arm64"), "Apple"),
        ("2.8.0+cpu", ("linux", "x86_64"), None),
        ("2.8.0+cu128", ("linux", "x86_64"), None),
        ("2.8.0", ("darwin", "x86_64"), None),
    ],
)
def test_other_accelerator_is_found(
    monkeypatch: pytest.MonkeyPatch, version: str, machine: tuple[str, str], maker: str | None
) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: version)
    monkeypatch.setattr(sys, "platform", machine[0])
    monkeypatch.setattr(platform, "machine", lambda: machine[1])
    other = find_other_accelerator()
    assert other is None if maker is None else maker in str(other)


@pytest.mark.parametrize(
    ("vendor", "kind", "module", "refused"),
    [
        ("0x10de", "0x030200", False, True),
        ("0x10de", "0x030200", True, False),  # a container on a machine whose driver is loaded
        ("0x10de", "0x040300", False, False),  # its audio device
        ("0x8086", "0x030000", False, False),
    ],
)
def test_gpu_without_driver_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, kind: str, module: bool, refused: bool
) -> None:
    device = tmp_path / "devices" / "0000:01:00.0"
    device.mkdir(parents=True)
    (tmp_path / "devices" / "torn").mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    if module:
        (tmp_path / "nvidia").mkdir()
    monkeypatch.setattr(devices, "_PCI", tmp_path / "devices")
    monkeypatch.setattr(devices, "_NVIDIA_MODULE", tmp_path / "nvidia")
    monkeypatch.setattr(pynvml, "nvmlInit", fail(pynvml.NVMLError_DriverNotLoaded))
    if refused:
        with pytest.raises(UserError, match="driver is not loaded"):
            find_gpus()
    else:
        assert find_gpus() == []


def test_unknown_mig_device_is_rejected(monkeypatch: pytest.MonkeyPatch, fake_nvml: Callable[[int], list[str]]) -> None:
    fake_nvml(1)
    mig_devices = choose_gpus([], "MIG-1,MIG-2", None)
    queried: list[str] = []
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", queried.append)
    check_mig([*GPUS, *mig_devices])
    assert queried == ["MIG-1", "MIG-2"]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", fail(pynvml.NVMLError_NotFound))
    check_mig(GPUS)
    with pytest.raises(UserError, match=r"MIG-1, MIG-2: the NVIDIA driver knows no such device \(Not Found\)"):
        check_mig(mig_devices)


def test_nvml_is_shut_down_after_an_error(
    monkeypatch: pytest.MonkeyPatch, fake_nvml: Callable[[int], list[str]]
) -> None:
    calls = fake_nvml(8)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", fail(RuntimeError))
    with pytest.raises(RuntimeError):
        find_gpus()
    assert calls[-1] == "nvmlShutdown"


def test_cpus_are_numbered_and_have_no_uuid() -> None:
    assert [device.name for device in list_cpus(3)] == ["cpu 0", "cpu 1", "cpu 2"]
    assert all(device.uuid is None for device in list_cpus(3))
    assert list_cpus(0) == []


# --- CUDA_VISIBLE_DEVICES ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("", []), (" ", []), ("-1", []), ("none", []), ("NoDevFiles", []), ("void", []),
        ("0", [0]), ("7", [7]), ("0,1,3", [0, 1, 3]), ("3,0,1", [3, 0, 1]), (" 2 , 5 ", [2, 5]), ("06", [6]),
        ("0,-1,3", [0]), ("4,,5", [4]), ("1,2,", [1, 2]), ("0,-1,what", [0]), ("-1,99", []),
        (UUIDS[2], [2]), (f"{UUIDS[5]}, {UUIDS[0]}", [5, 0]), (f"3,{UUIDS[1]}", [3, 1]),
        ("GPU-4", [4]), ("GPU-7777,GPU-00000", [7, 0]), (f"1,GPU-0,{UUIDS[6]}", [1, 0, 6]),
    ],
)  # fmt: skip
def test_visible_gpus_keep_the_stated_order(visible: str | None, chosen: list[int]) -> None:
    assert choose(visible) == chosen


@pytest.mark.parametrize(
    ("visible", "problem"),
    [
        ("8", "'8': no such GPU"), ("0,8", "'8': no such GPU"), ("-2", "'-2': no such GPU"),
        ("1.0", "'1.0': no such GPU"), ("all", "'all': no such GPU"), ("gpu 1", "'gpu 1': no such GPU"),
        ("GPU-9", "'GPU-9': no such GPU"), (UUIDS[0] + "x", "no such GPU"), ("0000", None),
        ("GPU-", "'GPU-': matches several GPUs"), ("0,0", "gpu 0 is listed twice"), ("1,2,1", "gpu 1 is listed twice"),
        (f"3,{UUIDS[3]}", "gpu 3 is listed twice"), ("GPU-5,5", "gpu 5 is listed twice"),
    ],
)  # fmt: skip
def test_unknown_or_duplicate_visible_gpu_is_rejected(visible: str, problem: str | None) -> None:
    if problem is None:  # zeros are a number, not the start of a UUID
        assert choose(visible) == [0]
        return
    message = get_error(visible)
    assert problem in message and f"CUDA_VISIBLE_DEVICES={visible}" in message


def test_ambiguous_abbreviation_is_rejected() -> None:
    similar = [Device("gpu 0", "GPU-ab12"), Device("gpu 1", "GPU-ab34")]
    with pytest.raises(UserError, match="'GPU-ab': matches several GPUs"):
        choose_gpus(similar, "GPU-ab", None)
    assert choose_gpus(similar, "GPU-ab3", None) == [similar[1]]


def test_error_lists_the_gpus_of_the_machine() -> None:
    assert "(this machine's: 0, 1, 2, 3, 4, 5, 6, 7)" in get_error("9")
    with pytest.raises(UserError, match=r"this machine's: none"):
        choose_gpus([], "0", None)


@pytest.mark.parametrize("name", ["MIG-11111111-2222-3333-4444-555555555555", "MIG-GPU-0000/1/0", "mig-1"])
def test_mig_device_is_passed_on_by_name(name: str) -> None:
    """NVML lists only full GPUs; CUDA gets the name unchanged."""
    (mig_device,) = choose_gpus(GPUS, name, None)
    assert mig_device.uuid == name
    assert [device.uuid for device in choose_gpus(GPUS, f"{name},1", None)] == [name, UUIDS[1]]
    assert choose_gpus(GPUS, f"1,{name}", name) == [mig_device]
    assert name in get_error("1", name)
    assert "listed twice" in get_error(f"{name},{name}")


# --- with --gpus ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "wanted", "chosen"),
    [
        (None, "0", [0]), (None, "5,2", [5, 2]), (None, f"{UUIDS[4]},1", [4, 1]), (None, "GPU-6", [6]),
        ("3,1,0", "0,3", [0, 3]), ("3,1,0", "1", [1]), (f"{UUIDS[7]},GPU-2", "2,7", [2, 7]),
        ("0,1", f" {UUIDS[1]} ", [1]), ("0,-1,3", "0", [0]),
    ],
)  # fmt: skip
def test_wanted_gpus_are_selected_by_machine_index(visible: str | None, wanted: str, chosen: list[int]) -> None:
    assert choose(visible, wanted) == chosen


@pytest.mark.parametrize(
    ("visible", "wanted", "problem"),
    [
        ("3,1", "0", "gpu 0 not visible: CUDA_VISIBLE_DEVICES=3,1 shows gpu 3, gpu 1"),
        ("3,1", "1,2,0", "gpu 2, gpu 0 not visible"),
        ("", "0", "gpu 0 not visible: CUDA_VISIBLE_DEVICES= shows none"),
        ("0,-1,3", "3", "gpu 3 not visible"),
        (None, "8", "'8': no such GPU"), (None, "1,1", "gpu 1 is listed twice"), ("2", f"2,{UUIDS[2]}", "listed twice"),
        (None, "", "must be indices or UUIDs"), (None, "-1", "must be indices or UUIDs"),
        (None, "0,,1", "must be indices or UUIDs"), (None, "none", "must be indices or UUIDs"),
        (None, "GPU-", "matches several"), ("8", "0", "CUDA_VISIBLE_DEVICES=8: '8': no such GPU"),
    ],
)  # fmt: skip
def test_hidden_unknown_or_invalid_wanted_gpu_is_rejected(visible: str | None, wanted: str, problem: str) -> None:
    message = get_error(visible, wanted)
    assert problem in message
    assert "--gpus" in message or "CUDA_VISIBLE_DEVICES=8" in message


# --- environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "variables"),
    [
        (CPUS[:1], {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}),
        (GPUS[3:4], {"CUDA_VISIBLE_DEVICES": UUIDS[3], "DOCCLS_DEVICE": "cuda"}),
        ([Device("node 0 gpu 1", given=True)], {"DOCCLS_DEVICE": "cuda"}),
    ],
)
def test_single_process_gets_its_device_and_no_rank(devices: list[Device], variables: Mapping[str, str]) -> None:
    assert render_environment(devices, 0, 3) == {"OMP_NUM_THREADS": "3", **variables}


@pytest.mark.parametrize("devices", [CPUS[:3], [GPUS[6], GPUS[1], GPUS[4]]])
def test_each_rank_gets_all_devices_and_its_rank(devices: list[Device]) -> None:
    environments = [render_environment(devices, rank, 1) for rank in range(3)]
    for rank, environment in enumerate(environments):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert not {"MASTER_ADDR", "MASTER_PORT"} & environment.keys()
    visible = {environment["CUDA_VISIBLE_DEVICES"] for environment in environments}
    assert visible == ({""} if devices[0].uuid is None else {f"{UUIDS[6]},{UUIDS[1]},{UUIDS[4]}"})
    assert ("ACCELERATE_USE_CPU" in environments[0]) == (devices[0].uuid is None)


def test_digit_that_is_not_decimal_is_rejected() -> None:
    with pytest.raises(UserError, match=r"no such GPU \(this machine's: 0, 1\)"):
        choose_gpus([Device("gpu 0", "GPU-a"), Device("gpu 1", "GPU-b")], None, "²")
