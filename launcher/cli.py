"""`doccls-launch run | plan | task | status | cancel | merge`: what each command does with its words.

What a command needs beside the config is imported by that command: `--help` and `plan` answer at once.
"""

import argparse
import functools
import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from doccls.config import Config
from doccls.config.arguments import load_arguments
from doccls.errors import UserError
from doccls.reporting.command import run_command, run_training
from doccls.reporting.console import close_console
from doccls.run.paths import RunPaths, check_run_id, locate_run, name_log, new_run_id
from doccls.system.cores import count_cores
from doccls.system.signals import stop_on_sigusr2
from launcher.arguments import (
    ChosenSlots,
    build_parser,
    choose_slots,
    list_task_words,
    make_job_slot,
    make_plan,
    make_request,
    make_workload,
    render_again,
)
from launcher.devices import find_gpus
from launcher.plan import LaunchPlan, Slot, describe_plan, render_plan
from launcher.slurm.format import parse_task, pick_folds, render_sbatch, render_script

if TYPE_CHECKING:
    from doccls.reporting.log import RunLog
    from launcher.launch import LaunchOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        arguments = build_parser().parse_args(words)
        if arguments.command in _TRAINING:
            return run_training(functools.partial(_TRAINING[arguments.command], arguments, words))
        act = functools.partial(_COMMANDS[arguments.command], arguments)
        return run_command(f"doccls-launch {arguments.command}", act)
    finally:
        close_console()


def _run(arguments: argparse.Namespace, words: Sequence[str], log: "RunLog") -> None:
    config = _load_config(arguments)
    if arguments.backend == "slurm":
        _submit(arguments, words, config, log)
        return
    chosen, now = choose_slots(arguments, config), datetime.now()
    run_id = check_run_id(arguments.run_id or new_run_id(config.project.version))
    plan = _make_local_plan(arguments, config, run_id, chosen)
    with log.writing_to(name_log(config.output.logs_dir, run_id, now)):
        from launcher.launch import launch

        launch(config, run_id, now, _make_options(arguments, words, config, run_id, plan, chosen.slots), log)


def _make_local_plan(arguments: argparse.Namespace, config: Config, run_id: str, chosen: ChosenSlots) -> LaunchPlan:
    folds = config.data.list_wanted()
    return make_plan(arguments, config, run_id, chosen.slots, folds, count_cores(), chosen.warnings)


def _load_config(arguments: argparse.Namespace) -> Config:
    """Of a command that trains, and that signals may ask to leave."""
    config = load_arguments(arguments)
    if config.train.sigusr2 == "stop":
        stop_on_sigusr2()
    return config


def _submit(arguments: argparse.Namespace, words: Sequence[str], config: Config, log: "RunLog") -> None:
    request, world_size = make_request(arguments, config)
    now = datetime.now()
    run_id = check_run_id(arguments.run_id or new_run_id(config.project.version))
    with log.writing_to(name_log(config.output.logs_dir, run_id, now, "submit")):
        from launcher.slurm.submit import SubmitOptions, submit

        script, again = render_script(sys.executable, list_task_words(arguments, run_id)), render_again(words, run_id)
        submit(config, run_id, now, SubmitOptions(request, script, world_size, arguments.wait, again), log)


def _train_task(arguments: argparse.Namespace, words: Sequence[str], log: "RunLog") -> None:
    task, config, now = parse_task(os.environ), _load_config(arguments), datetime.now()
    folds = pick_folds(task, config.data.list_wanted(), arguments.share)
    if not folds:
        print(f"[LAUNCH] task {task.job}: no fold is left for it (data.folds={config.data.folds})")
        return
    gpus_here = sum(not gpu.fault for gpu in find_gpus()) if task.gpus_per_node else 0
    slot = make_job_slot(task, config, gpus_here, socket.gethostname())
    run_id = check_run_id(arguments.run_id or f"{config.project.version}-j{task.array_job}")
    plan = make_plan(arguments, config, run_id, (slot,), folds, task.nodes * task.cpus_per_node)
    part = "" if task.number is None else f"task{task.number}"
    with log.writing_to(name_log(config.output.logs_dir, run_id, now, part)):
        from launcher.task import TaskShare, run_task

        share = TaskShare(task, folds, task.count if arguments.share else 0)
        run_task(config, run_id, now, share, _make_options(arguments, words, config, run_id, plan, (slot,)), log)


def _make_options(
    arguments: argparse.Namespace,
    words: Sequence[str],
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
        render_again(words, run_id),
    )


def _plan(arguments: argparse.Namespace) -> int:
    config = load_arguments(arguments)
    run_id = check_run_id(arguments.run_id or f"{config.project.version}-NEW")
    if arguments.backend == "slurm":
        return _plan_submission(arguments, config, run_id)
    plan = _make_local_plan(arguments, config, run_id, choose_slots(arguments, config))
    print(json.dumps(describe_plan(plan), indent=2) if arguments.json else render_plan(plan))
    return 0


def _plan_submission(arguments: argparse.Namespace, config: Config, run_id: str) -> int:
    from doccls.oof.predictions import find_finished_folds
    from doccls.run.fingerprint import find_identity

    request, _ = make_request(arguments, config)
    paths = locate_run(config.output.exp_dir, run_id, datetime.now())
    finished = find_finished_folds(paths, find_identity(paths, config), config.data.folds)
    missing = [fold for fold in config.data.list_wanted() if fold not in finished]
    command = render_sbatch(request, missing, run_id, "TOKEN", str(paths.consoles))
    script = render_script(sys.executable, list_task_words(arguments, run_id))
    if arguments.json:
        told = {"run_folder": str(paths.root), "finished": finished, "folds": missing}
        print(json.dumps(told | {"command": command, "script": script}, indent=2))
    else:
        print(f"[PLAN] run {paths.root}")
        if finished:
            print(f"[PLAN] finished before: folds {', '.join(map(str, finished))}")
        print(f"[PLAN] {shlex.join(command)} <<'EOF'\n{script}EOF" if missing else "[PLAN] nothing to submit")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from doccls.oof.merge import merge_run  # scikit-learn takes a second to import
    from doccls.oof.summary import list_scores

    paths = _find_run(arguments)
    scores = list_scores(merge_run(paths))
    print(f"[OOF] -> {paths.oof_logits}")
    for line in scores:
        print(line)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from launcher.status import describe_status, read_status, render_status

    status = read_status(_find_run(arguments))
    now = datetime.now().astimezone()
    print(json.dumps(describe_status(status), indent=2) if arguments.json else render_status(status, now))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from launcher.cancel import cancel_run

    cancel_run(_find_run(arguments), functools.partial(print, flush=True))
    return 0


def _find_run(arguments: argparse.Namespace) -> RunPaths:
    paths = RunPaths(arguments.run.resolve())
    if not paths.root.is_dir():
        raise UserError(f"no such run folder: {paths.root} (runs lie in <output.exp_dir>/YYYYMMDD/<run_id>)")
    return paths


_TRAINING = {"run": _run, "task": _train_task}
"""Commands that train, with a log of their own."""
_COMMANDS = {"plan": _plan, "status": _status, "cancel": _cancel, "merge": _merge}


if __name__ == "__main__":
    sys.exit(main())
