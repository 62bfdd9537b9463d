"""What a fold's processes compute on: the GPUs that NVML knows and the user allows, or places for CPU processes."""

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

_NONE = {"", "-1", "none", "void", "nodevfiles"}
"""What CUDA_VISIBLE_DEVICES says to show no GPU, or no more of them."""
_MIG = "MIG"
"""Model of a part of a GPU."""
_PROHIBITED, _EXCLUSIVE = 2, (1, 3)
"""NVML's compute modes: no process may use the GPU; one thread, or one process, at a time."""
_P2P_DRIVER = (550, 40, 7)
"""Before this driver, GeForce RTX 40 GPUs can't reach each other's memory, and NCCL fails unless it is told."""
_PCI, _NVIDIA_MODULE = Path("/sys/bus/pci/devices"), Path("/sys/module/nvidia")
"""What the kernel has found, and the driver's part in it: both as the host has them, in a container too."""
_NVIDIA, _DISPLAY = "0x10de", "0x03"
"""PCI's vendor, and the first digits of the class of a GPU."""
_WITHOUT_P2P = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
"""What `accelerate launch` sets for them, too."""


@dataclass(frozen=True)
class Device:
    """What one process computes on."""

    name: str
    """Such as `gpu 3` or `cpu 0`."""
    uuid: str | None = None
    """The GPU's, which means the same whatever order CUDA counts in; None is a CPU."""
    model: str = ""
    """Such as `NVIDIA H100`."""
    given: bool = False
    """A GPU of a Slurm job: Slurm shows it to the job's processes."""
    fault: str = ""
    """Why this GPU can't be used; empty if it can."""
    used_mib: int = 0
    """Memory that other processes hold, when the driver was asked."""
    total_mib: int = 0
    exclusive: bool = False
    """Its compute mode allows one process at a time."""
    lacks_p2p: bool = False
    """It can't reach the memory of another GPU of its kind."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is a place for a CPU process."""
        return self.uuid is None and not self.given and not self.fault

    @property
    def is_busy(self) -> bool:
        """Whether other processes hold much of its memory."""
        return self.used_mib > SIGNIFICANT_GIB * 1024


def find_gpus() -> list[Device]:
    """All GPUs that this machine's NVIDIA driver shows, in its order (nvidia-smi's); none where there are none.

    One that fell off the bus, or that this user may not use, is listed with its fault.

    Raises:
        UserError: there is a driver, and it does not answer; or there is a GPU, and no driver.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        if _lacks_driver():
            raise UserError(
                "this machine has an NVIDIA GPU, and its driver is not loaded (nvidia-smi may say why; a driver is to "
                "be built anew for a new kernel): install it, or compute on CPUs (--slots N)"
            ) from None
        return []  # also in a container that was given no GPU
    except pynvml.NVMLError as error:
        raise UserError(_format_nvml_error(error)) from error
    try:
        driver = _parse_version(_ask("nvmlSystemGetDriverVersion") or "")
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
    mode, memory = _ask("nvmlDeviceGetComputeMode", handle), _ask("nvmlDeviceGetMemoryInfo", handle)
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


def _ask(question: str, *about: Any) -> Any:
    """The driver's answer; None if it has none, as for some virtual GPUs, for one in parts, and in old drivers."""
    import pynvml

    with suppress(pynvml.NVMLError, AttributeError):
        return getattr(pynvml, question)(*about)
    return None


def _parse_version(text: str) -> tuple[int, ...]:
    """Such as 550.40.07; a word that is no number counts for nothing."""
    return tuple(int(word) for word in text.split(".") if word.isdecimal())


def find_other_accelerator() -> str | None:
    """What else this machine computes on that `doccls-launch` can't place folds on, in words; None if nothing.

    By files and by the version of PyTorch that is installed, such as `2.8.0+rocm6.4`: importing it takes seconds.
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
    """Ask the driver for each part of a GPU that was named.

    Raises:
        UserError: it knows none of that name.
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
            f"{', '.join(names)}: the NVIDIA driver knows no such device ({error}); nvidia-smi -L"
        ) from error


def _format_nvml_error(error: Exception) -> str:
    return f"the NVIDIA driver does not answer ({error}): nvidia-smi may say more; --slots N computes on CPUs"


