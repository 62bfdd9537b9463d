"""The command line of `doccls-launch`, and what its words ask for: slots of this machine, and a plan."""

import argparse
import os
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from doccls.config import Config
from doccls.config.arguments import add_config_arguments
from doccls.config.load import redact_argument
from doccls.errors import UserError
from doccls.run.paths import RunPaths, locate_run
from doccls.system.cores import count_cores
from launcher.array import REQUEUE_CODE
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
from launcher.plan import LaunchPlan, Slot, Workload, make_slots, plan_waves, warn_of_threads
from launcher.slurm.format import Allocation, count_gpus, parse_allocation
from launcher.slurm.script import JobRequest, find_gpu_request


@dataclass(frozen=True)
class ChosenSlots:
    """Where folds are trained, and what the plan says of the devices."""

    slots: tuple[Slot, ...]
    warnings: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    """The command line of `doccls-launch`."""
    parser = argparse.ArgumentParser(
        prog="doccls-launch", description="Train the folds of one run side by side on this machine's GPUs or CPUs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train the folds that are missing, side by side, and merge them")
    plan = commands.add_parser("plan", help="say what run would do: which fold where, in which order; start nothing")
    task = commands.add_parser("task", help="within a task of a batch system's array: train its share of the folds")
    for command in (run, plan, task):
        _add_run_arguments(command)
        _add_policy_arguments(command)
    for command in (run, plan):
        command.add_argument("--backend", choices=("local", "slurm"), default="local", help="default: this machine")
        add_device_arguments(command)
        _add_slurm_arguments(command)
    _add_task_arguments(task)
    run.add_argument("--wait", action="store_true", help="with --backend slurm: return when the run has ended")
    plan.add_argument("--json", action="store_true", help="for scripts")
    merge = commands.add_parser("merge", help="merge the folds' OOF parts and metrics, wherever they were trained")
    status = commands.add_parser("status", help="say where each fold of a run stands, launched or not")
    status.add_argument("--json", action="store_true", help="for scripts")
    cancel = commands.add_parser("cancel", help="stop the launcher of a run and all its folds, in good order")
    for command in (merge, status, cancel):
        command.add_argument("run", type=Path, metavar="RUN", help="folder of the run: <exp_dir>/YYYYMMDD/<run_id>")
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--run-id", metavar="ID", help="name of the run; of an existing one only the rest is trained")


