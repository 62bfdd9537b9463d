"""The command line of `doccls-launch`, and what its words ask for: slots of this machine, and a plan."""

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
from launcher.devices import Device, DeviceError, choose_gpus, count_cores, find_gpus, list_cpus
from launcher.plan import LaunchPlan, Workload, plan_waves, warn_of_threads
from launcher.slots import Slot, make_slots


def build_parser() -> argparse.ArgumentParser:
    """The command line of `doccls-launch`."""
    parser = argparse.ArgumentParser(
        prog="doccls-launch", description="Train the folds of one run side by side on this machine's GPUs or CPUs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train the folds that are missing, side by side, and merge them")
    plan = commands.add_parser("plan", help="say what run would do: which fold where, in which order; start nothing")
    for command in (run, plan):
        _add_launch_arguments(command)
    run.add_argument("--fail-fast", action="store_true", help="stop all folds when one has failed")
    run.add_argument(
        "--max-restarts", type=_natural, default=2, metavar="N", help="of a fold that died or hung (default: 2)"
    )
    run.add_argument(
        "--hang-timeout",
        type=_duration,
        default=1800.0,
        metavar="TIME",
        help="kill and restart a fold without progress for so long: 90s, 30m (default), 2h; 0 is never",
    )
    run.add_argument("--takeover", action="store_true", help="take the run from a launcher that is provably dead")
    plan.add_argument("--json", action="store_true", help="for scripts")
    merge = commands.add_parser("merge", help="merge the folds' OOF parts and metrics, wherever they were trained")
    status = commands.add_parser("status", help="say where each fold of a run stands, launched or not")
    status.add_argument("--json", action="store_true", help="for scripts")
    cancel = commands.add_parser("cancel", help="stop the launcher of a run and all its folds, in good order")
    for command in (merge, status, cancel):
        command.add_argument("run", type=Path, metavar="RUN", help="folder of the run: <exp_dir>/YYYYMMDD/<run_id>")
    return parser


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--run-id", metavar="ID", help="name of the run; of an existing one only the rest is trained")
    parser.add_argument("--gpus", metavar="LIST", help="as 0,1,3 (nvidia-smi's numbers) or UUIDs; default: all visible")
    parser.add_argument(
        "--gpus-per-fold", type=_count, metavar="N", help="train each fold on N (default: train.num_processes, or 1)"
    )
    parser.add_argument("--folds-per-gpu", type=_count, default=1, metavar="N", help="small models: N share a GPU")
    parser.add_argument(
        "--slots", type=_count, metavar="N", help="use N CPU processes, no GPU (default without GPUs: as cores allow)"
    )


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, at least 0")
    return int(text)


def _duration(text: str) -> float:
    """Seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: seconds, or such as 90s, 30m, 2h; 0 is never")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, at least 1")
    return int(text)


def choose_slots(arguments: argparse.Namespace, config: Config) -> tuple[Slot, ...]:
    """The slots that the arguments ask for, on the devices that are there.

    Raises:
        DeviceError: more is asked for than there is, or one thing and its opposite.
    """
    ranks = _count_ranks(arguments, config)
    gpus: list[Device] = []
    if arguments.slots is None:
        gpus = choose_gpus(find_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"), arguments.gpus)
    elif arguments.gpus is not None or arguments.gpus_per_fold is not None or arguments.folds_per_gpu != 1:
        raise DeviceError("--slots computes on CPUs: leave out --gpus, --gpus-per-fold and --folds-per-gpu")
    if gpus:
        return make_slots(gpus, ranks, arguments.folds_per_gpu)
    if arguments.gpus_per_fold is not None or arguments.folds_per_gpu != 1:
        raise DeviceError("no GPU is visible: leave out --gpus-per-fold and --folds-per-gpu, or say --slots N")
    fitting = max(ranks, count_cores() // config.train.cpu_threads)
    return make_slots(list_cpus(arguments.slots or fitting), ranks)


def _count_ranks(arguments: argparse.Namespace, config: Config) -> int:
    """Processes of each fold."""
    expected: int | None = config.train.num_processes
    if arguments.gpus_per_fold is not None and expected not in (None, arguments.gpus_per_fold):
        raise DeviceError(f"--gpus-per-fold {arguments.gpus_per_fold}, but train.num_processes = {expected}")
    ranks: int = arguments.gpus_per_fold or expected or 1
    if ranks > config.train.batch_size:
        raise DeviceError(f"train.batch_size = {config.train.batch_size}: {ranks} processes can't share that batch")
    return ranks


def make_plan(arguments: argparse.Namespace, config: Config, run_id: str, slots: tuple[Slot, ...]) -> LaunchPlan:
    """What a launch would do, by the run's files; the data is not looked at.

    Raises:
        UserError: the run was made with another config, or its parts are another run's.
    """
    from doccls.oof.parts import find_finished_folds
    from doccls.run.identity import find_identity

    paths = locate_run(config.output.exp_dir, run_id, datetime.now())
    wanted = list(range(config.data.folds)) if config.data.valid_fold == "all" else [config.data.valid_fold]
    finished = find_finished_folds(paths, find_identity(paths, config), config.data.folds)
    to_do = [fold for fold in wanted if fold not in finished]
    return LaunchPlan(
        run_folder=str(paths.root),
        finished=tuple(fold for fold in wanted if fold in finished),
        waves=plan_waves(to_do, slots, make_workload(arguments, config, run_id)),
        files=_list_files(paths, to_do, config.data.valid_fold == "all"),
        warnings=tuple(warn_of_threads(slots, len(to_do), config.train.cpu_threads, count_cores())),
    )


def make_workload(arguments: argparse.Namespace, config: Config, run_id: str) -> Workload:
    """What all folds' processes are told."""
    words = ["--config", str(arguments.config.absolute())]
    if arguments.mode:
        words += ["--mode", arguments.mode]
    for override in arguments.overrides:
        words += ["--set", override]
    if arguments.num_workers is not None:
        words += ["--num-workers", str(arguments.num_workers)]
    return Workload(sys.executable, (*words, "--run-id", run_id), config.train.cpu_threads)


def render_again(words: Sequence[str], run_id: str) -> str:
    """The same command for the same run: it trains what is missing. Secrets are starred out."""
    named = any(word == "--run-id" or word.startswith("--run-id=") for word in words)
    return shlex.join(["doccls-launch", *map(redact_argument, words), *([] if named else ["--run-id", run_id])])


def _list_files(paths: RunPaths, folds: Sequence[int], merged: bool) -> tuple[str, ...]:
    files = [file for fold in folds for file in (paths.best_checkpoint(fold), paths.part(fold))]
    files += [paths.oof_logits, paths.oof_targets, paths.oof_csv, paths.summary] if merged else []
    return tuple(str(file.relative_to(paths.root)) for file in [*files, paths.metrics])
