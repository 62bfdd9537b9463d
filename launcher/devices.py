"""Devices that a fold's processes compute on: the GPUs that NVML lists and the user allows, or CPUs."""

import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from doccls.errors import UserError
from doccls.system.gpu_memory import SIGNIFICANT_GIB
from doccls.system.rank import DEVICE

_HIDES_GPUS = {"", "-1", "none", "void", "nodevfiles"}  # in CUDA_VISIBLE_DEVICES these hide all GPUs listed after them
_MIG = "MIG"  # model of a MIG device, a partition of a GPU
# NVML's compute modes: no process may use the GPU; one thread, or one process, may use it at a time.
_PROHIBITED, _EXCLUSIVE = 2, (1, 3)
# With older drivers, GeForce RTX 40 GPUs can't access each other's memory, and NCCL fails unless P2P is disabled.
_P2P_DRIVER = (550, 40, 7)
_DISABLE_P2P = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}  # as `accelerate launch` sets for these GPUs
# The host's PCI devices and loaded driver; a container sees the host's, too.
_PCI, _NVIDIA_MODULE = Path("/sys/bus/pci/devices"), Path("/sys/module/nvidia")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI vendor, and the prefix of a GPU's PCI class


@dataclass(frozen=True)
class Device:
    """The GPU or CPU that one process computes on."""

    name: str  # such as `gpu 3` or `cpu 0`
    uuid: str | None = None  # the GPU's, independent of the order in which CUDA counts; None for a CPU
    model: str = ""  # such as `NVIDIA H100`
    given: bool = False  # a GPU that Slurm assigned to the job and makes visible to its processes
    fault: str = ""  # why this GPU can't be used; empty if it can
    used_mib: int = 0  # memory that other processes held when the driver was queried
    total_mib: int = 0
    exclusive: bool = False  # its compute mode allows one process at a time
    lacks_p2p: bool = False  # it can't access the memory of another GPU of its model

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.uuid is None and not self.given and not self.fault

    @property
    def is_busy(self) -> bool:
        """Whether other processes hold much of the GPU's memory."""
        return self.used_mib > SIGNIFICANT_GIB * 1024


def find_gpus() -> list[Device]:
    """List all GPUs of this machine's NVIDIA driver, in its order (nvidia-smi's); empty without GPUs.

    A GPU that fell off the bus, or that this user may not use, is listed with its fault.

    Raises:
        UserError: the driver does not answer, or there is a GPU without a driver.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        if _lacks_driver():
            raise UserError(
                "this machine has an NVIDIA GPU, but its driver is not loaded (nvidia-smi may say why; a new kernel "
                "needs the driver rebuilt): install it, or train on CPUs (--slots N)"
            ) from None
        return []  # also in a container without GPUs
    except pynvml.NVMLError as error:
        raise UserError(_format_nvml_error(error)) from error
    try:
        driver = _parse_version(_query("nvmlSystemGetDriverVersion") or "")
        return [_read_gpu(index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise UserError(_format_nvml_error(error)) from error
    finally:
        pynvml.nvmlShutdown()


def _lacks_driver() -> bool:
    if _NVIDIA_MODULE.exists():
        return False
    for device in _PCI.glob("*"):
        with suppress(OSError):
            vendor, kind = (Path(device, name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
            if vendor == _NVIDIA and kind.startswith(_DISPLAY):
                return True
    return False


def _read_gpu(index: int, driver: tuple[int, ...]) -> Device:
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid, model = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError as error:
        return Device(f"gpu {index}", fault=str(error))
    mode, memory = _query("nvmlDeviceGetComputeMode", handle), _query("nvmlDeviceGetMemoryInfo", handle)
    return Device(
        f"gpu {index}",
        uuid,
        model,
        fault="its compute mode is Prohibited" if mode == _PROHIBITED else "",
        used_mib=memory.used // 2**20 if memory else 0,
        total_mib=memory.total // 2**20 if memory else 0,
        exclusive=mode in _EXCLUSIVE,
        lacks_p2p="RTX 40" in model and driver < _P2P_DRIVER,
    )


def _query(function: str, *arguments: Any) -> Any:
    """Call a function of NVML; return None where it is not supported: some virtual GPUs, MIG mode, old drivers."""
    import pynvml

    with suppress(pynvml.NVMLError, AttributeError):
        return getattr(pynvml, function)(*arguments)
    return None


def _parse_version(text: str) -> tuple[int, ...]:
    """Parse a version such as 550.40.07, ignoring components that are not numbers."""
    return tuple(int(word) for word in text.split(".") if word.isdecimal())


def find_other_accelerator() -> str | None:
    """Describe an accelerator of this machine that `doccls-launch` does not support; None if there is none.

    It is found by files and by the installed version of PyTorch, such as `2.8.0+rocm6.4`: importing takes seconds.
    """
    with suppress(metadata.PackageNotFoundError):
        _, _, build = metadata.version("torch").partition("+")
        if build.startswith(("rocm", "xpu")):
            return f"PyTorch is built for {'AMD' if build.startswith('rocm') else 'Intel'} GPUs ({build})"
    if Path("/dev/kfd").exists():
        return "this machine has an AMD GPU (/dev/kfd)"
    if (sys.platform, platform.machine()) == ("darwin", "arm64"):
        return "this machine has an Apple GPU (MPS)"
    return None


def check_mig(devices: Sequence[Device]) -> None:
    """Check that the driver knows each MIG device.

    Raises:
        UserError: the driver does not know one of them.
    """
    import pynvml

    names = [str(device.uuid) for device in devices if device.model == _MIG]
    if not names:
        return
    try:
        pynvml.nvmlInit()
        try:
            for name in names:
                pynvml.nvmlDeviceGetHandleByUUID(name)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise UserError(
            f"{', '.join(names)}: the NVIDIA driver knows no such device ({error}); nvidia-smi -L lists them"
        ) from error


def _format_nvml_error(error: Exception) -> str:
    return f"the NVIDIA driver does not answer ({error}): nvidia-smi may say more; --slots N trains on CPUs"


def choose_gpus(found: Sequence[Device], visible: str | None, wanted: str | None) -> list[Device]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES (`visible`) shows and, if given, `--gpus` (`wanted`) selects.

    Both are lists such as `0,1,3`, of nvidia-smi's indices or of UUIDs, which may be abbreviated as CUDA allows. An
    index means the same GPU in both: `--gpus` does not count among the visible ones. Without `--gpus`, GPUs with a
    fault are included.

    Raises:
        UserError: a GPU does not exist, is listed twice, is not visible, or is in `--gpus` and has a fault.
    """
    allowed = list(found) if visible is None else _parse_list(visible, found, "CUDA_VISIBLE_DEVICES", is_variable=True)
    if wanted is None:
        return allowed
    chosen = _parse_list(wanted, found, "--gpus", is_variable=False)
    for device in chosen:
        if device.fault:
            raise UserError(f"--gpus {wanted}: {device.name} can't be used: {device.fault} (nvidia-smi may say more)")
    hidden = [device.name for device in chosen if device not in allowed]
    if hidden:
        raise UserError(
            f"--gpus {wanted}: {', '.join(hidden)} not visible: CUDA_VISIBLE_DEVICES={visible} shows "
            f"{', '.join(device.name for device in allowed) or 'none'}"
        )
    return chosen


