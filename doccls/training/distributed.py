"""The process group: how many there are, on what device, in which precision; and saying things once."""

import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    set_seed,
)
from torch.distributed import FileStore  # type: ignore[attr-defined]  # documented, and not in its __all__

from doccls.config.schema import Config
from doccls.errors import PortTakenError, RankLocalError, UserError
from doccls.system.rank import DEVICE, MEETING_FILE, rank_by_environment
from doccls.system.signals import STOP_SIGNALS, Interrupted, stop_requested
from doccls.training.speed import choose_kernels

_T = TypeVar("_T")
_OTHER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""How many processes srun or mpirun started, for those that they started."""
_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_PATIENCE = timedelta(hours=2)
"""The others wait while the main process looks at every image, or a slow machine fetches the weights."""
_LEAST_LIMIT_S = 600.0
"""torch's own for NCCL; machines of one job start minutes apart."""
_MARGIN_S = 10.0
"""By which torch's limit for a collective is the longer one: `doccls.run.watchdog` comes first, and says why."""
_ADDRESS_IN_USE = "address already in use"
_patient_group: dist.ProcessGroup | None = None
"""For waits of any length; None in a process alone. Collectives of the default group are given up much sooner."""


class ProcessError(UserError):
    """The processes that were started are not those that were asked for, or can't do what the config asks."""


def start_processes(config: Config) -> Accelerator:
    """Join the process group and set up the device. All ranks must call, once.

    Raises:
        ProcessError: another number of processes than expected, a device that can't be used, or a precision that it
            has not.
        PortTakenError: another process listens at MASTER_PORT.
    """
    global _patient_group
    _check_launch(os.environ)
    _check_device(os.environ)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(started, started, config)  # before any rank waits for another
    choose_kernels(config.train)
    limit = timedelta(seconds=max(_LEAST_LIMIT_S, config.train.collective_timeout_s + _MARGIN_S))
    if started > 1 and MEETING_FILE in os.environ:
        _meet(Path(os.environ[MEETING_FILE]), rank_by_environment(), started, limit)
    # Started as several on a machine without GPUs, Accelerate stays alone unless it is told that CPUs are meant.
    cpu = started > 1 and not torch.cuda.is_available()
    group = _form_group(cpu, limit)  # its ranks agree on the precision
    check_world_size(group.num_processes, started, config)
    if started > 1:
        _patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]  # of all
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=_agree_on_precision(config.train.amp, started),
        kwargs_handlers=[
            # Buffers are averaged before each validation; DDP's own broadcast would be one more collective a step.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    torch.set_num_threads(config.train.cpu_threads)  # after Accelerate, which sets its own count for CPU processes
    _check_accelerator(accelerator)
    set_seed(config.project.seed)
    return accelerator


def _meet(file: Path, rank: int, world_size: int, limit: timedelta) -> None:
    """Join the group through a file, not through MASTER_ADDR and MASTER_PORT; Accelerate takes the group it finds."""
    backend = "nccl" if torch.cuda.is_available() and not _on_cpu(os.environ) else "gloo"
    store = FileStore(str(file), world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)


def _form_group(cpu: bool, limit: timedelta) -> PartialState:
    try:
        return PartialState(cpu, timeout=limit)
    except RuntimeError as error:  # torch.distributed.DistNetworkError, and what torch raised before it had that
        if _ADDRESS_IN_USE not in str(error).lower():
            raise
        raise PortTakenError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} of {socket.gethostname()}, where the processes were to meet, "
            "is taken by another process: choose another (accelerate launch --main_process_port PORT)"
        ) from error


def check_world_size(world_size: int, started: int, config: Config) -> None:
    """Compare the process group with what was started and with what the config expects.

    Raises:
        ProcessError: they differ, or there are more processes than samples in a batch.
    """
    if world_size != started:
        raise ProcessError(f"{started} processes were started, but this one is in a group of {world_size}")
    expected = config.train.num_processes
    if expected is not None and expected != world_size:
        raise ProcessError(f"train.num_processes = {expected}, but {world_size} were started (see accelerate_configs/)")
    if world_size > config.train.batch_size:
        raise ProcessError(
            f"train.batch_size = {config.train.batch_size} is the batch of all processes together: "
            f"{world_size} processes can't share it"
        )


