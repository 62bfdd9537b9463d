"""The commands of `doccls-launch`: run, plan, task, status, cancel and merge.

Each command imports its own dependencies besides the config, so that `--help` and `plan` stay fast.
"""

import argparse
import functools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from doccls.config import Config
from doccls.config.arguments import load_arguments_with_warnings
from doccls.config.files import check_inputs
from doccls.config.load import LoadedConfig
from doccls.errors import UserError
from doccls.reporting.command import run_command, run_training
from doccls.reporting.console import close_console
from doccls.run.paths import check_run_id, find_run, locate_run, locate_study, name_log, new_run_id
from doccls.system.cores import count_cores
from doccls.system.signals import stop_on_sigusr2
from launcher.arguments import (
    build_parser,
    list_task_args,
    make_plan,
    make_workload,
    render_resume_command,
    render_study_command,
)
from launcher.array import describe_share, parse_array_task, pick_folds
from launcher.placement import ChosenSlots, choose_slots, choose_task_slots, make_request
from launcher.plan import LaunchPlan, Slot, describe_plan, render_plan
from launcher.slurm.format import parse_allocation, render_comment
from launcher.slurm.script import JobRequest, render_output, render_sbatch, render_script
from launcher.study import check_study_name, list_runs, parse_seeds

if TYPE_CHECKING:
    from doccls.reporting.log import RunLog
    from launcher.end_command import EndCommand
    from launcher.launch import LaunchOptions
    from launcher.study_launch import LoadedRun


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        arguments = build_parser().parse_args(argv, argparse.Namespace(argv=argv))
        if arguments.command in _TRAINING_COMMANDS:
            return run_training(functools.partial(_run_with_end_command, arguments))
        command = functools.partial(_COMMANDS[arguments.command], arguments)
        return run_command(f"doccls-launch {arguments.command}", command)
    finally:
        close_console()


def _run_with_end_command(arguments: argparse.Namespace, log: "RunLog") -> None:
    from launcher.end_command import EndCommand

    with EndCommand(arguments.on_end, log) as end_command:
        _TRAINING_COMMANDS[arguments.command](arguments, log, end_command)


def _run(arguments: argparse.Namespace, log: "RunLog", end_command: "EndCommand") -> None:
    if _is_study(arguments):
        _run_study(arguments, log, end_command)
        return
    loaded = _load_config(arguments)
    config = loaded.config
    if arguments.backend == "slurm":
        _submit(arguments, loaded, log, end_command)
        return
    chosen, now = choose_slots(arguments, config), datetime.now()
    run_id = check_run_id(arguments.run_id or new_run_id(config.project.version))
    end_command.run_folder = locate_run(config.output.exp_dir, run_id, now).root
    plan = _make_local_plan(arguments, loaded, run_id, chosen)
    with log.writing_to(name_log(config.output.logs_dir, run_id, now)):
        from launcher.launch import launch

        launch(config, run_id, now, _make_options(arguments, config, run_id, plan, chosen.slots), log)


def _is_study(arguments: argparse.Namespace) -> bool:
    return len(arguments.configs) > 1 or arguments.seeds is not None or arguments.study is not None


def _run_study(arguments: argparse.Namespace, log: "RunLog", end_command: "EndCommand") -> None:
    name = check_study_name(arguments.study or new_run_id("study"))
    now = datetime.now()
    runs = _load_study(arguments, name)
    output = runs[0].config.output
    end_command.run_folder = locate_study(output.exp_dir, name)
    with log.writing_to(name_log(output.logs_dir, name, now)):
        from launcher.study_launch import launch_study

        launch_study(name, runs, now, log)


