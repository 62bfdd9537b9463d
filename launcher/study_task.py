"""`doccls-launch task` for a study: trains an array task's share of the folds of all runs."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from doccls.errors import UserError
from doccls.run.paths import locate_run, name_log
from doccls.system.cores import count_cores
from launcher.arguments import make_plan
from launcher.array import ArrayTask, parse_array_task, pick_folds
from launcher.options import make_options
from launcher.placement import choose_task_slots
from launcher.slurm.format import Allocation, parse_allocation
from launcher.study import check_study_name, naming_study
from launcher.study_command import NumberedRun, load_numbered_runs

if TYPE_CHECKING:
    from doccls.reporting.log import RunLog
    from launcher.end_command import EndCommand
    from launcher.queued_run import LaunchOptions
    from launcher.study_file import Study
    from launcher.task import TaskOptions


@dataclass(frozen=True)
class StudyShare:
    """The folds of one run that the task trains."""

    run: NumberedRun
    folds: tuple[int, ...]


def divide(task: ArrayTask, runs: Sequence[NumberedRun]) -> tuple[StudyShare, ...]:
    """Return the task's share: of all folds of all runs, numbered one run after the other, as `pick_folds` does.

    Raises:
        UserError: the index is the number of a fold that does not exist.
    """
    total = sum(run.config.data.folds for run in runs)
    numbers = pick_folds(task, range(total), total, "all folds of the study")
    shares = []
    for run in runs:
        folds = tuple(fold for fold in run.config.data.list_wanted() if run.offset + fold in numbers)
        if folds:
            shares.append(StudyShare(run, folds))
    return tuple(shares)


def train_study_task(arguments: argparse.Namespace, log: "RunLog", end_command: "EndCommand") -> None:
    """Train the task's share of the study, merge the runs that are complete then, and update study.json.

    Raises:
        UserError: a config, its data or the resources can't be used, or folds failed; other runs are trained first.
        Interrupted: a signal came; the fold has stopped at its next safe point.
    """
    now = datetime.now()
    name = check_study_name(arguments.study or _name_study(arguments))
    runs = load_numbered_runs(arguments, name)
    total = sum(run.config.data.folds for run in runs)
    task = parse_array_task(os.environ, total, arguments.task, arguments.index_is_fold)
    shares = divide(task, runs)
    described = "; ".join(f"{share.run.run_id} {_format_folds(share.folds)}" for share in shares)
    line = f"[LAUNCH] task {task.name}: {described or 'no fold is left for it'} ({total} folds of {len(runs)} runs)"
    if not shares:
        print(line)
        return
    output = runs[0].config.output
    with log.writing_to(name_log(output.logs_dir, name, now, "" if task.index is None else f"task{task.index}")):
        from launcher.study_launch import close_study_share, describe_study, open_study, rank_study

        log.line(line)
        folder = end_command.run_folder = open_study(runs[0].config, name)

        def describe() -> "Study":  # other tasks create runs meanwhile, and date their folders
            roots = [locate_run(output.exp_dir, run.run_id, now).root for run in runs]
            return describe_study(name, runs[0].resume_command, [(run.run, run.config) for run in runs], roots)

        with suppress(UserError, OSError):  # another task does the same; at the end it matters
            rank_study(folder, describe(), {}, wait_s=0.0)
        problems: dict[str, str] = {}  # by run id; other runs go on
        launches = _make_launches(shares, name, task, problems, log)
        missing = _train(launches, now, problems, log) if launches else []
        close_study_share(folder, describe(), problems, log, arguments.blend)
        if problems:
            raise UserError("\n".join(f"run {run_id}: {problem}" for run_id, problem in problems.items()))
        if missing:
            log.end_as(
                f"INCOMPLETE missing={','.join(missing)}",
                f"this command's share is finished, but folds {', '.join(missing)} are not",
            )


@dataclass(frozen=True)
class _RunLaunch:
    """What the task does for one of the runs."""

    run: NumberedRun
    own: "TaskOptions"
    options: "LaunchOptions"


def _make_launches(
    shares: Sequence[StudyShare], study: str, task: ArrayTask, problems: dict[str, str], log: "RunLog"
) -> list[_RunLaunch]:
    """Derive the launches of the task's runs; those that can't be launched are added to `problems`."""
    allocation, launches = parse_allocation(os.environ), []
    for share in shares:
        with _noting_problem(share.run, problems, log):
            launches.append(_make_launch(share, study, task, allocation))
    return launches


def _train(launches: Sequence[_RunLaunch], now: datetime, problems: dict[str, str], log: "RunLog") -> list[str]:
    """Train the runs one after the other, and merge those that are complete then; return their missing folds.

    Those that fail are added to `problems`.
    """
    from launcher.task import TaskProgress, run_task, serve_task

    missing, progress = list[str](), TaskProgress()
    with serve_task(launches[0].own, launches[0].options, log) as server:
        for launch in launches:
            config, run_id = launch.run.config, launch.run.run_id
            log.line(f"[STUDY] run {run_id}")
            with _noting_problem(launch.run, problems, log):
                folds = run_task(config, run_id, now, launch.own, launch.options, server, progress, log)
                missing += [f"{run_id}:{fold}" for fold in folds]
    return missing


@contextmanager
def _noting_problem(run: NumberedRun, problems: dict[str, str], log: "RunLog") -> Iterator[None]:
    """Note an error about the run that the user has to mend, and go on after the block."""
    try:
        with naming_study():
            yield
    except UserError as error:
        problems[run.run_id] = str(error)
        log.line(f"[WARNING] run {run.run_id}: {error}")


def _make_launch(share: StudyShare, study: str, task: ArrayTask, allocation: Allocation | None) -> _RunLaunch:
    """Derive the launch of one run's folds.

    Raises:
        UserError: the resources of the task do not fit them, or the run was created with another config.
    """
    from launcher.task import TaskOptions

    run, config = share.run, share.run.config
    chosen = choose_task_slots(config, allocation, task.name)
    cores = allocation.nodes * allocation.cpus_per_node if allocation else count_cores()
    warnings = (*run.warnings, *chosen.warnings)
    plan = make_plan(run.arguments, config, run.run_id, chosen.slots, share.folds, cores, warnings)
    options = make_options(run.arguments, config, run.run_id, plan, chosen.slots)
    options = replace(options, resume_command=run.resume_command, study=study)
    own = TaskOptions(task, share.folds, allocation, run.arguments.requeue_code, run.offset)
    return _RunLaunch(run, own, options)


def _name_study(arguments: argparse.Namespace) -> str:
    """Return the name of a study that was submitted by hand without one: all tasks of its array have the same."""
    task = parse_array_task(os.environ, 1, arguments.task, arguments.index_is_fold)
    if task.array is None:
        raise UserError(f"{task.name}: the environment does not state the array's ID; name the study with --study NAME")
    return f"study-j{task.array}"


def _format_folds(folds: Sequence[int]) -> str:
    return f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}"
