"""Command line of `doccls-launch`: its parser."""

import argparse
import re
import shlex
from pathlib import Path

from doccls.config.arguments import add_study_arguments
from launcher.array import REQUEUE_CODE


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of `doccls-launch`."""
    parser = argparse.ArgumentParser(
        prog="doccls-launch", description="Train the folds of one run side by side on this machine's GPUs or CPUs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train the missing folds side by side and merge them")
    plan = commands.add_parser("plan", help="show which fold would run where and in which order, without starting any")
    task = commands.add_parser("task", help="train this array task's share of the folds (inside a batch job)")
    for command in (run, plan, task):
        add_study_arguments(command)
        _add_run_arguments(command)
        _add_policy_arguments(command)
        command.add_argument(
            "--seeds", metavar="LIST", help="train each config once for each of these values of project.seed: 42,43,44"
        )
        command.add_argument(
            "--set-each", action="append", default=[], metavar="KEY=LIST",
            help="train each config once for each of these values, as in --set-each train.lr=1e-4,3e-4; may be "
            "repeated, for every combination",
        )  # fmt: skip
        command.add_argument(
            "--study", metavar="NAME",
            help="name of a launch of several runs; if it exists, only its missing folds are trained",
        )  # fmt: skip
        command.add_argument("--blend", action="store_true", help="at the end, blend all runs of the study")
    for command in (run, plan):
        command.add_argument(
            "--backend", choices=("local", "slurm"), default="local", help="where to train (default: local)"
        )
        add_device_arguments(command)
        _add_slurm_arguments(command)
    _add_task_arguments(task)
    run.add_argument("--wait", action="store_true", help="with --backend slurm: wait until the run has ended")
    plan.add_argument("--json", action="store_true", help="print JSON")
    merge = commands.add_parser("merge", help="merge the fold predictions and metrics of a run")
    status = commands.add_parser("status", help="show the state of each fold of a run or a study, or the newest runs")
    _add_status_arguments(status)
    logs = commands.add_parser("logs", help="print the log of a run's last launch or of a fold")
    _add_logs_arguments(logs)
    cancel = commands.add_parser("cancel", help="gracefully stop a run, or all runs of a study")
    for command in (merge, logs):
        command.add_argument("run", type=Path, metavar="RUN", help="run folder: <exp_dir>/YYYYMMDD/<run_id>")
    cancel.add_argument(
        "run", type=Path, metavar="RUN",
        help="run folder: <exp_dir>/YYYYMMDD/<run_id>, or that of a study: <exp_dir>/studies/<name>",
    )  # fmt: skip
    return parser


def _add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show a live table until nothing runs any more; without a terminal, a line for each event",
    )
    parser.add_argument(
        "--exp-dir", type=Path, default=Path("experiments"), metavar="DIR",
        help="without RUN: the folder of the runs, output.exp_dir (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN",
        help="run folder, <exp_dir>/YYYYMMDD/<run_id>, or study folder, <exp_dir>/studies/<name>; without it, the "
        "newest runs are listed",
    )  # fmt: skip


def _add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fold", type=_non_negative_int, metavar="K", help="the log of this fold's last attempt")
    parser.add_argument(
        "--rank", type=_non_negative_int, metavar="R", help="with --fold: the console output of this process"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new lines until the run has ended")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-id", metavar="ID", help="name of the run; if it exists, only its missing folds are trained"
    )


def _add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fail-fast", action="store_true", help="stop all folds as soon as one fails")
    parser.add_argument(
        "--max-restarts", type=_non_negative_int, default=2, metavar="N",
        help="maximum restarts of a fold that died or hung (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--no-shrink",
        action="store_true",
        help="fail a fold that runs out of GPU memory instead of resuming it with smaller micro-batches",
    )
    parser.add_argument(
        "--start", choices=("server", "fresh"), default="server",
        help="start each process as a fork of one that has imported everything, or as a fresh interpreter (default: "
        "server; always fresh except on Linux)",
    )  # fmt: skip
    parser.add_argument(
        "--hang-timeout",
        type=_duration,
        default=1800.0,
        metavar="TIME",
        help="kill and restart a fold that makes no progress for this long, e.g. 90s, 2h; 0: never (default: 30m)",
    )
    parser.add_argument(
        "--stop-timeout",
        type=_override_stop_timeout,
        action="append",
        dest="overrides",
        metavar="TIME",
        help="time allowed for a stop, including saving the resume checkpoint; short for --set "
        "train.stop_timeout_s=SECONDS",
    )
    parser.add_argument(
        "--on-end",
        type=_command,
        metavar="CMD",
        help="run CMD RUN_FOLDER OUTCOME at the end, without a shell; OUTCOME is success, incomplete, submitted, "
        "stopped or failed",
    )
    parser.add_argument(
        "--allow-world-size-change",
        action="store_true",
        help="resume folds that were started with a different number of processes: same batches, not bitwise identical",
    )


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        metavar="INDEX/COUNT",
        help="index of this task: 0/5 to 4/5, or 1/1-5 to 5/1-5 (default: read from Slurm, PBS, LSF, SGE or "
        "Kubernetes' JOB_COMPLETION_INDEX)",
    )
    parser.add_argument("--share", action="store_true", help=argparse.SUPPRESS)  # passed by older slurm/kfold.sh
    parser.add_argument("--setup", action="append", help=argparse.SUPPRESS)  # slurm/kfold.sh has already run it
    parser.add_argument("--resume-command", help=argparse.SUPPRESS)  # set by `run --backend slurm`
    parser.add_argument("--index-is-fold", action="store_true", help="train only the fold whose number is the index")
    parser.add_argument(
        "--requeue-code",
        type=_exit_code,
        default=REQUEUE_CODE,
        metavar="CODE",
        help=f"exit code of a task that was stopped and can resume (default: {REQUEUE_CODE}, EX_TEMPFAIL)",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `choose_slots` reads."""
    parser.add_argument(
        "--gpus", metavar="LIST", help="GPUs to use: nvidia-smi indices, e.g. 0,1,3, or UUIDs (default: all visible)"
    )
    parser.add_argument(
        "--gpus-per-fold", type=_non_negative_int, metavar="N", help="GPUs per fold (default: train.num_processes or 1)"
    )
    parser.add_argument(
        "--folds-per-gpu",
        type=count,
        default=1,
        metavar="N",
        help="number of folds that share a GPU, for small models (default: 1)",
    )
    parser.add_argument("--exclude-busy", action="store_true", help="skip GPUs whose memory other processes use")
    parser.add_argument(
        "--slots", type=count, metavar="N",
        help="train on N CPU processes instead of GPUs (default without GPUs: as many as the cores allow)",
    )  # fmt: skip