def _load_study(arguments: argparse.Namespace, name: str) -> "list[LoadedRun]":
    """Load the runs of a study, with the options of a launch of each alone.

    Raises:
        UserError: a config can't be used, or the options do not fit a study.
    """
    from launcher.study_launch import LoadedRun

    if arguments.backend == "slurm":
        raise UserError("--backend slurm: only one config and seed at a time; submit each run by itself")
    if arguments.run_id is not None:
        raise UserError("--run-id: the runs of a study are named by --study, the config's file and the seed")
    seeds = () if arguments.seeds is None else parse_seeds(arguments.seeds)
    resume_command, loaded_runs = render_study_command(arguments.argv, name), list["LoadedRun"]()
    for run in list_runs(name, arguments.configs, seeds):
        overrides = [*arguments.overrides, *run.overrides]
        own = argparse.Namespace(**vars(arguments) | {"config": run.config, "overrides": overrides})
        loaded = _load_config(own)
        chosen = choose_slots(own, loaded.config)
        slots = loaded_runs[0].options.slots if loaded_runs else chosen.slots
        if len(slots[0].devices) != len(chosen.slots[0].devices):
            raise UserError(
                f"{run.config}: its folds take {len(chosen.slots[0].devices)} devices, those of {arguments.config} "
                f"{len(slots[0].devices)} (train.num_processes): the runs of a study share the same slots"
            )
        plan = _make_local_plan(own, loaded, run.run_id, replace(chosen, slots=slots))
        options = replace(_make_options(own, loaded.config, run.run_id, plan, slots), resume_command=resume_command)
        loaded_runs.append(LoadedRun(run, loaded.config, options))
    return loaded_runs


def _make_local_plan(
    arguments: argparse.Namespace, loaded: LoadedConfig, run_id: str, chosen: ChosenSlots
) -> LaunchPlan:
    folds, warnings = loaded.config.data.list_wanted(), (*loaded.warnings, *chosen.warnings)
    return make_plan(arguments, loaded.config, run_id, chosen.slots, folds, count_cores(), warnings)


def _load_config(arguments: argparse.Namespace) -> LoadedConfig:
    """Load the config of a training command, and install the SIGUSR2 handler that it asks for."""
    loaded = load_arguments_with_warnings(arguments)
    if loaded.config.train.sigusr2 == "stop":
        stop_on_sigusr2()
    return loaded


def _submit(arguments: argparse.Namespace, loaded: LoadedConfig, log: "RunLog", end_command: "EndCommand") -> None:
    config = loaded.config
    request, world_size = make_request(arguments, config)
    now = datetime.now()
    run_id = check_run_id(arguments.run_id or new_run_id(config.project.version))
    end_command.run_folder = locate_run(config.output.exp_dir, run_id, now).root
    path = name_log(config.output.logs_dir, run_id, now, "submit")
    with log.writing_to(path):
        from launcher.slurm.submit import SubmitOptions, submit

        resume_command = render_resume_command(arguments.argv, run_id)
        script = _render_task_script(arguments, request, run_id, resume_command)
        for warning in loaded.warnings:
            log.line(f"[WARNING] {warning}")
        submit(config, run_id, now, SubmitOptions(request, script, world_size, arguments.wait, resume_command), log)


def _render_task_script(arguments: argparse.Namespace, request: JobRequest, run_id: str, resume_command: str) -> str:
    """Render the script of a submitted task; `resume_command` submits the missing folds."""
    checkout = str(Path(__file__).resolve().parents[1])
    task_args = list_task_args(arguments, run_id, resume_command)
    return render_script(request, run_id, checkout, arguments.setup, sys.executable, task_args)


def _train_task(arguments: argparse.Namespace, log: "RunLog", end_command: "EndCommand") -> None:
    loaded, now = _load_config(arguments), datetime.now()
    config = loaded.config
    task = parse_array_task(os.environ, config.data.folds, arguments.task, arguments.index_is_fold)
    folds = pick_folds(task, config.data.list_wanted(), config.data.folds)
    share = describe_share(task, folds, config.data.folds)
    if not folds:
        print(f"[LAUNCH] {share}")
        return
    if arguments.run_id is None and task.array is None:
        raise UserError(f"{task.name}: the environment does not state the array's ID; name the run with --run-id ID")
    allocation = parse_allocation(os.environ)
    chosen = choose_task_slots(config, allocation, task.name)
    run_id = check_run_id(arguments.run_id or f"{config.project.version}-j{task.array}")
    end_command.run_folder = locate_run(config.output.exp_dir, run_id, now).root
    cores = allocation.nodes * allocation.cpus_per_node if allocation else count_cores()
    warnings = (*loaded.warnings, *chosen.warnings)
    plan = make_plan(arguments, config, run_id, chosen.slots, folds, cores, warnings)
    path = name_log(config.output.logs_dir, run_id, now, "" if task.index is None else f"task{task.index}")
    with log.writing_to(path):
        from launcher.task import TaskOptions, run_task

        log.line(f"[LAUNCH] {share}")
        options = _make_options(arguments, config, run_id, plan, chosen.slots)
        run_task(config, run_id, now, TaskOptions(task, folds, allocation, arguments.requeue_code), options, log)


