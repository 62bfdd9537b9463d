"""Folds still to do x slots -> what runs where, in which order, by which commands; pure."""

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
    """Where one fold at a time is trained."""

    number: int
    devices: tuple[Device, ...]
    """One for each rank of the fold."""

    @property
    def name(self) -> str:
        """Such as `gpu 0,1` or `cpu 3`."""
        kind, _, _ = self.devices[0].name.rpartition(" ")
        return f"{kind} {','.join(device.name.removeprefix(f'{kind} ') for device in self.devices)}".strip()


def make_slots(devices: Sequence[Device], ranks_per_fold: int, folds_per_device: int = 1) -> tuple[Slot, ...]:
    """Neighbouring devices make a group of `ranks_per_fold`; each group is `folds_per_device` slots.

    The first slots are one of each group.

    Raises:
        UserError: there are fewer devices than one fold needs.
    """
    assert ranks_per_fold >= 1 and folds_per_device >= 1
    count = len(devices) // ranks_per_fold
    if count == 0:
        there = ", ".join(device.name for device in devices) or "none"
        raise UserError(f"one fold takes {ranks_per_fold} devices, and there are {len(devices)}: {there}")
    groups = [tuple(devices[group * ranks_per_fold : (group + 1) * ranks_per_fold]) for group in range(count)]
    return tuple(Slot(number, group) for number, group in enumerate(groups * folds_per_device))


def assign_slots(waiting: Sequence[int], busy: Sequence[Slot], slots: Sequence[Slot]) -> list[tuple[int, Slot]]:
    """The folds to start now: those that wait, in order, each in a free slot on the devices that the fewest share.

    Whoever starts them whenever a fold has ended needs at most the time of list scheduling: total work by the number of
    slots, and one more fold (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
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
    """One process of a fold."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """Beside what the launcher's own says; several ranks of a fold are also told where they meet."""


@dataclass(frozen=True)
class Assignment:
    """One fold in one slot."""

    fold: int
    slot: Slot
    ranks: tuple[RankCommand, ...]


@dataclass(frozen=True)
class Workload:
    """What all folds of a launch share."""

    python: str
    words: tuple[str, ...]
    """Arguments of `doccls.train`: all but the fold."""
    threads: int
    """CPU threads of each process."""

    def assign(self, fold: int, slot: Slot, micro_batch_size: int | None = None) -> Assignment:
        """How the fold is trained in the slot; with a micro-batch size, if the config's own is too large."""
        argv = (self.python, "-m", "doccls.train", *self.words, "--set", f"data.valid_fold={fold}")
        if micro_batch_size is not None:
            argv += ("--set", f"train.micro_batch_size={micro_batch_size}")
        ranks = range(len(slot.devices))
        told = [render_environment(slot.devices, rank, self.threads) for rank in ranks]
        return Assignment(fold, slot, tuple(RankCommand(argv, environment) for environment in told))


@dataclass(frozen=True)
class LaunchPlan:
    """What a launch does."""

    run_folder: str
    finished: tuple[int, ...]
    """Folds that were asked for and are done."""
    waves: tuple[tuple[Assignment, ...], ...]
    """A fold starts when a slot is free: the waves are what comes of it if all take equally long."""
    files: tuple[str, ...]
    """To come in the run's folder."""
    warnings: tuple[str, ...]
    batch_size: int
    """Images in one optimizer step of a fold."""
    images_at_a_time: int
    """Most images that one process takes through the model at once."""


_OF_A_GROUP = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "ACCELERATE_USE_CPU", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", DEVICE,
)  # fmt: skip
_OF_A_JOB = ("SLURM_", "SLURMD_", "PMI_", "PMIX_", "OMPI_", "PRTE_", "MV2_COMM_WORLD_", "TORCHELASTIC_")
"""Beginnings of the variables by which job steps, MPI and torchrun say which process of how many this is."""
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Where Slurm's controller is, and who asks it: the same within a job and outside."""


def drop_job_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the words of an enclosing job or launcher: on ranks, steps, CPU bindings, limits."""
    return {
        name: value
        for name, value in environment.items()
        if name in _OF_THE_CLUSTER or not (name in _OF_A_GROUP or name.startswith(_OF_A_JOB))
    }


def plan_waves(folds: Sequence[int], slots: Sequence[Slot], workload: Workload) -> tuple[tuple[Assignment, ...], ...]:
    """Give each fold a slot, wave after wave."""
    assignments = [workload.assign(fold, slots[place % len(slots)]) for place, fold in enumerate(folds)]
    return tuple(tuple(assignments[start : start + len(slots)]) for start in range(0, len(folds), len(slots)))


def warn_of_threads(slots: Sequence[Slot], folds: int, threads: int, cores: int) -> list[str]:
    """What to say when more threads would compute than there are cores."""
    processes = sum(len(slot.devices) for slot in slots[:folds] if slot.devices[0].is_cpu)
    if processes * threads <= cores:
        return []
    return [
        f"{processes} processes x {threads} threads (train.cpu_threads) on {cores} cores: they will wait for each other"
    ]


def render_plan(plan: LaunchPlan, commands: bool = True) -> str:
    """The plan in lines for people; `commands` are those that do the same by hand."""
    lines = [f"[PLAN] run {plan.run_folder}"]
    if plan.finished:
        lines.append(f"[PLAN] finished before: folds {', '.join(map(str, plan.finished))}")
    lines += [f"[WARNING] {warning}" for warning in plan.warnings]
    for number, wave in enumerate(plan.waves):
        for one in wave:
            ranks = f" ranks={len(one.ranks)}" if len(one.ranks) > 1 else ""
            later = ", or where it is free first" if number else ""
            lines.append(f"[PLAN] wave {number + 1}: fold {one.fold} on {one.slot.name}{ranks}{later}")
            if commands:
                lines.append(f"           {render_command(one)}")
    if plan.waves:
        processes = len(plan.waves[0][0].ranks)
        shared, each = (f" on {processes} processes", " on each") if processes > 1 else ("", "")
        lines.append(f"[PLAN] a step takes {plan.batch_size} images{shared}, {plan.images_at_a_time} at a time{each}")
    if commands:
        lines += [f"[PLAN] to come: {file}" for file in plan.files]
    return "\n".join(lines)


def render_command(one: Assignment) -> str:
    """The command line that does the same by hand."""
    told, argv = one.ranks[0].environment, one.ranks[0].argv
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = [f"{name}={value}" for name, value in told.items() if name not in ours]
    if len(one.ranks) == 1:
        return shlex.join(["env", *environment, *argv])
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(len(one.ranks))]
    return shlex.join(["env", *environment, argv[0], *accelerate, "--main_process_port", "0", *argv[1:]])


def describe_plan(plan: LaunchPlan) -> dict[str, Any]:
    """The plan for scripts, as JSON values."""
    return asdict(plan)
