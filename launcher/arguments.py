"""The command line of `doccls-launch`, the plan that its words ask for, and the words for those it starts."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from doccls.config import Config
from doccls.config.arguments import add_config_arguments
from doccls.config.load import redact_argument
from doccls.run.paths import RunPaths, locate_run
from launcher.array import REQUEUE_CODE
from launcher.plan import LaunchPlan, Slot, Workload, plan_waves, warn_of_threads


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
    parser.add_argument("--setup", action="append", help=argparse.SUPPRESS)  # slurm/kfold.sh has run it
    parser.add_argument("--resume-command", help=argparse.SUPPRESS)  # of the submission that this task belongs to
    parser.add_argument("--index-is-fold", action="store_true", help="train the fold of the task's index and no other")
    parser.add_argument(
        "--requeue-code",
        type=_exit_code,
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


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, at least 0")
    return int(text)


def _exit_code(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 256):
        raise argparse.ArgumentTypeError(f"{text!r}: an exit code from 1 to 255")
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
    from doccls.run.fingerprint import find_fingerprint

    paths = locate_run(config.output.exp_dir, run_id, datetime.now())
    finished = find_finished_folds(paths, find_fingerprint(paths, config), config.data.folds)
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


def list_task_words(arguments: argparse.Namespace, run_id: str, resume_command: str) -> tuple[str, ...]:
    """What a submitted task is told; `again` is the command that submits what is missing."""
    policy = ["--max-restarts", str(arguments.max_restarts), "--hang-timeout", f"{arguments.hang_timeout:g}"]
    no_shrink = ["--no-shrink"] if arguments.no_shrink else []
    on_end = ["--on-end", arguments.on_end] if arguments.on_end and not getattr(arguments, "wait", False) else []
    own = ["--index-is-fold", "--resume-command", resume_command]
    return (*_list_run_words(arguments, run_id), *policy, *no_shrink, *on_end, *own)


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


def render_resume_command(words: Sequence[str], run_id: str) -> str:
    """The same command for the same run: it trains what is missing. Secrets are starred out."""
    command, *others = words
    program = ["doccls-launch", command]
    if command == "task" and "SLURM_JOB_ID" in os.environ:  # slurm/kfold.sh has put --config before its user's words
        program, others = ["sbatch", "slurm/kfold.sh"], [word for word in others if word not in ("--share", "--config")]
    named = any(word == "--run-id" or word.startswith("--run-id=") for word in others)
    return shlex.join([*program, *map(redact_argument, others), *([] if named else ["--run-id", run_id])])


def _list_files(paths: RunPaths, folds: Sequence[int], merged: bool) -> tuple[str, ...]:
    files = [file for fold in folds for file in (paths.best_checkpoint(fold), paths.predictions(fold))]
    files += [paths.oof_logits, paths.oof_targets, paths.oof_csv, paths.summary] if merged else []
    return tuple(str(file.relative_to(paths.root)) for file in [*files, paths.metrics])
