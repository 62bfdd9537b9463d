"""`doccls-launch run --backend slurm`: submits the missing folds of runs as one array, each exactly once."""

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from doccls.config import Config
from doccls.experiment import Experiment, open_run
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths, locate_run
from doccls.system.lock import Lock, LockError, find_holder, hold_lock
from launcher.ledger import format_time
from launcher.slurm.array_jobs import (
    ArrayJob,
    find_array_job,
    list_active,
    list_clusters,
    list_preempted,
    read_array_jobs,
    resolve_lost_answers,
    write_array_jobs,
)
from launcher.slurm.format import LostAnswerError, QueueEntry, SlurmError, Submitted, render_comment
from launcher.slurm.queue import POLL_S, find_clusters, read_queue, submit_script
from launcher.slurm.script import JobRequest, render_output, render_sbatch
from launcher.status_files import list_run_jobs
from launcher.study import name_fold

_FIND_TRIES = 2


@dataclass(frozen=True)
class SubmitOptions:
    """Options of a submission, besides the configs."""

    request: JobRequest
    script: str  # of each task
    world_size: int  # processes per fold
    resume_command: str  # trains the missing folds
    study: Path | None = None  # the folder of the study that the runs belong to; None: a single run


@dataclass(frozen=True)
class SubmittedRun:
    """A run whose folds are trained by tasks of an array."""

    experiment: Experiment
    offset: int = 0  # index of the task that trains its fold 0
    study: str | None = None  # the study that it belongs to

    @property
    def paths(self) -> RunPaths:
        """The files of the run."""
        return self.experiment.paths

    def name_fold(self, fold: int) -> str:
        """Return the name of a fold in log lines."""
        return name_fold(fold, self.paths.run_id, self.study)

    def hold_lock(self) -> AbstractContextManager[Lock]:
        """Hold the lock of the process that submits the run."""
        return _hold_submit_lock(self.paths)


@dataclass(frozen=True)
class Missing:
    """Folds of a run to submit unless they are finished, pending or running.

    Its lock must be taken before `array_jobs` are read, and Slurm's queue be read after that.
    """

    run: SubmittedRun
    folds: tuple[int, ...]
    lock: Lock
    array_jobs: tuple[ArrayJob, ...]


@dataclass(frozen=True)
class _Part:
    """The part of an array that trains folds of one run."""

    run: SubmittedRun
    folds: tuple[int, ...]
    array_jobs: tuple[ArrayJob, ...]  # earlier ones of the run
    preempted: dict[int, QueueEntry]


def open_submitted_run(
    config: Config, run_id: str, now: datetime, options: SubmitOptions, offset: int, log: RunLog, held: ExitStack
) -> Missing:
    """Check config and data, open the run, hold its lock until `held` is closed, and return its missing folds.

    Raises:
        UserError: config, data or a launcher of the run prevent it.
    """
    paths = locate_run(config.output.exp_dir, run_id, now)
    if (launcher := find_holder(paths.launch_lock())) is not None:
        raise LockError(f"{launcher} ({paths.launch_lock()}): stop it first, or wait for it")
    take_lock = partial(held.enter_context, _hold_submit_lock(paths))
    run = open_run(config, paths, now, {"world_size": options.world_size}, log, take_lock)
    assert run.lock is not None
    log.line(f"[ARTIFACTS] {paths.root}")
    if run.list_missing(config.data.list_wanted()):
        _fetch_weights(config, log)
    study = None if options.study is None else options.study.name
    submitted = SubmittedRun(run.experiment, offset, study)
    return Missing(submitted, tuple(config.data.list_wanted()), run.lock, read_array_jobs(paths.array_jobs))


def _fetch_weights(config: Config, log: RunLog) -> None:
    """Download the hub's weights on this machine: compute nodes often lack a network, and the jobs run offline."""
    if config.model.pretrained or ":" in config.model.name:
        from doccls.model.build import fetch_pretrained  # imports torch

        if (cache := fetch_pretrained(config.model, config.train.img_size)) is not None:
            log.line(f"[MODEL] weights of {config.model.name} are in {cache} (HF_HOME); the nodes must have access")


def _hold_submit_lock(paths: RunPaths) -> AbstractContextManager[Lock]:
    return hold_lock(paths.submit_lock, f"run {paths.run_id} is being submitted")


def read_queue_of(missing: Sequence[Missing]) -> list[QueueEntry]:
    """Read Slurm's queue, in all clusters that have jobs of the runs.

    Raises:
        SlurmError: squeue does not answer.
    """
    queue = read_queue(list_clusters([job for part in missing for job in part.array_jobs]))
    if queue is None:
        raise SlurmError("squeue does not answer: nothing was submitted. Try again when Slurm is available")
    return queue