def choose_gpus(found: Sequence[Device], visible: str | None, wanted: str | None) -> list[Device]:
    """The GPUs to use: those that CUDA_VISIBLE_DEVICES (`visible`) shows, and of them those of `--gpus` (`wanted`).

    Both are lists such as `0,1,3`, of nvidia-smi's numbers or of UUIDs, which may be cut short as CUDA allows. Numbers
    mean the same GPU in both; none counts anew from what the other leaves. Without `--gpus`, those with a fault are
    listed, too.

    Raises:
        UserError: a GPU that is not there, is named twice, is not visible, or was asked for and has a fault.
    """
    allowed = list(found) if visible is None else _parse_list(visible, found, "CUDA_VISIBLE_DEVICES", stops=True)
    if wanted is None:
        return allowed
    chosen = _parse_list(wanted, found, "--gpus", stops=False)
    for device in chosen:
        if device.fault:
            raise UserError(f"--gpus {wanted}: {device.name} can't be used: {device.fault} (nvidia-smi may say more)")
    hidden = [device.name for device in chosen if device not in allowed]
    if hidden:
        raise UserError(
            f"--gpus {wanted}: {', '.join(hidden)} not visible: CUDA_VISIBLE_DEVICES={visible} leaves "
            f"{', '.join(device.name for device in allowed) or 'none'}"
        )
    return chosen


def shows_none(visible: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU."""
    return visible is not None and visible.split(",")[0].strip().lower() in _NONE


def set_aside(gpus: Sequence[Device], exclude_busy: bool) -> tuple[list[Device], list[str]]:
    """Those of the GPUs that can be used, and a warning for each that can't, or whose memory others use."""
    usable, warnings = [], []
    for gpu in gpus:
        held = f"others hold {gpu.used_mib / 1024:.1f} of the {gpu.total_mib / 1024:.1f} GiB of its memory"
        if gpu.fault:
            warnings.append(f"{gpu.name} is not used: {gpu.fault}")
        elif gpu.is_busy and exclude_busy:
            warnings.append(f"{gpu.name} is not used: {held}")
        else:
            usable.append(gpu)
            if gpu.is_busy:
                warnings.append(f"{gpu.name}: {held} (--exclude-busy leaves out such GPUs)")
    return usable, warnings


def list_cpus(count: int) -> list[Device]:
    """Places for CPU processes."""
    return [Device(f"cpu {number}") for number in range(count)]


def render_environment(devices: Sequence[Device], rank: int, threads: int) -> dict[str, str]:
    """What a process of a fold is told, in the words that torchrun and `accelerate launch` use.

    Where several ranks meet is told by who starts them: `doccls.system.rank.MEETING_FILE`.
    """
    told = {"OMP_NUM_THREADS": str(threads)}
    if devices[0].is_cpu:
        told |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    else:
        told[DEVICE] = "cuda"
        if not devices[0].given:
            told["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.uuid) for device in devices)
    if len(devices) > 1:
        if any(device.lacks_p2p for device in devices):
            told |= _WITHOUT_P2P
        told |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        told |= {"WORLD_SIZE": str(len(devices)), "LOCAL_WORLD_SIZE": str(len(devices))}
    return told


def _parse_list(text: str, known: Sequence[Device], where: str, stops: bool) -> list[Device]:
    said = f"{where}={text}" if stops else f"{where} {text}"
    chosen: list[Device] = []
    for word in text.split(","):
        if word.strip().lower() in _NONE:
            if stops:
                break  # as CUDA does: what comes after it is not shown
            raise UserError(f"{said!r}: write numbers or UUIDs, such as 0,1,3")
        device = _find(word.strip(), known, said)
        if device in chosen:
            raise UserError(f"{said}: {device.name} is named twice")
        chosen.append(device)
    return chosen


def _find(word: str, known: Sequence[Device], where: str) -> Device:
    if word.upper().startswith("MIG-"):
        return Device(word, word, _MIG)  # a part of a GPU: NVML lists GPUs, CUDA knows the name
    exact = [device for device in known if word.isdecimal() and device.name == f"gpu {int(word)}"]
    by_uuid = {device.uuid: device for device in known if device.uuid and device.uuid.startswith(word)}
    found = exact[:1] or (list(by_uuid.values()) if word.upper().startswith("GPU-") else [])
    if len(found) != 1:
        problem = "fits several GPUs" if found else "no such GPU"
        there = ", ".join(device.name.removeprefix("gpu ") for device in known) or "none"
        without = "; without a GPU: leave it out (or unset it), or say --slots N" if not known else ""
        raise UserError(f"{where}: {word!r}: {problem} (this machine's: {there}){without}")
    return found[0]