def _agree_on_precision(amp: bool | str, started: int) -> str:
    """The main process chooses for all; all ranks must call.

    Raises:
        ProcessError: it is not to be had, on the main process or on this one.
    """
    box: list[object] = [None]
    if rank_by_environment() == 0:
        try:
            box[0] = choose_precision(amp, os.environ)
        except ProcessError as error:
            box[0] = _Failure(str(error))
    if started > 1:
        _broadcast(box)
    chosen = box[0]
    if isinstance(chosen, _Failure):
        raise ProcessError(chosen.message)
    assert isinstance(chosen, str)
    try:
        _check_precision(chosen, os.environ)
    except ProcessError as error:
        raise RankLocalError(str(error)) from error
    return chosen


def choose_precision(amp: bool | str, environment: Mapping[str, str]) -> str:
    """train.amp -> Accelerate's `mixed_precision`. `true` takes what `accelerate launch` says, else the device's best.

    Raises:
        ProcessError: the device can't compute in it.
    """
    on_cuda = torch.cuda.is_available() and not _on_cpu(environment)
    if isinstance(amp, str):
        chosen = amp
    elif not amp:
        return "no"
    else:
        launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
        best = "no" if not on_cuda else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        chosen = launched if launched in ("fp16", "bf16") else best
    _check_precision(chosen, environment)
    return chosen


def can_compute_in(precision: str) -> bool:
    """Whether this process's device can."""
    try:
        _check_precision(precision, os.environ)
    except ProcessError:
        return False
    return True


def _check_precision(precision: str, environment: Mapping[str, str]) -> None:
    on_cuda = torch.cuda.is_available() and not _on_cpu(environment)
    if precision == "fp16" and not on_cuda:
        raise ProcessError("fp16 needs a GPU: set train.amp to bf16, false, or true (the best that the device has)")
    if precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ProcessError(
            "bf16 needs a GPU of compute capability 8.0 (A100, RTX 30) or newer: set train.amp to fp16, false, or true "
            "(the best that the device has)"
        )


def render_stop(device: torch.device) -> torch.Tensor:
    """This process's stop request as one number a signal, (signals,) float32: summed over ranks, they tell of any."""
    requested = stop_requested()
    return torch.tensor([float(number == requested) for number in STOP_SIGNALS], device=device)


def read_stop(stops: torch.Tensor) -> int | None:
    """The signal that came to one of the ranks, by the sum of all ranks' `render_stop`; None if none did."""
    return next((number for number, count in zip(STOP_SIGNALS, stops.tolist(), strict=True) if count), None)


def raise_stop(stops: torch.Tensor) -> None:
    """Read the sum of all ranks' `render_stop`, which is the same on each, so that all leave together.

    Raises:
        Interrupted: a signal came to one of them.
    """
    number = read_stop(stops)
    if number is not None:
        raise Interrupted(number)


def agree_on_stop(accelerator: Accelerator) -> None:
    """A safe point for all ranks together; all must call.

    Raises:
        Interrupted: a signal came to one of them.
    """
    raise_stop(accelerator.reduce(render_stop(accelerator.device), reduction="sum"))


