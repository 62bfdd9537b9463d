"""The process group: its size, devices and precision, and collectives of Python objects and requests to stop."""

import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
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
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]  # documented, and not in its __all__

from doccls.config.schema import Config
from doccls.errors import RankLocalError, UserError
from doccls.system.rank import DEVICE, MEETING_FILE, check_group_variables, has_meeting_address, rank_by_environment
from doccls.system.signals import STOP_SIGNALS, Interrupted, stop_requested
from doccls.system.variables import parse_flag, parse_whole_number
from doccls.training.meeting import MeetingPoint, meet
from doccls.training.speed import choose_kernels

_T = TypeVar("_T")
# Set by srun or mpirun: the number of processes that they started.
_TASK_COUNT_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_SUPPORTED_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_LONG_TIMEOUT = timedelta(hours=2)  # while the main process scans all images, or a slow machine downloads weights
_MIN_TIMEOUT_S = 600.0  # torch's default for NCCL; machines of one job may start minutes apart
_MARGIN_S = 10.0  # added to the collective timeout, so that `doccls.run.watchdog` acts first and says why
# The group for waits of any length; None in a single process. The default group's collectives time out much sooner.
_long_wait_group: dist.ProcessGroup | None = None


class ProcessError(UserError):
    """An error for processes that differ from those requested, or that can't do what the config requires."""


