"""`doccls-launch run --backend slurm` for a study: the missing folds of all runs as one array."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from doccls.config.files import check_inputs
from doccls.errors import UserError
from doccls.run.paths import locate_run, locate_study, name_log, new_run_id
from doccls.system.signals import stopping_gracefully
from launcher.arguments import list_study_task_args
from launcher.placement import make_request
from launcher.slurm.format import render_comment
from launcher.slurm.script import JobRequest, render_output, render_sbatch, render_script
from launcher.study import check_study_name, naming_study
from launcher.study_command import NumberedRun, load_numbered_runs

if TYPE_CHECKING:
    from doccls.reporting.log import RunLog
    from launcher.end_command import EndCommand


def submit_study(arguments: argparse.Namespace, log: "RunLog", end_command: "EndCommand") -> None:
    """Submit the folds of all runs that are neither finished nor pending or running.

    Raises:
        UserError: a config, its data, Slurm or a launcher prevent it; with `--wait` also if folds failed.
        Interrupted: a signal arrived; submitted jobs continue.
    """
    name, now = check_study_name(arguments.study or new_run_id("study")), datetime.now()
    runs = load_numbered_runs(arguments, name)
    request, world_size = _make_common_request(runs)
    output = runs[0].config.output
    end_command.run_folder = locate_study(output.exp_dir, name)
    with log.writing_to(name_log(output.logs_dir, name, now, "submit")):
        from launcher.slurm.submit import SubmitOptions, open_submitted_run, read_queue_of, submit_missing
        from launcher.slurm.watch import Watch
        from launcher.status import list_unfinished
        from launcher.status_files import read_status
        from launcher.study_launch import check_blendable, close_study_share, describe_study, open_study, rank_study
        from launcher.task import close_share

        folder = open_study(runs[0].config, name)
        script = _render_script(arguments, request, name, runs[0].resume_command)
        options = SubmitOptions(request, script, world_size, runs[0].resume_command, folder)
        with ExitStack() as held:
            missing = []
            for run in runs:
                log.line(f"[STUDY] run {run.run_id}: tasks {run.offset} to {run.offset + run.config.data.folds - 1}")
                for warning in run.warnings:
                    log.line(f"[WARNING] {warning}")
                with naming_study():
                    missing.append(open_submitted_run(run.config, run.run_id, now, options, run.offset, log, held))
            if arguments.blend:
                check_blendable([part.run.experiment for part in missing])
            submit_missing(missing, read_queue_of(missing), options, log)
        submitted = [part.run for part in missing]
        roots, pairs = [run.paths.root for run in submitted], [(run.run, run.config) for run in runs]
        study = describe_study(name, runs[0].resume_command, pairs, roots)
        rank_study(folder, study, {})
        log.line(f"[SLURM] show status: doccls-launch status {folder}")
        log.line(f"[SLURM] cancel:      doccls-launch cancel {folder}")
        if not arguments.wait:
            if any(set(part.folds) - set(part.run.experiment.find_finished()) for part in missing):
                log.end_as("SUBMITTED", "submitted")
            return
        with stopping_gracefully():
            Watch(submitted, options, log).run()
        incomplete = [run for run in submitted if close_share(run.experiment, log)]
        problem = close_study_share(folder, study, {}, log, arguments.blend)
        if problem is not None and not incomplete:
            raise UserError(problem)
        if incomplete:
            lines = [
                f"run {run.paths.run_id}\n" + "\n".join(list_unfinished(read_status(run.paths))) for run in incomplete
            ]
            raise UserError(
                "\n".join(["the study has ended, but folds are missing", *lines])
                + f"\nto train them: {runs[0].resume_command}"
            )


@dataclass(frozen=True)
class PlannedRun:
    """The folds of a run that a submission would train."""

    run_folder: str
    finished: tuple[int, ...]
    folds: tuple[int, ...]


@dataclass(frozen=True)
class SubmissionPlan:
    """What `submit_study` would submit."""

    name: str
    warnings: tuple[str, ...]
    runs: Mapping[str, PlannedRun]  # by run id
    command: Sequence[str] | None  # sbatch; None if there is nothing to submit
    script: str  # of each task


def plan_submission(arguments: argparse.Namespace) -> SubmissionPlan:
    """Derive the folds that `submit_study` would submit, and the sbatch command and script.

    Raises:
        UserError: a config can't be used, or a run was created with another one.
    """
    from doccls.oof.predictions import find_finished_folds
    from doccls.run.fingerprint import find_fingerprint

    name = check_study_name(arguments.study or "study-NEW")
    argv = ["run", *(word for word in arguments.argv[1:] if word != "--json")]  # as it is submitted
    arguments = argparse.Namespace(**vars(arguments) | {"argv": argv})
    runs = load_numbered_runs(arguments, name)
    request, _ = _make_common_request(runs)
    warnings, planned, indices = list[str](), dict[str, PlannedRun](), list[int]()
    for run in runs:
        warnings += [*run.warnings, *check_inputs(run.config, may_be_absent=True)]
        paths = locate_run(run.config.output.exp_dir, run.run_id, datetime.now())
        with naming_study():
            finished = find_finished_folds(paths, find_fingerprint(paths, run.config), run.config.data.folds)
        missing = tuple(fold for fold in run.config.data.list_wanted() if fold not in finished)
        indices += [run.offset + fold for fold in missing]
        planned[run.run_id] = PlannedRun(str(paths.root), tuple(finished), missing)
    folder = locate_study(runs[0].config.output.exp_dir, name)
    output = render_output(str(folder / "console"))
    return SubmissionPlan(
        name=name,
        warnings=tuple(dict.fromkeys(warnings)),
        runs=planned,
        command=render_sbatch(request, indices, render_comment(name, "TOKEN"), output) if indices else None,
        script=_render_script(arguments, request, name, runs[0].resume_command),
    )


def render_submission(plan: SubmissionPlan) -> str:
    """Render the plan of a submission for people."""
    lines = [f"[WARNING] {warning}" for warning in plan.warnings]
    lines.append(f"[PLAN] study {plan.name}: {sum(len(run.folds) for run in plan.runs.values())} folds to submit")
    for run in plan.runs.values():
        finished = f", finished before: folds {', '.join(map(str, run.finished))}" if run.finished else ""
        lines.append(f"[PLAN] run {run.run_folder}{finished}")
    command = plan.command
    lines.append(
        "[PLAN] nothing to submit" if command is None else f"[PLAN] {shlex.join(command)} <<'EOF'\n{plan.script}EOF"
    )
    return "\n".join(lines)


def _make_common_request(runs: Sequence[NumberedRun]) -> tuple[JobRequest, int]:
    """Return the resources of a task and the number of processes per fold, which are the same for all runs.

    Raises:
        UserError: the runs need different resources.
    """
    first, *others = ((run, make_request(run.arguments, run.config)) for run in runs)
    for run, request in others:
        if request != first[1]:
            raise UserError(
                f"{run.run.config}: a fold needs other resources ({_describe(*request)}) than those of "
                f"{first[0].run.config} ({_describe(*first[1])}), and all tasks of an array have the same: state "
                "--cpus-per-task and --gpus-per-fold, or submit these configs by themselves"
            )
    return first[1]


def _describe(request: JobRequest, world_size: int) -> str:
    return f"{request.nodes} nodes x {request.cpus_per_task} CPUs, {request.gpus_per_node} GPUs, {world_size} processes"


def _render_script(arguments: argparse.Namespace, request: JobRequest, name: str, resume_command: str) -> str:
    checkout = str(Path(__file__).resolve().parents[1])
    args = list_study_task_args(arguments, name, resume_command)
    return render_script(request, name, checkout, arguments.setup, sys.executable, args)