def on_main(accelerator: Accelerator, act: Callable[[], _T]) -> _T:
    """Run `act` on the main process and give every process its result. All ranks must call.

    An error of `act` is raised on the main process and ends every other, so that none is left waiting.
    """
    if accelerator.num_processes == 1:
        return act()
    box: list[object] = [None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            box[0] = act()
        except Exception as raised:  # noqa: BLE001 (raised again below, when the others know)
            error, box[0] = raised, _Failure(str(raised))
    _broadcast(box)
    if error is not None:
        raise error
    if isinstance(box[0], _Failure):
        raise ProcessError(box[0].message)
    return box[0]  # type: ignore[return-value]


def await_all(accelerator: Accelerator) -> None:
    """Wait, however long it takes, until every process is here. All ranks must call."""
    if accelerator.num_processes > 1:
        dist.barrier(group=_patient_group)


def gather_rows(accelerator: Accelerator, own_B: torch.Tensor) -> torch.Tensor:
    """Each rank's (n,) tensor on the CPU -> (ranks, n), on every rank. All ranks must call, with one n."""
    if accelerator.num_processes == 1 or own_B.numel() == 0:
        return own_B.repeat(accelerator.num_processes, 1)
    rows = [torch.empty_like(own_B) for _ in range(accelerator.num_processes)]
    dist.all_gather(rows, own_B, group=_patient_group)
    return torch.stack(rows)


def has_scaler(accelerator: Accelerator) -> bool:
    """Whether gradients are scaled, as in fp16 alone."""
    return accelerator.scaler is not None and bool(accelerator.scaler.is_enabled())


def list_devices(accelerator: Accelerator) -> list[str]:
    """What each rank computes on, by rank, such as `NVIDIA H100 80GB HBM3` or `cpu`. All ranks must call."""
    device = accelerator.device
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    names = [own] * accelerator.num_processes
    if accelerator.num_processes > 1:
        dist.all_gather_object(names, own, group=_patient_group)
    return names


def _broadcast(box: list[object]) -> None:
    """The main process's objects to all, from host to host; who comes early waits patiently."""
    dist.broadcast_object_list(box, src=0, group=_patient_group, device=torch.device("cpu"))


class _Failure:
    def __init__(self, message: str) -> None:
        self.message = message


def _check_accelerator(accelerator: Accelerator) -> None:
    """What `accelerate launch` can say beside the processes and would change the numbers without a word."""
    taken = {
        "gradient accumulation (train.batch_size and train.micro_batch_size decide it)":
            accelerator.gradient_accumulation_steps != 1,
        "a dynamo backend (train.compile decides it)":
            accelerator.state.dynamo_plugin.backend not in (None, DynamoBackend.NO),
        f"{accelerator.distributed_type} (only plain data parallelism is supported)":
            accelerator.distributed_type not in _PLAIN,
    }  # fmt: skip
    refused = [what for what, found in taken.items() if found]
    if refused:
        raise ProcessError(
            f"accelerate launch asks for {' and '.join(refused)}: take it out of its config file or flags"
        )


def _check_launch(environment: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 2` names a rendezvous but starts one process, and does not say so."""
    if {"MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"} <= environment.keys() and "WORLD_SIZE" not in environment:
        raise ProcessError(
            "accelerate launch was asked for several processes but started one (its --cpu form does that). "
            "Use `accelerate launch --config_file accelerate_configs/cpu_2.yaml -m doccls.train ...`, or "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m doccls.train ...`. "
            "(If one process is meant: unset MASTER_ADDR and MASTER_PORT, which this shell exports.)"
        )
    copies = [f"{name}={environment[name]}" for name in _OTHER_COUNTS if int(environment.get(name) or 1) > 1]
    if copies and "RANK" not in environment:
        raise ProcessError(
            f"started as one of several ({', '.join(copies)}) without a rank: each would train everything on its own. "
            "srun and mpirun start processes, they do not make them a group: `sbatch slurm/kfold.sh CONFIG`, "
            "`doccls-launch run --backend slurm`, or one `accelerate launch` a machine (docs/distributed.md)"
        )
    local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    rank = int(environment.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and not _on_cpu(environment) and rank >= torch.cuda.device_count() == 1:
        raise ProcessError(
            f"LOCAL_RANK={rank}, but this process sees one GPU alone: show each process all of its machine's GPUs "
            "(srun without --gpus-per-task and --gpu-bind; CUDA_VISIBLE_DEVICES with all of them)"
        )
    if torch.cuda.is_available() and not _on_cpu(environment) and local > torch.cuda.device_count():
        raise ProcessError(
            f"{local} processes on this machine, which shows {torch.cuda.device_count()} GPUs: "
            f"accelerate launch --num_processes {torch.cuda.device_count()} ..."
        )


def _check_device(environment: Mapping[str, str]) -> None:
    """Refuse devices that Accelerate would replace by the CPU without saying so.

    That is a GPU that NVML shows and torch can't use, and XPU or MPS devices for several processes.

    Raises:
        ProcessError: such devices are meant.
    """
    if environment.get(DEVICE) == "cuda" and not torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        raise ProcessError(
            f"this process was given a GPU (CUDA_VISIBLE_DEVICES={visible}) that PyTorch can't use: {_explain_cuda()}. "
            "Install a PyTorch for the machine's driver (https://pytorch.org/get-started/locally), or compute on CPUs "
            "(doccls-launch run --slots N)"
        )
    others = {"xpu": torch.xpu.is_available(), "mps": torch.backends.mps.is_available()}
    found = [name for name, available in others.items() if available]
    if found and int(environment.get("WORLD_SIZE", "1")) > 1 and not _on_cpu(environment):
        raise ProcessError(
            f"several processes on {found[0]} devices are not supported, only on CUDA and ROCm GPUs: train with one "
            "process, or on CPUs (ACCELERATE_USE_CPU=true)"
        )


def _explain_cuda() -> str:
    """Why torch can't use the machine's GPUs, in its own words."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].rstrip(".")
    return "it found no GPU"


def _on_cpu(environment: Mapping[str, str]) -> bool:
    return environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