def _add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options for --backend slurm (--gpus-per-fold 0 trains on CPUs)")
    group.add_argument("--nodes", type=count, metavar="N", help="nodes per fold (default: 1)")
    group.add_argument(
        "--cpus-per-task",
        "--cpus-per-node",
        type=count,
        metavar="N",
        help="CPUs per node (default: derived from train.cpu_threads and data.num_workers)",
    )
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", metavar="NAME")
    group.add_argument("--time", metavar="LIMIT", help="time limit of a task, e.g. 4:00:00")
    group.add_argument("--mem", metavar="SIZE", help="memory per node, e.g. 32G")
    group.add_argument("--gres", metavar="LIST", help="GPUs per node, e.g. gpu:a100:1; replaces --gpus-per-fold")
    group.add_argument("--at-once", type=count, metavar="N", help="maximum number of folds that run at the same time")
    group.add_argument(
        "--setup", action="append", default=[], metavar="LINE",
        help="bash line to run first in each job, e.g. 'module load cuda'; can be repeated",
    )  # fmt: skip
    group.add_argument(
        "--sbatch-arg", action="append", default=[], metavar="ARG",
        help="further argument for sbatch, e.g. --sbatch-arg=--exclude=node7; can be repeated",
    )  # fmt: skip


def _non_negative_int(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 0")
    return int(text)


def _exit_code(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 256):
        raise argparse.ArgumentTypeError(f"{text!r}: must be an exit code from 1 to 255")
    return int(text)


def _command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if not words:
        raise argparse.ArgumentTypeError("must be a command, such as 'notify --channel training'")
    return text


def _override_stop_timeout(text: str) -> str:
    return f"train.stop_timeout_s={_duration(text):g}"


def _duration(text: str) -> float:
    """Parse a duration into seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: must be seconds, or a duration such as 90s, 30m or 2h; 0: never")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def count(text: str) -> int:
    """Parse an argument that is a positive number of something."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 1")
    return int(text)
