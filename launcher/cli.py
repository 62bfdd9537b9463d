"""The commands of `doccls-launch`: run, plan, task, status, logs, cancel and merge.

Each command imports its own dependencies besides the config, so that `--help` and `plan` stay fast.
"""

import argparse
import functools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from doccls.config import Config
from doccls.config.arguments import load_arguments_with_warnings
from doccls.config.files import check_inputs
from doccls.config.load import LoadedConfig
from doccls.config.paths import resolve_option
from doccls.errors import UserError
from doccls.reporting.command import run_command, run_training
from doccls.reporting.console import guarding_console, wrap_stream
from doccls.run.paths import check_run_id, find_run, locate_run, name_log, new_run_id
from doccls.system.cores import count_cores
from doccls.system.lock import find_holder
from doccls.system.user import complete_user
from doccls.system.variables import drop_empty_variables
from launcher.arguments import list_task_args, make_plan, render_resume_command
from launcher.array import describe_share, parse_array_task, pick_folds
from launcher.options import load_config_for_training, make_local_plan, make_options
from launcher.parser import build_parser
from launcher.placement import choose_slots, choose_task_slots, make_request
from launcher.plan import describe_plan, render_plan
from launcher.slurm.format import parse_allocation, render_comment
from launcher.slurm.script import JobRequest, render_output, render_sbatch, render_script
from launcher.study_command import is_study, make_study_plan, run_study
from launcher.study_plan import describe_study_plan, render_study_plan

if TYPE_CHECKING:
    from doccls.reporting.log import RunLog
    from launcher.end_command import EndCommand


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with guarding_console():
        drop_empty_variables(os.environ)
        complete_user(os.environ)
        argv = list(sys.argv[1:] if argv is None else argv)
        arguments = build_parser().parse_args(argv, argparse.Namespace(argv=argv))
        if arguments.command in _TRAINING_COMMANDS:
            return run_training(functools.partial(_run_with_end_command, arguments))
        command = functools.partial(_COMMANDS[arguments.command], arguments)
        prints = arguments.command in ("plan", "status", "logs")
        return run_command(f"doccls-launch {arguments.command}", command, prints=prints)


def _run_with_end_command(arguments: argparse.Namespace, log: "RunLog") -> None:
    from launcher.end_command import EndCommand

    with EndCommand(arguments.on_end, log) as end_command:
        _TRAINING_COMMANDS[arguments.command](arguments, log, end_command)


def _run(arguments: argparse.Namespace, log: "RunLog", end_command: "EndCommand") -> None:
    if is_study(arguments) and arguments.backend == "slurm":
        from launcher.study_submit import submit_study

        submit_study(arguments, log, end_command)
        return
    if is_study(arguments):
        run_study(arguments, log, end_command)
        return
    loaded = load_config_for_training(arguments)
    config = loaded.config
    if arguments.backend == "slurm":
        _submit(arguments, loaded, log, end_command)
        return
    chosen, now = choose_slots(arguments, config), datetime.now()
    run_id = check_run_id(arguments.run_id or new_run_id(config.project.version))
    end_command.run_folder = locate_run(config.output.exp_dir, run_id, now).root
    plan = make_local_plan(arguments, loaded, run_id, chosen)
    with log.writing_to(name_log(config.output.logs_dir, run_id, now)):
        from launcher.launch import launch

        launch(config, run_id, now, make_options(arguments, config, run_id, plan, chosen.slots), log)


def _submit(arguments: argparse.Namespace, loaded: LoadedConfig, log: "RunLog", end_command: "EndCommand") -> None:
    config = loaded.config
    request, world_size = make_request(arguments, config)
    now = datetime.now()
    run_id = check_run_id(arguments.run_id or new_run_id(config.project.version))
    end_command.run_folder = locate_run(config.output.exp_dir, run_id, now).root
    path = name_log(config.output.logs_dir, run_id, now, "submit")
    with log.writing_to(path):
        from launcher.slurm.run import submit
        from launcher.slurm.submit import SubmitOptions

        resume_command = render_resume_command(arguments.argv, run_id)
        script = _render_task_script(arguments, request, run_id, resume_command)
        for warning in loaded.warnings:
            log.line(f"[WARNING] {warning}")
        options = SubmitOptions(request, script, world_size, resume_command)
        submit(config, run_id, now, options, arguments.wait, log)