def _add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fail-fast", action="store_true", help="stop all folds when one has failed")
    parser.add_argument(
        "--max-restarts", type=_natural, default=2, metavar="N", help="of a fold that died or hung (default: 2)"
    )
    parser.add_argument(
        "--no-shrink",
        action="store_true",
        help="a fold that runs out of GPU memory fails; default: it goes on with smaller micro-batches",
    )
    parser.add_argument(
        "--hang-timeout",
        type=_duration,
        default=1800.0,
        metavar="TIME",
        help="kill and restart a fold without progress for so long: 90s, 30m (default), 2h; 0 is never",
    )
    parser.add_argument(
        "--stop-timeout",
        type=_override_stop_timeout,
        action="append",
        dest="overrides",
        metavar="TIME",
        help="how long a stop may take, with the write of the state: short for --set train.stop_timeout_s=SECONDS",
    )
    parser.add_argument(
        "--on-end",
        type=_command,
        metavar="CMD",
        help="at the end run CMD RUN_FOLDER OUTCOME, without a shell; OUTCOME is success, incomplete, submitted, "
        "stopped or failed",
    )
    parser.add_argument(
        "--allow-world-size-change",
        action="store_true",
        help="go on with folds that another number of processes began: the same batches, not the same bits",
    )


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        metavar="INDEX/COUNT",
        help="which task this is, from 0/5 to 4/5, or from 1/1-5 to 5/1-5; default: what Slurm, PBS, LSF, SGE or "
        "Kubernetes (JOB_COMPLETION_INDEX) says",
    )
    parser.add_argument("--share", action="store_true", help=argparse.SUPPRESS)  # older copies of slurm/kfold.sh say it
    parser.add_argument("--index-is-fold", action="store_true", help="train the fold of the task's index and no other")
    parser.add_argument(
        "--requeue-code",
        type=_natural,
        default=REQUEUE_CODE,
        metavar="CODE",
        help=f"exit code of a task that was asked to stop and can resume (default: {REQUEUE_CODE}, EX_TEMPFAIL)",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Where folds are trained: what `choose_slots` reads."""
    parser.add_argument("--gpus", metavar="LIST", help="as 0,1,3 (nvidia-smi's numbers) or UUIDs; default: all visible")
    parser.add_argument(
        "--gpus-per-fold", type=_natural, metavar="N", help="train each fold on N (default: train.num_processes, or 1)"
    )
    parser.add_argument("--folds-per-gpu", type=count, default=1, metavar="N", help="small models: N share a GPU")
    parser.add_argument("--exclude-busy", action="store_true", help="leave out GPUs whose memory others use")
    parser.add_argument(
        "--slots", type=count, metavar="N", help="use N CPU processes, no GPU (default without GPUs: as cores allow)"
    )


def _add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --backend slurm (--gpus-per-fold 0 computes on CPUs)")
    group.add_argument("--nodes", type=count, metavar="N", help="of each fold (default: 1)")
    group.add_argument(
        "--cpus-per-task",
        "--cpus-per-node",
        type=count,
        metavar="N",
        help="on each node (default: what train.cpu_threads and data.num_workers take)",
    )
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", metavar="NAME")
    group.add_argument("--time", metavar="LIMIT", help="of a task, as sbatch takes it: 4:00:00")
    group.add_argument("--mem", metavar="SIZE", help="of a node, as sbatch takes it: 32G")
    group.add_argument("--gres", metavar="LIST", help="GPUs of a node, as in gpu:a100:1; replaces --gpus-per-fold")
    group.add_argument("--at-once", type=count, metavar="N", help="most folds at a time")
    group.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="of bash, run in each job first: module load cuda"
    )
    group.add_argument(
        "--sbatch-arg", action="append", default=[], metavar="ARG", help="any other, as in --sbatch-arg=--exclude=node7"
    )


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


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, at least 0")
    return int(text)


def _command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if not words:
        raise argparse.ArgumentTypeError("a command, such as 'notify --channel training'")
    return text


def _override_stop_timeout(text: str) -> str:
    return f"train.stop_timeout_s={_duration(text):g}"


def _duration(text: str) -> float:
    """Seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: seconds, or such as 90s, 30m, 2h; 0 is never")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def count(text: str) -> int:
    """The type of an argument that is a number of something."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, at least 1")
    return int(text)


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
    return ChosenSlots(make_slots(list_cpus(arguments.slots or fitting), ranks), ())


def _choose_local_gpus(arguments: argparse.Namespace) -> tuple[list[Device], list[str]]:
    """The GPUs to use, and warnings of those that are not used, or not alone. The driver is asked if any can be meant.

    Raises:
        UserError: GPUs are asked for that can't be used so, or none of those that are there can be.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if arguments.gpus is None and _lacks_gpus(parse_allocation(os.environ), visible):
        return [], []
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
        gres=arguments.gres,
        at_once=arguments.at_once,
        others=tuple(arguments.sbatch_arg),
    )
    return request, ranks


def _count_requested_gpus(arguments: argparse.Namespace, nodes: int) -> int | None:
    """GPUs of a fold on all its nodes, by --gpus-per-fold or by what sbatch is asked for; None if nothing says.

    Raises:
        UserError: both say, and not the same.
    """
    gres = None if arguments.gres is None else f"--gres={arguments.gres}"
    request = find_gpu_request([*arguments.sbatch_arg, *([gres] if gres else [])])
    if request is None:
        return arguments.gpus_per_fold  # type: ignore[no-any-return]
    option, _, value = request.partition("=")
    gpus = count_gpus(value) * (1 if option in ("--gpus", "-G") else nodes)
    if arguments.gpus_per_fold not in (None, gpus):
        raise UserError(f"--gpus-per-fold {arguments.gpus_per_fold}, but {request} asks for {gpus} (--nodes {nodes})")
    return gpus


def choose_task_slots(
    arguments: argparse.Namespace, config: Config, allocation: Allocation | None, name: str
) -> ChosenSlots:
    """The one slot that a task of a batch system is, whose folds are trained one after the other.

    On one node: its GPUs, found as `doccls-launch run` finds them, or as many CPU processes as the config states.

    Raises:
        UserError: the task has something else than the config asks for, or GPUs that are not there.
    """
    if allocation is not None and allocation.gpus_per_node and all(gpu.fault for gpu in find_gpus()):
        raise UserError(
            f"Slurm gave job {name} {allocation.nodes} nodes x {allocation.gpus_per_node} GPUs, but the NVIDIA driver "
            f"of {socket.gethostname()} shows none: ask the cluster's admin; sbatch --gres=none computes on CPUs"
        )
    if allocation is not None and allocation.nodes > 1:
        return ChosenSlots((_make_slot_of_nodes(allocation, config, name),), ())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus, warnings = ([], []) if _lacks_gpus(allocation, visible) else _choose_gpus(visible, None)
    if allocation is not None and allocation.warning:
        warnings.append(allocation.warning)
    ranks = config.train.num_processes or len(gpus) or 1
    if gpus and ranks != len(gpus):
        raise UserError(
            f"train.num_processes = {ranks}, but {name} has {len(gpus)} GPUs: ask the batch system for {ranks} "
            "(Slurm: sbatch --gres=gpu:N)"
        )
    _check_batch(config, ranks)
    return ChosenSlots(make_slots(gpus or list_cpus(ranks), ranks), tuple(warnings))


