"""What a command of `doccls-launch` asks for: its plan, and the arguments of the processes and tasks it starts."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime

from doccls.config import Config
from doccls.config.load import redact_argument
from doccls.run.paths import RunPaths, locate_run
from launcher.plan import LaunchPlan, Slot, Workload, plan_waves, warn_of_threads


def make_plan(
    arguments: argparse.Namespace,
    config: Config,
    run_id: str,
    slots: tuple[Slot, ...],
    folds: Sequence[int],
    cores: int,
    warnings: Sequence[str] = (),
) -> LaunchPlan:
    """Derive what a launch of `folds` on `cores` CPU cores would do from the run's files, without reading the data.

    Raises:
        UserError: the run was created with another config, or its fold predictions belong to another run.
    """
    from doccls.data.sampler import BatchDivision
    from doccls.oof.predictions import find_finished_folds
    from doccls.run.fingerprint import find_fingerprint

    paths = locate_run(config.output.exp_dir, run_id, datetime.now())
    finished = find_finished_folds(paths, find_fingerprint(paths, config), config.data.folds)
    missing = [fold for fold in folds if fold not in finished]
    return LaunchPlan(
        run_folder=str(paths.root),
        finished=tuple(fold for fold in folds if fold in finished),
        waves=plan_waves(missing, slots, make_workload(arguments, config, run_id)),
        files=_list_files(paths, missing, config),
        batch_size=config.train.batch_size,
        images_at_a_time=BatchDivision.derive(config.train, len(slots[0].devices)).images_at_a_time,
        warnings=(*warnings, *warn_of_threads(slots, len(missing), config.train.cpu_threads, cores)),
    )


def make_workload(arguments: argparse.Namespace, config: Config, run_id: str) -> Workload:
    """Derive what the processes of all folds have in common."""
    return Workload(sys.executable, tuple(_list_run_args(arguments, run_id)), config.train.cpu_threads)


def list_task_args(arguments: argparse.Namespace, run_id: str, resume_command: str) -> tuple[str, ...]:
    """List the arguments of a submitted task; `resume_command` submits the missing folds."""
    return (*_list_run_args(arguments, run_id), *_list_policy_args(arguments, resume_command))


def list_study_task_args(arguments: argparse.Namespace, name: str, resume_command: str) -> tuple[str, ...]:
    """List the arguments of a submitted task of a study."""
    args = [word for config in arguments.configs for word in ("--config", str(config.absolute()))]
    args += list_config_args(arguments)[2:]
    args += [word for text in arguments.set_each for word in ("--set-each", text)]
    args += [] if arguments.seeds is None else ["--seeds", arguments.seeds]
    args += ["--allow-world-size-change"] if arguments.allow_world_size_change else []
    args += ["--blend"] if arguments.blend else []
    return (*args, "--study", name, *_list_policy_args(arguments, resume_command))


def _list_policy_args(arguments: argparse.Namespace, resume_command: str) -> list[str]:
    policy = ["--max-restarts", str(arguments.max_restarts), "--hang-timeout", f"{arguments.hang_timeout:g}"]
    no_shrink = ["--no-shrink"] if arguments.no_shrink else []
    on_end = ["--on-end", arguments.on_end] if arguments.on_end and not getattr(arguments, "wait", False) else []
    start = ["--start", "fresh"] if arguments.start == "fresh" else []
    task = ["--index-is-fold", "--resume-command", resume_command]
    return [*policy, *no_shrink, *start, *on_end, *task]


def _list_run_args(arguments: argparse.Namespace, run_id: str) -> list[str]:
    world_size = ["--allow-world-size-change"] if arguments.allow_world_size_change else []
    return [*list_config_args(arguments), *world_size, "--run-id", run_id]


def list_config_args(arguments: argparse.Namespace) -> list[str]:
    """List the arguments that select the config, for a process with any working directory."""
    args = ["--config", str(arguments.config.absolute())]
    if arguments.mode:
        args += ["--mode", arguments.mode]
    for override in arguments.overrides:
        args += ["--set", override]
    if arguments.num_workers is not None:
        args += ["--num-workers", str(arguments.num_workers)]
    return args


def render_resume_command(argv: Sequence[str], run_id: str) -> str:
    """Render the command that trains the missing folds of the run, with secrets replaced by asterisks."""
    command, *options = argv
    program = ["doccls-launch", command]
    if command == "task" and "SLURM_JOB_ID" in os.environ:  # slurm/kfold.sh has inserted --config
        program = ["sbatch", "slurm/kfold.sh"]
        options = [arg for arg in options if arg not in ("--share", "--config")]
    has_run_id = any(arg == "--run-id" or arg.startswith("--run-id=") for arg in options)
    return shlex.join([*program, *map(redact_argument, options), *([] if has_run_id else ["--run-id", run_id])])


def render_study_command(argv: Sequence[str], name: str) -> str:
    """Render the command that trains the missing folds of the study, with secrets replaced by asterisks."""
    command, *options = argv
    has_name = any(arg == "--study" or arg.startswith("--study=") for arg in options)
    return shlex.join(
        ["doccls-launch", command, *map(redact_argument, options), *([] if has_name else ["--study", name])]
    )


def _list_files(paths: RunPaths, folds: Sequence[int], config: Config) -> tuple[str, ...]:
    files = [file for fold in folds for file in (paths.best_checkpoint(fold), paths.predictions(fold))]
    if config.data.valid_fold == "all":
        damaged = [paths.oof_logits_damaged] if config.valid.has_damage else []
        files += [paths.oof_logits, *damaged, paths.oof_targets, paths.oof_csv, paths.summary]
    return tuple(str(file.relative_to(paths.root)) for file in [*files, paths.metrics])