def _render_task_script(arguments: argparse.Namespace, request: JobRequest, run_id: str, resume_command: str) -> str:
    """Render the script of a submitted task; `resume_command` submits the missing folds."""
    checkout = str(Path(__file__).resolve().parents[1])
    task_args = list_task_args(arguments, run_id, resume_command)
    return render_script(request, run_id, checkout, arguments.setup, sys.executable, task_args)


def _train_task(arguments: argparse.Namespace, log: "RunLog", end_command: "EndCommand") -> None:
    if is_study(arguments):
        from launcher.study_task import train_study_task

        train_study_task(arguments, log, end_command)
        return
    loaded, now = load_config_for_training(arguments), datetime.now()
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
        from launcher.task import TaskOptions, TaskProgress, run_task, serve_task

        log.line(f"[LAUNCH] {share}")
        options = make_options(arguments, config, run_id, plan, chosen.slots)
        own = TaskOptions(task, folds, allocation, arguments.requeue_code)
        with serve_task(own, options, log) as server:
            run_task(config, run_id, now, own, options, server, TaskProgress(), log)


def _plan(arguments: argparse.Namespace) -> int:
    if is_study(arguments) and arguments.backend == "slurm":
        from launcher.study_submit import plan_submission, render_submission

        submission = plan_submission(arguments)
        print(json.dumps(asdict(submission), indent=2) if arguments.json else render_submission(submission))
        return 0
    if is_study(arguments):
        study = make_study_plan(arguments)
        print(json.dumps(describe_study_plan(study), indent=2) if arguments.json else render_study_plan(study))
        return 0
    loaded = load_arguments_with_warnings(arguments)
    config = loaded.config
    absent = tuple(check_inputs(config, may_be_absent=True))  # a plan may be made on a machine without the data
    run_id = check_run_id(arguments.run_id or f"{config.project.version}-NEW")
    if arguments.backend == "slurm":
        return _plan_submission(arguments, config, run_id, absent)
    chosen = choose_slots(arguments, config)
    plan = make_local_plan(arguments, loaded, run_id, replace(chosen, warnings=(*absent, *chosen.warnings)))
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
    holder = find_holder(paths.merge_lock)
    if holder is not None:
        print(f"[OOF] {holder}: waiting until that process has merged it", flush=True)
    scores = list_scores(merge_run(paths))
    print(f"[OOF] -> {paths.oof_logits}")
    for line in scores:
        print(line)
    if wants_report(paths):
        report_run(paths, print)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    if arguments.watch and (arguments.json or arguments.run is None):
        raise UserError("--watch: takes the folder of a run or a study, and not --json")
    if arguments.run is None:
        return _list_recent(arguments)
    from launcher.live_files import find_watched
    from launcher.status import describe_status, render_status
    from launcher.status_files import read_status
    from launcher.study_file import find_study

    path, now = resolve_option(arguments.run, "RUN"), datetime.now().astimezone()
    if arguments.watch:
        from launcher.watch import watch

        watch(find_watched(path))
    elif find_study(path) is not None:
        from launcher.watch import describe_watched, render_watched

        watched = find_watched(path)
        print(json.dumps(describe_watched(watched), indent=2) if arguments.json else render_watched(watched))
    else:
        status = read_status(find_run(arguments.run))
        print(json.dumps(describe_status(status), indent=2) if arguments.json else render_status(status, now))
    return 0


def _list_recent(arguments: argparse.Namespace) -> int:
    from launcher.recent import describe_recent, read_recent, render_recent

    now = datetime.now()
    runs = read_recent(arguments.exp_dir, now)
    print(
        json.dumps(describe_recent(runs), indent=2) if arguments.json else render_recent(arguments.exp_dir, runs, now)
    )
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from launcher.logs import LogRequest, print_log

    console = wrap_stream(sys.stdout, "stdout")

    def write(text: str) -> bool:
        print(text, end="", flush=True, file=console)
        return console.error is None

    print_log(find_run(arguments.run), LogRequest(arguments.fold, arguments.rank), arguments.follow, write)
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from launcher.cancel import cancel_run, cancel_study
    from launcher.study_file import find_study

    report = functools.partial(print, flush=True)
    study = find_study(arguments.run)
    if study is not None:
        cancel_study(study, report)
    else:
        cancel_run(find_run(arguments.run), report)
    return 0


_TRAINING_COMMANDS = {"run": _run, "task": _train_task}  # these write a log file of their own
_COMMANDS = {"plan": _plan, "status": _status, "logs": _logs, "cancel": _cancel, "merge": _merge}


if __name__ == "__main__":
    sys.exit(main())