def _lacks_gpus(allocation: Allocation | None, visible: str | None) -> bool:
    """Whether the GPUs of this machine, if it has any, are not this process's to use: hidden, or of others' jobs."""
    return shows_none(visible) or (allocation is not None and not allocation.gpus_per_node and visible is None)


def _make_slot_of_nodes(allocation: Allocation, config: Config, name: str) -> Slot:
    """The slot of a fold that spans the job's nodes: a process for each GPU, or as many as the config states."""
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


def make_plan(
    arguments: argparse.Namespace,
    config: Config,
    run_id: str,
    slots: tuple[Slot, ...],
    folds: Sequence[int],
    cores: int,
    warnings: Sequence[str] = (),
) -> LaunchPlan:
    """What a launch of the folds on so many cores would do, by the run's files; the data is not looked at.

    Raises:
        UserError: the run was made with another config, or its parts are another run's.
    """
    from doccls.data.sampler import BatchDivision
    from doccls.oof.predictions import find_finished_folds
    from doccls.run.fingerprint import find_identity

    paths = locate_run(config.output.exp_dir, run_id, datetime.now())
    finished = find_finished_folds(paths, find_identity(paths, config), config.data.folds)
    to_do = [fold for fold in folds if fold not in finished]
    return LaunchPlan(
        run_folder=str(paths.root),
        finished=tuple(fold for fold in folds if fold in finished),
        waves=plan_waves(to_do, slots, make_workload(arguments, config, run_id)),
        files=_list_files(paths, to_do, config.data.valid_fold == "all"),
        batch_size=config.train.batch_size,
        images_at_a_time=BatchDivision.derive(config.train, len(slots[0].devices)).images_at_a_time,
        warnings=(*warnings, *warn_of_threads(slots, len(to_do), config.train.cpu_threads, cores)),
    )


def make_workload(arguments: argparse.Namespace, config: Config, run_id: str) -> Workload:
    """What all folds' processes are told."""
    return Workload(sys.executable, tuple(_list_run_words(arguments, run_id)), config.train.cpu_threads)


def list_task_words(arguments: argparse.Namespace, run_id: str) -> tuple[str, ...]:
    """What a submitted task is told."""
    policy = ["--max-restarts", str(arguments.max_restarts), "--hang-timeout", f"{arguments.hang_timeout:g}"]
    no_shrink = ["--no-shrink"] if arguments.no_shrink else []
    on_end = ["--on-end", arguments.on_end] if arguments.on_end and not arguments.wait else []
    return ("--index-is-fold", *_list_run_words(arguments, run_id), *policy, *no_shrink, *on_end)


def _list_run_words(arguments: argparse.Namespace, run_id: str) -> list[str]:
    changes = ["--allow-world-size-change"] if arguments.allow_world_size_change else []
    return [*list_config_words(arguments), *changes, "--run-id", run_id]


def list_config_words(arguments: argparse.Namespace) -> list[str]:
    """The words that say which config, for a process in any folder."""
    words = ["--config", str(arguments.config.absolute())]
    if arguments.mode:
        words += ["--mode", arguments.mode]
    for override in arguments.overrides:
        words += ["--set", override]
    if arguments.num_workers is not None:
        words += ["--num-workers", str(arguments.num_workers)]
    return words


def render_again(words: Sequence[str], run_id: str) -> str:
    """The same command for the same run: it trains what is missing. Secrets are starred out."""
    command, *others = words
    program = ["doccls-launch", command]
    if command == "task" and "SLURM_JOB_ID" in os.environ:  # slurm/kfold.sh has put --config before its user's words
        program, others = ["sbatch", "slurm/kfold.sh"], [word for word in others if word not in ("--share", "--config")]
    named = any(word == "--run-id" or word.startswith("--run-id=") for word in others)
    return shlex.join([*program, *map(redact_argument, others), *([] if named else ["--run-id", run_id])])


def _list_files(paths: RunPaths, folds: Sequence[int], merged: bool) -> tuple[str, ...]:
    files = [file for fold in folds for file in (paths.best_checkpoint(fold), paths.part(fold))]
    files += [paths.oof_logits, paths.oof_targets, paths.oof_csv, paths.summary] if merged else []
    return tuple(str(file.relative_to(paths.root)) for file in [*files, paths.metrics])