def submit_missing(
    missing: Sequence[Missing], queue: Sequence[QueueEntry], options: SubmitOptions, log: RunLog
) -> None:
    """Submit those of the folds that are neither finished nor pending or running, as one array.

    Raises:
        SlurmError: Slurm refuses them, or does not answer.
    """
    parts = [part for run in missing if (part := _find_part(run, queue, log)) is not None]
    if not parts:
        log.line("[SLURM] nothing to submit")
        return
    number, submitted = _submit(parts, options, log)
    for part in parts:
        if new := [fold for fold in part.folds if fold not in part.preempted]:
            run = "" if part.run.study is None else f"{part.run.paths.run_id} "
            log.line(f"[SLURM] job {number}: {run}folds {', '.join(map(str, new))} submitted, one task per fold")
        for fold, entry in part.preempted.items():
            jobs = submitted[part.run.paths.root]
            count = sum(fold in array_job.preempted for array_job in jobs if array_job.refused is None)
            resubmission = f"resubmitted as job {number} (preemption {count})"
            log.line(f"[SLURM] {part.run.name_fold(fold)}: job {entry.job} was preempted; {resubmission}")


def _find_part(missing: Missing, queue: Sequence[QueueEntry], log: RunLog) -> _Part | None:
    """Return the folds to submit of a run; None if there are none."""
    run, paths = missing.run, missing.run.paths
    missing.lock.check()
    resolved = resolve_lost_answers(missing.array_jobs, paths.run_id, queue)
    if resolved != missing.array_jobs:
        write_array_jobs(paths.array_jobs, resolved)
    finished = run.experiment.find_finished()
    unfinished = [fold for fold in missing.folds if fold not in finished]
    active = list_active(unfinished, list_run_jobs(paths), queue)
    for fold, entry in active.items():
        log.line(f"[SLURM] {run.name_fold(fold)}: already submitted as job {entry.job} ({entry.state})")
    folds = tuple(fold for fold in unfinished if fold not in active)
    preempted = {fold: entry for fold, entry in list_preempted(resolved, queue).items() if fold in folds}
    return _Part(run, folds, resolved, preempted) if folds else None


def _submit(
    parts: Sequence[_Part], options: SubmitOptions, log: RunLog
) -> tuple[str | None, dict[Path, tuple[ArrayJob, ...]]]:
    """Submit one array, recorded for each run before sbatch is called; return its number, and all array jobs by run."""
    token, first = secrets.token_hex(8), parts[0].run
    owner = first.study or first.paths.run_id
    consoles = first.paths.consoles if options.study is None else options.study / first.paths.consoles.name
    consoles.mkdir(parents=True, exist_ok=True)
    indices = [part.run.offset + fold for part in parts for fold in part.folds]
    command = render_sbatch(options.request, indices, render_comment(owner, token), render_output(str(consoles)))
    clusters, started = find_clusters(command, os.environ), format_time(datetime.now())

    def record(**changes: str | None) -> dict[Path, tuple[ArrayJob, ...]]:
        recorded = {}
        for part in parts:
            new = ArrayJob(
                token,
                part.folds,
                started,
                options.resume_command,
                cluster=clusters,
                preempted=tuple(part.preempted),
                study=part.run.study,
                offset=part.run.offset,
            )
            array_jobs = (*part.array_jobs, replace(new, **changes))  # type: ignore[arg-type]
            write_array_jobs(part.run.paths.array_jobs, array_jobs)
            recorded[part.run.paths.root] = array_jobs
        return recorded

    record()
    try:
        submitted = submit_script(command, options.script)
    except LostAnswerError as error:
        log.line(f"[SLURM] {error}; checking the queue in {POLL_S:g} s whether the job arrived")
        found, refusal = _find_lost_job(owner, token, clusters, options, str(error)), str(error)
    except SlurmError as error:
        found, refusal = None, str(error)
    else:
        found, refusal = submitted, ""
    if found is None:
        record(refused=refusal)
        raise SlurmError(f"the folds were not submitted: {refusal}")
    return found.job, record(job=found.job, cluster=found.cluster or clusters)


def _find_lost_job(
    owner: str, token: str, clusters: str | None, options: SubmitOptions, message: str
) -> Submitted | None:
    """Find the job whose answer was lost, which may take a moment to appear; None if it is not in the queue.

    Raises:
        SlurmError: squeue does not answer; the next launch of the run checks the queue before it submits anything.
    """
    has_answered = False
    for _ in range(_FIND_TRIES):
        time.sleep(POLL_S)
        queue = read_queue([clusters] if clusters is not None else [])
        has_answered = has_answered or queue is not None
        if found := find_array_job(owner, token, queue or []):
            return found
    if not has_answered:
        option = "--run-id" if options.study is None else "--study"
        raise SlurmError(
            f"{message}; squeue does not answer either: it is not known whether the folds are submitted. Run the same "
            f"command with {option} {owner} to find out; it submits nothing twice"
        )
    return None