def _make_options(
    arguments: argparse.Namespace,
    config: Config,
    run_id: str,
    plan: LaunchPlan,
    slots: tuple[Slot, ...],
) -> "LaunchOptions":
    from launcher.launch import LaunchOptions
    from launcher.supervise import Policy

    return LaunchOptions(
        plan,
        slots,
        make_workload(arguments, config, run_id),
        Policy(arguments.max_restarts, arguments.fail_fast, shrink=not arguments.no_shrink),
        arguments.hang_timeout,
        getattr(arguments, "resume_command", None) or render_resume_command(arguments.argv, run_id),
    )


def _plan(arguments: argparse.Namespace) -> int:
    if _is_study(arguments):
        plans = [run.options.plan for run in _load_study(arguments, check_study_name(arguments.study or "study-NEW"))]
        text = json.dumps([describe_plan(plan) for plan in plans], indent=2)
        print(text if arguments.json else "\n".join(map(render_plan, plans)))
        return 0
    loaded = load_arguments_with_warnings(arguments)
    config = loaded.config
    absent = tuple(check_inputs(config, may_be_absent=True))  # a plan may be made on a machine without the data
    run_id = check_run_id(arguments.run_id or f"{config.project.version}-NEW")
    if arguments.backend == "slurm":
        return _plan_submission(arguments, config, run_id, absent)
    chosen = choose_slots(arguments, config)
    plan = _make_local_plan(arguments, loaded, run_id, replace(chosen, warnings=(*absent, *chosen.warnings)))
    print(json.dumps(describe_plan(plan), indent=2) if arguments.json else render_plan(plan))
    return 0


def _plan_submission(arguments: argparse.Namespace, config: Config, run_id: str, warnings: Sequence[str]) -> int:
    from doccls.oof.predictions import find_finished_folds
    from doccls.run.fingerprint import find_fingerprint

    request, _ = make_request(arguments, config)
    paths = locate_run(config.output.exp_dir, run_id, datetime.now())
    finished = find_finished_folds(paths, find_fingerprint(paths, config), config.data.folds)
    missing = [fold for fold in config.data.list_wanted() if fold not in finished]
    command = render_sbatch(request, missing, render_comment(run_id, "TOKEN"), render_output(str(paths.consoles)))
    resume_command = render_resume_command(["run", *(word for word in arguments.argv[1:] if word != "--json")], run_id)
    script = _render_task_script(arguments, request, run_id, resume_command)
    if arguments.json:
        fields = {"run_folder": str(paths.root), "finished": finished, "folds": missing}
        print(json.dumps(fields | {"command": command, "script": script}, indent=2))
    else:
        for warning in warnings:
            print(f"[WARNING] {warning}")
        print(f"[PLAN] run {paths.root}")
        if finished:
            print(f"[PLAN] finished before: folds {', '.join(map(str, finished))}")
        print(f"[PLAN] {shlex.join(command)} <<'EOF'\n{script}EOF" if missing else "[PLAN] nothing to submit")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from doccls.oof.merge import merge_run  # scikit-learn takes a second to import
    from doccls.oof.summary import list_scores
    from doccls.report.make import report_run, wants_report

    paths = find_run(arguments.run)
    scores = list_scores(merge_run(paths))
    print(f"[OOF] -> {paths.oof_logits}")
    for line in scores:
        print(line)
    if wants_report(paths):
        report_run(paths, print)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from launcher.status import describe_status, read_status, render_status

    status = read_status(find_run(arguments.run))
    now = datetime.now().astimezone()
    print(json.dumps(describe_status(status), indent=2) if arguments.json else render_status(status, now))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from launcher.cancel import cancel_run

    cancel_run(find_run(arguments.run), functools.partial(print, flush=True))
    return 0


_TRAINING_COMMANDS = {"run": _run, "task": _train_task}  # these write a log file of their own
_COMMANDS = {"plan": _plan, "status": _status, "cancel": _cancel, "merge": _merge}


if __name__ == "__main__":
    sys.exit(main())