def hides_all_gpus(visible: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU."""
    return visible is not None and visible.split(",")[0].strip().lower() in _HIDES_GPUS


def select_usable(gpus: Sequence[Device], exclude_busy: bool) -> tuple[list[Device], list[str]]:
    """Return the usable GPUs, and a warning for each that is unusable or whose memory other processes use."""
    usable, warnings = [], []
    for gpu in gpus:
        busy = f"other processes hold {gpu.used_mib / 1024:.1f} of its {gpu.total_mib / 1024:.1f} GiB of memory"
        if gpu.fault:
            warnings.append(f"{gpu.name} is not used: {gpu.fault}")
        elif gpu.is_busy and exclude_busy:
            warnings.append(f"{gpu.name} is not used: {busy}")
        else:
            usable.append(gpu)
            if gpu.is_busy:
                warnings.append(f"{gpu.name}: {busy} (--exclude-busy skips such GPUs)")
    return usable, warnings


def list_cpus(count: int) -> list[Device]:
    """Return `count` CPU devices."""
    return [Device(f"cpu {number}") for number in range(count)]


def render_environment(devices: Sequence[Device], rank: int, threads: int) -> dict[str, str]:
    """Render the environment variables of a fold's process, those of torchrun and `accelerate launch`.

    The process that starts several ranks sets where they meet: `doccls.system.rank.MEETING_FILE`.
    """
    variables = {"OMP_NUM_THREADS": str(threads)}
    if devices[0].is_cpu:
        variables |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    else:
        variables[DEVICE] = "cuda"
        if not devices[0].given:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.uuid) for device in devices)
    if len(devices) > 1:
        if any(device.lacks_p2p for device in devices):
            variables |= _DISABLE_P2P
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        variables |= {"WORLD_SIZE": str(len(devices)), "LOCAL_WORLD_SIZE": str(len(devices))}
    return variables


def _parse_list(text: str, gpus: Sequence[Device], source: str, is_variable: bool) -> list[Device]:
    setting = f"{source}={text}" if is_variable else f"{source} {text}"
    chosen: list[Device] = []
    for word in text.split(","):
        if word.strip().lower() in _HIDES_GPUS:
            if is_variable:
                break  # as in CUDA, which hides all that follow
            raise UserError(f"{setting!r}: must be indices or UUIDs, such as 0,1,3")
        device = _find(word.strip(), gpus, setting)
        if device in chosen:
            raise UserError(f"{setting}: {device.name} is listed twice")
        chosen.append(device)
    return chosen


def _find(word: str, gpus: Sequence[Device], setting: str) -> Device:
    if word.upper().startswith("MIG-"):
        return Device(word, word, _MIG)  # NVML lists only full GPUs; CUDA accepts the name of a MIG device
    by_index = [gpu for gpu in gpus if word.isdecimal() and gpu.name == f"gpu {int(word)}"]
    by_uuid = {gpu.uuid: gpu for gpu in gpus if gpu.uuid and gpu.uuid.startswith(word)}
    matches = by_index[:1] or (list(by_uuid.values()) if word.upper().startswith("GPU-") else [])
    if len(matches) != 1:
        problem = "matches several GPUs" if matches else "no such GPU"
        available = ", ".join(gpu.name.removeprefix("gpu ") for gpu in gpus) or "none"
        hint = "; without a GPU: leave it out (or unset it), or pass --slots N" if not gpus else ""
        raise UserError(f"{setting}: {word!r}: {problem} (this machine's: {available}){hint}")
    return matches[0]
