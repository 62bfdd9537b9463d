"""Placement of folds: the slots of this machine, the slot of a batch task, and the resources of a submitted task."""

import argparse
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from doccls.config import Config
from doccls.errors import UserError
from doccls.system.cores import count_cores
from launcher.devices import (
    Device,
    check_mig,
    choose_gpus,
    find_gpus,
    find_other_accelerator,
    hides_all_gpus,
    list_cpus,
    select_usable,
)
from launcher.plan import Slot, make_slots
from launcher.slurm.format import Allocation, count_gpus, parse_allocation
from launcher.slurm.script import JobRequest, find_gpu_request

# Options that need GPUs, and their defaults.
_FOR_GPUS = {"gpus": None, "gpus_per_fold": None, "folds_per_gpu": 1, "exclude_busy": False}
_AUTO_WORKERS = 2  # CPUs to request per process for data.num_workers = auto, which uses what the job gets
_ONLY_SLURM = (
    "nodes", "cpus_per_task", "partition", "account", "qos", "constraint", "time", "mem", "gres", "at_once", "setup",
    "sbatch_arg", "wait",
)  # fmt: skip
# Options of the local backend, and their defaults.
_ONLY_LOCAL = {"gpus": None, "folds_per_gpu": 1, "exclude_busy": False, "slots": None, "fail_fast": False}


@dataclass(frozen=True)
class ChosenSlots:
    """The slots that folds are trained on, and warnings about the devices."""

    slots: tuple[Slot, ...]
    warnings: tuple[str, ...]


