"""The plan of a launch: which fold runs in which slot, in which order, by which command; pure."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from doccls.errors import UserError
from doccls.system.rank import DEVICE
from launcher.devices import Device, render_environment


@dataclass(frozen=True)
class Slot:
    """The devices, one per rank, on which one fold at a time is trained."""

    number: int
    devices: tuple[Device, ...]

    @property
    def name(self) -> str:
        """The slot's name, such as `gpu 0,1` or `cpu 3`."""
        kind, _, _ = self.devices[0].name.rpartition(" ")
        return f"{kind} {','.join(device.name.removeprefix(f'{kind} ') for device in self.devices)}".strip()


def make_slots(devices: Sequence[Device], ranks_per_fold: int, folds_per_device: int = 1) -> tuple[Slot, ...]:
    """Group neighbouring devices by `ranks_per_fold`, and make `folds_per_device` slots of each group.

    The first slots have one of each group, so that folds share a device only when all devices are in use.

    Raises:
        UserError: there are fewer devices than one fold needs.
    """
    assert ranks_per_fold >= 1 and folds_per_device >= 1
    count = len(devices) // ranks_per_fold
    if count == 0:
        names = ", ".join(device.name for device in devices) or "none"
        raise UserError(f"one fold takes {ranks_per_fold} devices, and there are {len(devices)}: {names}")
    groups = [tuple(devices[group * ranks_per_fold : (group + 1) * ranks_per_fold]) for group in range(count)]
    return tuple(Slot(number, group) for number, group in enumerate(groups * folds_per_device))


def assign_slots(waiting: Sequence[int], busy: Sequence[Slot], slots: Sequence[Slot]) -> list[tuple[int, Slot]]:
    """Return the folds to start now: the waiting ones in order, each in a free slot on the least shared devices.

    Called whenever a fold has ended, this is list scheduling: the launch takes at most the total work divided by the
    number of slots, plus one fold (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
    """
    taken = list(busy)
    starts: list[tuple[int, Slot]] = []
    for fold in waiting:
        numbers = {slot.number for slot in taken}
        sharing = Counter(slot.devices for slot in taken)
        free = [slot for slot in slots if slot.number not in numbers]
        if not free:
            break
        slot = min(free, key=lambda slot: (sharing[slot.devices], slot.number))
        starts.append((fold, slot))
        taken.append(slot)
    return starts


@dataclass(frozen=True)
class RankCommand:
    """The command of one rank, and the variables to add to the launcher's environment.

    Backends add the rendezvous of folds with several ranks.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Assignment:
    """One fold in one slot, with the commands of its ranks."""

    fold: int
    slot: Slot
    ranks: tuple[RankCommand, ...]


@dataclass(frozen=True)
class Workload:
    """The command that all folds of a launch share."""

    python: str
    words: tuple[str, ...]  # arguments of `doccls.train`, without the fold
    threads: int  # CPU threads of each process

    def assign(self, fold: int, slot: Slot, micro_batch_size: int | None = None) -> Assignment:
        """Return the commands that train the fold in the slot; a micro-batch size overrides that of the config."""
        argv = (self.python, "-m", "doccls.train", *self.words, "--set", f"data.valid_fold={fold}")
        if micro_batch_size is not None:
            argv += ("--set", f"train.micro_batch_size={micro_batch_size}")
        ranks = range(len(slot.devices))
        environments = [render_environment(slot.devices, rank, self.threads) for rank in ranks]
        return Assignment(fold, slot, tuple(RankCommand(argv, environment) for environment in environments))


@dataclass(frozen=True)
class LaunchPlan:
    """The folds that a launch trains, in waves, and the files that it writes.

    A fold starts as soon as a slot is free: the waves show the order if all folds take equally long.
    """

    run_folder: str
    finished: tuple[int, ...]  # requested folds that are done
    waves: tuple[tuple[Assignment, ...], ...]
    files: tuple[str, ...]  # to be written in the run's folder
    warnings: tuple[str, ...]
    batch_size: int  # images in one optimizer step of a fold
    images_at_a_time: int  # most images that one process takes through the model at once


_GROUP_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "ACCELERATE_USE_CPU", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", DEVICE,
)  # fmt: skip
# Prefixes of the variables by which job steps, MPI and torchrun pass a process its rank and world size.
_JOB_PREFIXES = ("SLURM_", "SLURMD_", "PMI_", "PMIX_", "OMPI_", "PRTE_", "MV2_COMM_WORLD_", "TORCHELASTIC_")
# Address of and credentials for Slurm's controller: the same inside a job and outside.
_CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")


def drop_job_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the ranks, steps, CPU bindings and limits of an enclosing job or launcher."""
    return {
        name: value
        for name, value in environment.items()
        if name in _CLUSTER_VARIABLES or not (name in _GROUP_VARIABLES or name.startswith(_JOB_PREFIXES))
    }


def plan_waves(folds: Sequence[int], slots: Sequence[Slot], workload: Workload) -> tuple[tuple[Assignment, ...], ...]:
    """Assign a slot to each fold, wave after wave."""
    assignments = [workload.assign(fold, slots[number % len(slots)]) for number, fold in enumerate(folds)]
    return tuple(tuple(assignments[start : start + len(slots)]) for start in range(0, len(folds), len(slots)))


def warn_of_threads(slots: Sequence[Slot], folds: int, threads: int, cores: int) -> list[str]:
    """Return a warning if more threads would compute than there are cores."""
    processes = sum(len(slot.devices) for slot in slots[:folds] if slot.devices[0].is_cpu)
    if processes * threads <= cores:
        return []
    return [
        f"{processes} processes x {threads} threads (train.cpu_threads) on {cores} cores: they will wait for each other"
    ]


def render_plan(plan: LaunchPlan, commands: bool = True) -> str:
    """Render the plan for people; with `commands`, also each fold's command line and the files to be written."""
    lines = [f"[PLAN] run {plan.run_folder}"]
    if plan.finished:
        lines.append(f"[PLAN] finished before: folds {', '.join(map(str, plan.finished))}")
    lines += [f"[WARNING] {warning}" for warning in plan.warnings]
    for number, wave in enumerate(plan.waves):
        for assignment in wave:
            ranks = f" ranks={len(assignment.ranks)}" if len(assignment.ranks) > 1 else ""
            later = ", or in the first free slot" if number else ""
            lines.append(f"[PLAN] wave {number + 1}: fold {assignment.fold} on {assignment.slot.name}{ranks}{later}")
            if commands:
                lines.append(f"           {render_fold_command(assignment)}")
    if plan.waves:
        processes = len(plan.waves[0][0].ranks)
        shared, each = (f" on {processes} processes", " on each") if processes > 1 else ("", "")
        lines.append(f"[PLAN] a step takes {plan.batch_size} images{shared}, {plan.images_at_a_time} at a time{each}")
    if commands:
        lines += [f"[PLAN] will write: {file}" for file in plan.files]
    return "\n".join(lines)


def render_fold_command(assignment: Assignment) -> str:
    """Render a shell command that trains the fold as the launcher does."""
    variables, argv = assignment.ranks[0].environment, assignment.ranks[0].argv
    rank_variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = [f"{name}={value}" for name, value in variables.items() if name not in rank_variables]
    if len(assignment.ranks) == 1:
        return shlex.join(["env", *environment, *argv])
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(len(assignment.ranks))]
    return shlex.join(["env", *environment, argv[0], *accelerate, "--main_process_port", "0", *argv[1:]])


def describe_plan(plan: LaunchPlan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return asdict(plan)
