"""Where folds are trained: slots of this machine, the slot that a batch task is, and what a submitted task asks for."""

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
    list_cpus,
    set_aside,
    shows_none,
)
from launcher.plan import Slot, make_slots
from launcher.slurm.format import Allocation, count_gpus, parse_allocation
from launcher.slurm.script import JobRequest, find_gpu_request

_FOR_GPUS = {"gpus": None, "gpus_per_fold": None, "folds_per_gpu": 1, "exclude_busy": False}
"""Options that mean nothing without GPUs, and their defaults."""
_AUTO_WORKERS = 2
"""What CPUs are asked for, for each process, where data.num_workers is auto: it takes what the job gets."""
_ONLY_SLURM = (
    "nodes", "cpus_per_task", "partition", "account", "qos", "constraint", "time", "mem", "gres", "at_once", "setup",
    "sbatch_arg", "wait",
)  # fmt: skip
_ONLY_LOCAL = {"gpus": None, "folds_per_gpu": 1, "exclude_busy": False, "slots": None, "fail_fast": False}
"""And their defaults."""


@dataclass(frozen=True)
class ChosenSlots:
    """Where folds are trained, and what the plan says of the devices."""

    slots: tuple[Slot, ...]
    warnings: tuple[str, ...]


def choose_slots(arguments: argparse.Namespace, config: Config) -> ChosenSlots:
    """The slots that the arguments ask for, on the devices that are there.

    Raises:
        UserError: more is asked for than there is, or one thing and its opposite.
    """
    stated = [name for name in _ONLY_SLURM if getattr(arguments, name, None)]
    if stated:
        raise UserError(f"{_join_options(stated)}: only with --backend slurm")
    if arguments.gpus_per_fold == 0:
        raise UserError("--gpus-per-fold 0: --slots N computes on this machine's CPUs")
    ranks = _count_ranks(arguments, config)
    for_gpus = [name for name, default in _FOR_GPUS.items() if getattr(arguments, name) != default]
    if arguments.slots is not None and for_gpus:
        raise UserError(f"--slots computes on CPUs: leave out {_join_options(for_gpus)}")
    warnings: list[str] = []
    if arguments.slots is None:
        gpus, warnings = _choose_local_gpus(arguments)
        if gpus:
            return ChosenSlots(make_slots(gpus, ranks, arguments.folds_per_gpu), tuple(warnings))
        if for_gpus:
            raise UserError(f"no GPU is visible: leave out {_join_options(for_gpus)}, or say --slots N")
        if other := find_other_accelerator():
            raise UserError(
                f"{other}, and doccls-launch places folds on NVIDIA GPUs and CPUs alone: train the folds one by one "
                "(python -m doccls.train), or compute on CPUs (--slots N)"
            )
    fitting = max(ranks, count_cores() // config.train.cpu_threads)
    return ChosenSlots(make_slots(list_cpus(arguments.slots or fitting), ranks), tuple(warnings))


def _choose_local_gpus(arguments: argparse.Namespace) -> tuple[list[Device], list[str]]:
    """The GPUs to use, and warnings of those that are not used, or not alone. The driver is asked if any can be meant.

    Raises:
        UserError: GPUs are asked for that can't be used so, or none of those that are there can be.
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
    """The usable GPUs of those that are visible and wanted (--gpus), and warnings of the others."""
    named = choose_gpus(find_gpus(), visible, wanted)
    gpus, warnings = set_aside(named, exclude_busy)
    if named and not gpus:
        raise UserError(f"{'; '.join(warnings)}: nvidia-smi may say more; --slots N computes on CPUs")
    check_mig(gpus)
    return gpus, warnings


def _count_ranks(arguments: argparse.Namespace, config: Config) -> int:
    """Processes of each fold."""
    expected: int | None = config.train.num_processes
    if arguments.gpus_per_fold is not None and expected not in (None, arguments.gpus_per_fold):
        raise UserError(f"--gpus-per-fold {arguments.gpus_per_fold}, but train.num_processes = {expected}")
    ranks: int = arguments.gpus_per_fold or expected or 1
    _check_batch(config, ranks)
    return ranks


def _check_batch(config: Config, ranks: int) -> None:
    if ranks > config.train.batch_size:
        raise UserError(f"train.batch_size = {config.train.batch_size}: {ranks} processes can't share that batch")


def _join_options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def make_request(arguments: argparse.Namespace, config: Config) -> tuple[JobRequest, int]:
    """What each task of an array is to get, and how many processes a fold has then.

    Raises:
        UserError: one thing is asked for and its opposite.
    """
    stated = [name for name, default in _ONLY_LOCAL.items() if getattr(arguments, name, default) != default]
    if stated:
        raise UserError(f"{_join_options(stated)}: only on this machine (--backend local)")
    nodes = arguments.nodes or 1
    gpus = _count_requested_gpus(arguments, nodes)
    expected = config.train.num_processes
    if gpus and expected not in (None, gpus):
        raise UserError(f"{gpus} GPUs a fold (--gpus-per-fold, --gres), but train.num_processes = {expected}")
    ranks = gpus or expected or nodes
    if ranks % nodes:
        raise UserError(f"{ranks} processes of a fold do not divide by --nodes {nodes}")
    _check_batch(config, ranks)
    workers = _AUTO_WORKERS if config.data.num_workers == "auto" else config.data.num_workers
    own = ranks // nodes * max(config.train.cpu_threads, 1 + workers)
    request = JobRequest(
        nodes=nodes,
        gpus_per_node=0 if gpus == 0 else ranks // nodes,
        cpus_per_task=arguments.cpus_per_task or own,
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
    """--gres with the GPUs that it does not ask for: sbatch takes one --gres alone."""
    gres: str | None = arguments.gres
    if gres is None or arguments.gpus_per_fold == 0 or find_gpu_request([f"--gres={gres}", *arguments.sbatch_arg]):
        return gres
    return f"gpu:{gpus_per_node},{gres}"


def _count_requested_gpus(arguments: argparse.Namespace, nodes: int) -> int | None:
    """GPUs of a fold on all its nodes, by --gpus-per-fold or by what sbatch is asked for; None if nothing says.

    Raises:
        UserError: both say, and not the same.
    """
    gres = None if arguments.gres is None else f"--gres={arguments.gres}"
    request = find_gpu_request([*arguments.sbatch_arg, *([gres] if gres else [])])
    if request is None:
        return arguments.gpus_per_fold  # type: ignore[no-any-return]
    option, value = request
    gpus = count_gpus(value) * (1 if option in ("--gpus", "-G") else nodes)
    if arguments.gpus_per_fold not in (None, gpus):
        raise UserError(
            f"--gpus-per-fold {arguments.gpus_per_fold}, but {option}={value} asks for {gpus} (--nodes {nodes})"
        )
    return gpus


def choose_task_slots(config: Config, allocation: Allocation | None, name: str) -> ChosenSlots:
    """The one slot that a task of a batch system is, whose folds are trained one after the other.

    On one node: its GPUs, found as `doccls-launch run` finds them, or as many CPU processes as the config states.

    Raises:
        UserError: the task has something else than the config asks for, or GPUs that are not there.
    """
    if allocation is not None and allocation.stated_gpus not in (None, 0, allocation.gpus_per_node):
        raise UserError(
            f"--gpus-per-node={allocation.stated_gpus}, but the job has {allocation.gpus_per_node} GPUs a node: "
            "slurm/kfold.sh asks for --gres=gpu:1, which another --gres replaces: sbatch --gres=gpu:N"
        )
    if allocation is not None and allocation.nodes > 1:
        return ChosenSlots((_make_slot_of_nodes(allocation, config, name),), ())
    gpus, warnings = _choose_job_gpus(allocation)
    ranks = config.train.num_processes or len(gpus) or 1
    if gpus and ranks != len(gpus):
        raise UserError(
            f"train.num_processes = {ranks}, but {name} has {len(gpus)} GPUs: ask the batch system for {ranks} "
            "(Slurm: sbatch --gres=gpu:N)"
        )
    _check_batch(config, ranks)
    return ChosenSlots(make_slots(gpus or list_cpus(ranks), ranks), tuple(warnings))


def _choose_job_gpus(allocation: Allocation | None, exclude_busy: bool = False) -> tuple[list[Device], list[str]]:
    """The GPUs of this machine that are this process's to use, and warnings; of a job of Slurm, those of the job.

    Raises:
        UserError: Slurm gave the job another number of GPUs than are visible.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allocation is None:
        return ([], []) if shows_none(visible) else _choose_gpus(visible, None, exclude_busy)
    if allocation.stated_gpus == 0:
        return [], []
    if not allocation.gpus_per_node and (visible is None or shows_none(visible)):
        return [], _warn_of_unused_gpus() if visible is None else []
    _check_driver(allocation)
    shown = [] if shows_none(visible) else choose_gpus(find_gpus(), visible, None)
    if allocation.gpus_per_node not in (0, len(shown)):
        raise UserError(
            f"Slurm gave this job {allocation.gpus_per_node} GPUs, but {len(shown)} are visible on "
            f"{socket.gethostname()} (CUDA_VISIBLE_DEVICES={visible}): let that variable name the job's own"
        )
    return _choose_gpus(visible, None, exclude_busy)


def _warn_of_unused_gpus() -> list[str]:
    """What to say in a job without GPUs on a machine that has some; a driver that does not answer is no matter here."""
    with suppress(UserError):
        if others := [gpu for gpu in find_gpus() if not gpu.fault]:
            return [f"the {len(others)} GPUs of this machine are not used: this job of Slurm has none"]
    return []


def _check_driver(allocation: Allocation) -> None:
    if allocation.gpus_per_node and all(gpu.fault for gpu in find_gpus()):
        raise UserError(
            f"Slurm gave this job {allocation.nodes} nodes x {allocation.gpus_per_node} GPUs, but the NVIDIA driver of "
            f"{socket.gethostname()} shows none: ask the cluster's admin; sbatch --gres=none computes on CPUs"
        )


def _make_slot_of_nodes(allocation: Allocation, config: Config, name: str) -> Slot:
    """The slot of a fold that spans the job's nodes: a process for each GPU, or as many as the config states."""
    _check_driver(allocation)
    expected, nodes, gpus_per_node = config.train.num_processes, allocation.nodes, allocation.gpus_per_node
    ranks_per_node = gpus_per_node or -(-(expected or 1) // nodes)
    ranks = nodes * ranks_per_node
    gave = f"Slurm gave job {name} {nodes} nodes"
    if expected not in (None, ranks):
        what = f"{gpus_per_node} GPUs" if gpus_per_node else "CPUs"
        raise UserError(f"train.num_processes = {expected}, but {gave} x {what}: state sbatch --nodes, --gres")
    if allocation.cpus_per_node < ranks_per_node:
        raise UserError(
            f"{gave} x {allocation.cpus_per_node} CPUs for {ranks_per_node} processes on each: sbatch --cpus-per-task=N"
        )
    _check_batch(config, ranks)
    kind = "gpu" if gpus_per_node else "cpu"
    places = [(node, place) for node in range(nodes) for place in range(ranks_per_node)]
    devices = [Device(f"node {node} {kind} {place}", given=bool(gpus_per_node)) for node, place in places]
    (slot,) = make_slots(devices, ranks)
    return slot