def start_processes(config: Config) -> Accelerator:
    """Join the process group and set up the device. All ranks must call, once.

    Raises:
        UserError: the environment's variables place this process in no possible group.
        ProcessError: the number of processes is wrong, the device can't be used or does not support the precision.
        PortTakenError: another process listens at MASTER_PORT.
        MeetingError: other processes did not arrive there.
    """
    global _long_wait_group
    check_group_variables(os.environ)
    _check_launch(os.environ)
    _check_device(os.environ)
    started = parse_whole_number(os.environ, "WORLD_SIZE", 1)
    check_world_size(started, started, config)  # before any rank waits for another
    choose_kernels(config.train)
    timeout = timedelta(seconds=max(_MIN_TIMEOUT_S, config.train.collective_timeout_s + _MARGIN_S))
    if started > 1:
        _form_group(started, timeout)
    elif not has_meeting_address(os.environ):
        os.environ.pop("LOCAL_RANK", None)  # Accelerate would form a group of one, for which the address is missing
    # With several processes on a machine without GPUs, Accelerate forms no group unless it is passed cpu=True.
    cpu = started > 1 and not torch.cuda.is_available()
    group = PartialState(cpu, timeout=timeout)  # its ranks agree on the precision
    check_world_size(group.num_processes, started, config)
    if started > 1:
        _long_wait_group = dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT)  # type: ignore[assignment]  # all ranks
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=_agree_on_precision(config.train.amp, started),
        kwargs_handlers=[
            # Buffers are averaged before each validation; DDP's broadcast would be another collective in each step.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    torch.set_num_threads(config.train.cpu_threads)  # after Accelerate, which sets its own number for CPU processes
    _check_accelerator(accelerator)
    set_seed(config.project.seed)
    return accelerator


def _form_group(world_size: int, timeout: timedelta) -> None:
    """Form the group through a file or at MASTER_ADDR and MASTER_PORT; Accelerate then uses this group."""
    backend = "nccl" if torch.cuda.is_available() and not _on_cpu(os.environ) else "gloo"
    store: Store
    if MEETING_FILE in os.environ:
        store = FileStore(os.environ[MEETING_FILE], world_size)
    else:
        store = meet(MeetingPoint.from_environment(os.environ), timeout, _say)
    rank = rank_by_environment()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_world_size(world_size: int, started: int, config: Config) -> None:
    """Check the size of the process group against the number of started processes and the config.

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
            f"it can't be split among {world_size} processes"
        )


def _agree_on_precision(amp: bool | str, started: int) -> str:
    """Return the precision that the main process chooses for all ranks. All ranks must call.

    Raises:
        ProcessError: the main process's device does not support it.
        RankLocalError: this rank's device does not support it.
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
    """Translate train.amp to Accelerate's `mixed_precision`: if true, from `accelerate launch`, else the device's best.

    Raises:
        ProcessError: the device does not support it.
    """
    on_cuda = torch.cuda.is_available() and not _on_cpu(environment)
    if isinstance(amp, str):
        chosen = amp
    elif not amp:
        return "no"
    else:
        requested = environment.get("ACCELERATE_MIXED_PRECISION", "no")
        best = "no" if not on_cuda else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        chosen = requested if requested in ("fp16", "bf16") else best
    _check_precision(chosen, environment)
    return chosen


def can_compute_in(precision: str) -> bool:
    """Return whether this process's device supports the precision."""
    try:
        _check_precision(precision, os.environ)
    except ProcessError:
        return False
    return True


def _check_precision(precision: str, environment: Mapping[str, str]) -> None:
    on_cuda = torch.cuda.is_available() and not _on_cpu(environment)
    if precision == "fp16" and not on_cuda:
        raise ProcessError(
            "fp16 needs a GPU: set train.amp to bf16 or false, or remove mixed_precision from Accelerate's config"
        )
    if precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ProcessError(
            "bf16 needs a GPU of compute capability 8.0 (A100, RTX 30) or newer: set train.amp to fp16 or false, or "
            "remove mixed_precision from Accelerate's config"
        )


def encode_stop(device: torch.device) -> torch.Tensor:
    """Encode this process's stop request as a one-hot (signals,) float32, to be summed over the ranks."""
    requested = stop_requested()
    return torch.tensor([float(number == requested) for number in STOP_SIGNALS], device=device)


def decode_stop(stops: torch.Tensor) -> int | None:
    """Return the signal that any rank received, from the sum of all ranks' `encode_stop`; None if none did."""
    return next((number for number, count in zip(STOP_SIGNALS, stops.tolist(), strict=True) if count), None)


def raise_stop(stops: torch.Tensor) -> None:
    """Raise `Interrupted` on all ranks alike, from the sum of their `encode_stop`.

    Raises:
        Interrupted: a rank received a signal.
    """
    number = decode_stop(stops)
    if number is not None:
        raise Interrupted(number)


def agree_on_stop(accelerator: Accelerator) -> None:
    """Stop on all ranks together if any was asked to. All ranks must call.

    Raises:
        Interrupted: a rank received a signal.
    """
    raise_stop(accelerator.reduce(encode_stop(accelerator.device), reduction="sum"))


def on_main(accelerator: Accelerator, function: Callable[[], _T]) -> _T:
    """Call the function on the main process and return its result on every process. All ranks must call.

    If it raises, so does every other process, so that none is left waiting.
    """
    if accelerator.num_processes == 1:
        return function()
    box: list[object] = [None]
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            box[0] = function()
        except Exception as raised:  # noqa: BLE001 (re-raised below, once the others know)
            error, box[0] = raised, _Failure(str(raised))
    _broadcast(box)
    if error is not None:
        raise error
    if isinstance(box[0], _Failure):
        raise ProcessError(box[0].message)
    return box[0]  # type: ignore[return-value]


def await_all(accelerator: Accelerator) -> None:
    """Wait, however long it takes, until every process has called this. All ranks must call."""
    if accelerator.num_processes > 1:
        dist.barrier(group=_long_wait_group)


def gather_rows(accelerator: Accelerator, own_B: torch.Tensor) -> torch.Tensor:
    """Gather each rank's (n,) CPU tensor as (ranks, n) on every rank. All ranks must call, with the same n."""
    if accelerator.num_processes == 1 or own_B.numel() == 0:
        return own_B.repeat(accelerator.num_processes, 1)
    rows = [torch.empty_like(own_B) for _ in range(accelerator.num_processes)]
    dist.all_gather(rows, own_B, group=_long_wait_group)
    return torch.stack(rows)


def has_scaler(accelerator: Accelerator) -> bool:
    """Return whether gradients are scaled, which only fp16 needs."""
    return accelerator.scaler is not None and bool(accelerator.scaler.is_enabled())


def list_devices(accelerator: Accelerator) -> list[str]:
    """List the ranks' devices, such as `NVIDIA H100 80GB HBM3` or `cpu`. All ranks must call."""
    device = accelerator.device
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    names = [own] * accelerator.num_processes
    if accelerator.num_processes > 1:
        dist.all_gather_object(names, own, group=_long_wait_group)
    return names


def _broadcast(box: list[object]) -> None:
    """Send the main process's objects to all, through main memory and with the long timeout."""
    dist.broadcast_object_list(box, src=0, group=_long_wait_group, device=torch.device("cpu"))


class _Failure:
    def __init__(self, message: str) -> None:
        self.message = message


def _check_accelerator(accelerator: Accelerator) -> None:
    """Reject options of `accelerate launch` that would silently change the results."""
    settings = {
        "gradient accumulation (train.batch_size and train.micro_batch_size decide it)":
            accelerator.gradient_accumulation_steps != 1,
        "a dynamo backend (train.compile decides it)":
            accelerator.state.dynamo_plugin.backend not in (None, DynamoBackend.NO),
        f"{accelerator.distributed_type} (only plain data parallelism is supported)":
            accelerator.distributed_type not in _SUPPORTED_TYPES,
    }  # fmt: skip
    rejected = [name for name, is_set in settings.items() if is_set]
    if rejected:
        raise ProcessError(
            f"accelerate launch sets {' and '.join(rejected)}: remove this from its config file or flags"
        )


def _check_launch(environment: Mapping[str, str]) -> None:
    """Reject launches that would start other processes than intended, without a warning.

    `accelerate launch --cpu --num_processes 2`, for one, sets a rendezvous but starts only one process.
    """
    if {"MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"} <= environment.keys() and "WORLD_SIZE" not in environment:
        raise ProcessError(
            "accelerate launch was asked for several processes but started one (its --cpu form does that). "
            "Use `accelerate launch --config_file accelerate_configs/cpu_2.yaml -m doccls.train ...`, or "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m doccls.train ...`. "
            "(For a single process, unset MASTER_ADDR and MASTER_PORT, which this shell exports.)"
        )
    counts = [f"{name}={environment[name]}" for name in _TASK_COUNT_VARIABLES if _is_several(environment, name)]
    if counts and "RANK" not in environment:
        raise ProcessError(
            f"started as one of several processes ({', '.join(counts)}) without a rank: each would train everything. "
            "srun and mpirun start processes but form no process group. Use `sbatch slurm/kfold.sh CONFIG`, "
            "`doccls-launch run --backend slurm`, or one `accelerate launch` per machine (docs/distributed.md)"
        )
    local = parse_whole_number(environment, "LOCAL_WORLD_SIZE", 1)
    rank = parse_whole_number(environment, "LOCAL_RANK", 0)
    if torch.cuda.is_available() and not _on_cpu(environment) and rank >= torch.cuda.device_count() == 1:
        raise ProcessError(
            f"LOCAL_RANK={rank}, but this process sees only one GPU: make all GPUs of the machine visible to each "
            "process (srun without --gpus-per-task and --gpu-bind; CUDA_VISIBLE_DEVICES with all of them)"
        )
    if torch.cuda.is_available() and not _on_cpu(environment) and local > torch.cuda.device_count():
        raise ProcessError(
            f"{local} processes were started on this machine, but only {torch.cuda.device_count()} GPUs are visible: "
            f"use accelerate launch --num_processes {torch.cuda.device_count()} ..."
        )


def _is_several(environment: Mapping[str, str], name: str) -> bool:
    return parse_whole_number(environment, name, 1) > 1


def _check_device(environment: Mapping[str, str]) -> None:
    """Reject devices that Accelerate would silently replace by the CPU.

    These are a GPU that NVML lists but torch can't use, and XPU or MPS devices for several processes.

    Raises:
        ProcessError: this process would use such a device.
    """
    if environment.get(DEVICE) == "cuda" and not torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        raise ProcessError(
            f"this process was given a GPU (CUDA_VISIBLE_DEVICES={visible}) that PyTorch can't use: {_explain_cuda()}. "
            "Install a PyTorch build for the machine's driver (https://pytorch.org/get-started/locally), or train on "
            "CPUs (doccls-launch run --slots N)"
        )
    others = {"xpu": torch.xpu.is_available(), "mps": torch.backends.mps.is_available()}
    available = [name for name, is_available in others.items() if is_available]
    if available and _is_several(environment, "WORLD_SIZE") and not _on_cpu(environment):
        raise ProcessError(
            f"several processes on {available[0]} devices are not supported, only on CUDA and ROCm GPUs: train with "
            "one process, or on CPUs (ACCELERATE_USE_CPU=true)"
        )


def _explain_cuda() -> str:
    """Return why torch can't use the machine's GPUs, from its own error."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].rstrip(".")
    return "it found no GPU"


def _on_cpu(environment: Mapping[str, str]) -> bool:
    return parse_flag(environment, "ACCELERATE_USE_CPU")
