"""What a fold's processes compute on: the GPUs that NVML knows and the user allows, or places for CPU processes."""

from collections.abc import Sequence
from dataclasses import dataclass

from doccls.errors import UserError
from doccls.run.rank import DEVICE

_NONE = {"", "-1", "none", "void", "nodevfiles"}
"""What CUDA_VISIBLE_DEVICES says to show no GPU, or no more of them."""


_MIG = "MIG"
"""Model of a part of a GPU."""


class DeviceError(UserError):
    """Devices are asked for that are not there, or not to be used."""


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
    """Why the driver can't use this GPU; empty if it can."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is a place for a CPU process."""
        return self.uuid is None and not self.given and not self.fault


def find_gpus() -> list[Device]:
    """All GPUs that this machine's NVIDIA driver shows, in its order (nvidia-smi's); none without a driver.

    One that fell off the bus, or that this user may not use, is among them with its fault.

    Raises:
        DeviceError: there is a driver, and it does not answer.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    except pynvml.NVMLError as error:
        raise DeviceError(_tell_silence(error)) from error
    try:
        return [_read_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise DeviceError(_tell_silence(error)) from error
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(index: int) -> Device:
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return Device(f"gpu {index}", pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError as error:
        return Device(f"gpu {index}", fault=str(error))


def check_mig(devices: Sequence[Device]) -> None:
    """Ask the driver for each part of a GPU that was named.

    Raises:
        DeviceError: it knows none of that name.
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
        raise DeviceError(
            f"{', '.join(names)}: the NVIDIA driver knows no such device ({error}); nvidia-smi -L"
        ) from error


def _tell_silence(error: Exception) -> str:
    return f"the NVIDIA driver does not answer ({error}): nvidia-smi may say more; --slots N computes on CPUs"


def choose_gpus(found: Sequence[Device], visible: str | None, wanted: str | None) -> list[Device]:
    """The GPUs to use: those that CUDA_VISIBLE_DEVICES (`visible`) shows, and of them those of `--gpus` (`wanted`).

    Both are lists such as `0,1,3`, of nvidia-smi's numbers or of UUIDs, which may be cut short as CUDA allows. Numbers
    mean the same GPU in both; none counts anew from what the other leaves.

    Raises:
        DeviceError: a GPU that is not there, is named twice, or is not visible.
    """
    if visible is None:
        allowed = [device for device in found if wanted is not None or not device.fault]
    else:
        allowed = _parse_list(visible, found, "CUDA_VISIBLE_DEVICES", stops=True)
    if wanted is None:
        return allowed
    chosen = _parse_list(wanted, found, "--gpus", stops=False)
    hidden = [device.name for device in chosen if device not in allowed]
    if hidden:
        raise DeviceError(
            f"--gpus {wanted}: {', '.join(hidden)} not visible: CUDA_VISIBLE_DEVICES={visible} leaves "
            f"{', '.join(device.name for device in allowed) or 'none'}"
        )
    return chosen


def list_cpus(count: int) -> list[Device]:
    """Places for CPU processes."""
    return [Device(f"cpu {number}") for number in range(count)]


def render_environment(devices: Sequence[Device], rank: int, threads: int) -> dict[str, str]:
    """What a process of a fold is told, in the words that torchrun and `accelerate launch` use.

    Where several ranks meet is told by who starts them: `doccls.run.rank.MEETING_FILE`.
    """
    told = {"OMP_NUM_THREADS": str(threads)}
    if devices[0].is_cpu:
        told |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    else:
        told[DEVICE] = "cuda"
        if not devices[0].given:
            told["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.uuid) for device in devices)
    if len(devices) > 1:
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
            raise DeviceError(f"{said!r}: write numbers or UUIDs, such as 0,1,3")
        device = _find(word.strip(), known, said)
        if device.fault:
            raise DeviceError(f"{said}: {device.name} can't be used: {device.fault} (nvidia-smi may say more)")
        if device in chosen:
            raise DeviceError(f"{said}: {device.name} is named twice")
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
        raise DeviceError(f"{where}: {word!r}: {problem} (this machine's: {there}){without}")
    return found[0]