def choose_slots(arguments: argparse.Namespace, config: Config) -> ChosenSlots:
    """Choose the slots that the arguments ask for among this machine's devices.

    Raises:
        UserError: the arguments ask for more than the machine has, or contradict each other.
    """
    stated = [name for name in _ONLY_SLURM if getattr(arguments, name, None)]
    if stated:
        raise UserError(f"{_join_options(stated)}: only with --backend slurm")
    if arguments.gpus_per_fold == 0:
        raise UserError("--gpus-per-fold 0: to train on this machine's CPUs, pass --slots N")
    ranks = _count_ranks(arguments, config)
    for_gpus = [name for name, default in _FOR_GPUS.items() if getattr(arguments, name) != default]
    if arguments.slots is not None and for_gpus:
        raise UserError(f"--slots trains on CPUs: leave out {_join_options(for_gpus)}")
    warnings: list[str] = []
    if arguments.slots is None:
        gpus, warnings = _choose_local_gpus(arguments)
        if gpus:
            return ChosenSlots(make_slots(gpus, ranks, arguments.folds_per_gpu), tuple(warnings))
        if for_gpus:
            raise UserError(f"no GPU is visible: leave out {_join_options(for_gpus)} to train on CPUs")
        if other := find_other_accelerator():
            raise UserError(
                f"{other}, but doccls-launch supports only NVIDIA GPUs and CPUs: train the folds one by one "
                "(python -m doccls.train), or train on CPUs (--slots N)"
            )
    num_cpus = arguments.slots or max(ranks, count_cores() // config.train.cpu_threads)
    return ChosenSlots(make_slots(list_cpus(num_cpus), ranks), tuple(warnings))


def _choose_local_gpus(arguments: argparse.Namespace) -> tuple[list[Device], list[str]]:
    """Return the GPUs to use, and warnings about unused and busy ones; the driver is queried only if GPUs can be meant.

    Raises:
        UserError: requested GPUs can't be used as requested, or none of the GPUs can be used.
    """
    if arguments.gpus is None:
        gpus, warnings = _choose_job_gpus(parse_allocation(os.environ), arguments.exclude_busy)
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus, warnings = _choose_gpus(visible, arguments.gpus, arguments.exclude_busy)
    exclusive = [gpu.name for gpu in gpus if gpu.exclusive]
    if exclusive and arguments.folds_per_gpu > 1:
        raise UserError(
            f"--folds-per-gpu {arguments.folds_per_gpu}: the compute mode of {', '.join(exclusive)} allows one process "
            "at a time (to change it: sudo nvidia-smi -c DEFAULT)"
        )
    return gpus, warnings


def _choose_gpus(visible: str | None, wanted: str | None, exclude_busy: bool = False) -> tuple[list[Device], list[str]]:
    """Return the usable ones of the GPUs that are visible and wanted (--gpus), and warnings about the others."""
    chosen = choose_gpus(find_gpus(), visible, wanted)
    gpus, warnings = select_usable(chosen, exclude_busy)
    if chosen and not gpus:
        raise UserError(f"{'; '.join(warnings)}: nvidia-smi may say more; --slots N trains on CPUs")
    check_mig(gpus)
    return gpus, warnings


def _count_ranks(arguments: argparse.Namespace, config: Config) -> int:
    """Return the number of processes per fold."""
    expected: int | None = config.train.num_processes
    if arguments.gpus_per_fold is not None and expected not in (None, arguments.gpus_per_fold):
        raise UserError(f"--gpus-per-fold {arguments.gpus_per_fold}, but train.num_processes = {expected}")
    ranks: int = arguments.gpus_per_fold or expected or 1
    _check_batch(config, ranks)
    return ranks


def _check_batch(config: Config, ranks: int) -> None:
    if ranks > config.train.batch_size:
        raise UserError(f"train.batch_size = {config.train.batch_size} is too small for {ranks} processes")


def _join_options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def make_request(arguments: argparse.Namespace, config: Config) -> tuple[JobRequest, int]:
    """Return the resources to request for each task of an array, and the resulting number of processes per fold.

    Raises:
        UserError: the arguments contradict each other or the config.
    """
    stated = [name for name, default in _ONLY_LOCAL.items() if getattr(arguments, name, default) != default]
    if stated:
        raise UserError(f"{_join_options(stated)}: only with --backend local")
    nodes = arguments.nodes or 1
    gpus = _count_requested_gpus(arguments, nodes)
    expected = config.train.num_processes
    if gpus and expected not in (None, gpus):
        raise UserError(f"{gpus} GPUs per fold (--gpus-per-fold, --gres), but train.num_processes = {expected}")
    ranks = gpus or expected or nodes
    if ranks % nodes:
        raise UserError(f"{ranks} processes per fold are not divisible by --nodes {nodes}")
    _check_batch(config, ranks)
    workers = _AUTO_WORKERS if config.data.num_workers == "auto" else config.data.num_workers
    cpus = ranks // nodes * max(config.train.cpu_threads, 1 + workers)
    request = JobRequest(
        nodes=nodes,
        gpus_per_node=0 if gpus == 0 else ranks // nodes,
        cpus_per_task=arguments.cpus_per_task or cpus,
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        constraint=arguments.constraint,
        time=arguments.time,
        mem=arguments.mem,
        gres=_complete_gres(arguments, ranks // nodes),
        at_once=arguments.at_once,
        others=tuple(arguments.sbatch_arg),
    )
    return request, ranks


def _complete_gres(arguments: argparse.Namespace, gpus_per_node: int) -> str | None:
    """Return --gres, with GPUs added if neither it nor --sbatch-arg asks for any: sbatch accepts only one --gres."""
    gres: str | None = arguments.gres
    if gres is None or arguments.gpus_per_fold == 0 or find_gpu_request([f"--gres={gres}", *arguments.sbatch_arg]):
        return gres
    return f"gpu:{gpus_per_node},{gres}"


def _count_requested_gpus(arguments: argparse.Namespace, nodes: int) -> int | None:
    """Return the GPUs per fold, on all its nodes, from --gpus-per-fold or sbatch's options; None if not stated.

    Raises:
        UserError: both state it and differ.
    """
    gres = None if arguments.gres is None else f"--gres={arguments.gres}"
    request = find_gpu_request([*arguments.sbatch_arg, *([gres] if gres else [])])
    if request is None:
        return arguments.gpus_per_fold  # type: ignore[no-any-return]
    option, value = request
    gpus = count_gpus(value) * (1 if option in ("--gpus", "-G") else nodes)
    if arguments.gpus_per_fold not in (None, gpus):
        raise UserError(
            f"--gpus-per-fold {arguments.gpus_per_fold}, but {option}={value} requests {gpus} (--nodes {nodes})"
        )
    return gpus


def choose_task_slots(config: Config, allocation: Allocation | None, name: str) -> ChosenSlots:
    """Return the single slot of a batch task, which trains its folds one after the other.

    On one node it has the GPUs that `doccls-launch run` would find, or as many CPU processes as the config states.

    Raises:
        UserError: the task's resources differ from what the config asks for, or its GPUs are not visible.
    """
    if allocation is not None and allocation.stated_gpus not in (None, 0, allocation.gpus_per_node):
        raise UserError(
            f"--gpus-per-node={allocation.stated_gpus}, but the job has {allocation.gpus_per_node} GPUs per node: "
            "slurm/kfold.sh requests --gres=gpu:1; override it with sbatch --gres=gpu:N"
        )
    if allocation is not None and allocation.nodes > 1:
        return ChosenSlots((_make_slot_of_nodes(allocation, config, name),), ())
    gpus, warnings = _choose_job_gpus(allocation)
    ranks = config.train.num_processes or len(gpus) or 1
    if gpus and ranks != len(gpus):
        raise UserError(
            f"train.num_processes = {ranks}, but {name} has {len(gpus)} GPUs: request {ranks} from the batch system "
            "(Slurm: sbatch --gres=gpu:N)"
        )
    _check_batch(config, ranks)
    return ChosenSlots(make_slots(gpus or list_cpus(ranks), ranks), tuple(warnings))


def _choose_job_gpus(allocation: Allocation | None, exclude_busy: bool = False) -> tuple[list[Device], list[str]]:
    """Return the GPUs that this process may use, in a Slurm job those of the job, and warnings.

    Raises:
        UserError: the number of visible GPUs differs from what Slurm gave the job.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allocation is None:
        return ([], []) if hides_all_gpus(visible) else _choose_gpus(visible, None, exclude_busy)
    if allocation.stated_gpus == 0:
        return [], []
    if not allocation.gpus_per_node and (visible is None or hides_all_gpus(visible)):
        return [], _warn_of_unused_gpus() if visible is None else []
    _check_driver(allocation)
    gpus = [] if hides_all_gpus(visible) else choose_gpus(find_gpus(), visible, None)
    if allocation.gpus_per_node not in (0, len(gpus)):
        raise UserError(
            f"Slurm gave this job {allocation.gpus_per_node} GPUs, but {len(gpus)} are visible on "
            f"{socket.gethostname()} (CUDA_VISIBLE_DEVICES={visible}): set that variable to the job's GPUs"
        )
    return _choose_gpus(visible, None, exclude_busy)


def _warn_of_unused_gpus() -> list[str]:
    """Warn in a job without GPUs that the machine has some; a driver that does not answer does not matter here."""
    with suppress(UserError):
        if unused := [gpu for gpu in find_gpus() if not gpu.fault]:
            return [f"the {len(unused)} GPUs of this machine are not used: this Slurm job has none"]
    return []


def _check_driver(allocation: Allocation) -> None:
    if allocation.gpus_per_node and all(gpu.fault for gpu in find_gpus()):
        raise UserError(
            f"Slurm gave this job {allocation.nodes} nodes x {allocation.gpus_per_node} GPUs, but the NVIDIA driver of "
            f"{socket.gethostname()} shows none: ask the cluster's admin, or train on CPUs (sbatch --gres=none)"
        )


def _make_slot_of_nodes(allocation: Allocation, config: Config, name: str) -> Slot:
    """Return the slot of a fold that spans the job's nodes, with a process per GPU or as many as the config states."""
    _check_driver(allocation)
    expected, nodes, gpus_per_node = config.train.num_processes, allocation.nodes, allocation.gpus_per_node
    ranks_per_node = gpus_per_node or -(-(expected or 1) // nodes)
    ranks = nodes * ranks_per_node
    problem = f"Slurm gave job {name} {nodes} nodes"
    if expected not in (None, ranks):
        resource = f"{gpus_per_node} GPUs" if gpus_per_node else "CPUs"
        raise UserError(f"train.num_processes = {expected}, but {problem} x {resource}: pass sbatch --nodes, --gres")
    if allocation.cpus_per_node < ranks_per_node:
        raise UserError(
            f"{problem} x {allocation.cpus_per_node} CPUs for {ranks_per_node} processes on each: "
            "pass sbatch --cpus-per-task=N"
        )
    _check_batch(config, ranks)
    kind = "gpu" if gpus_per_node else "cpu"
    local_ranks = [(node, local_rank) for node in range(nodes) for local_rank in range(ranks_per_node)]
    devices = [Device(f"node {node} {kind} {number}", given=bool(gpus_per_node)) for node, number in local_ranks]
    (slot,) = make_slots(devices, ranks)
    return slot
