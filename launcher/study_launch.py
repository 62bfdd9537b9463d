"""`doccls-launch run` with several runs: trains the folds of all in one queue, and ranks the runs."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from doccls.config import Config
from doccls.config.load import list_values
from doccls.config.paths import describe_error
from doccls.errors import UserError
from doccls.experiment import Experiment
from doccls.oof.predictions import is_merged
from doccls.reporting.log import RunLog
from doccls.run.metrics_log import read_metrics
from doccls.run.paths import RunPaths, locate_run, locate_study
from doccls.system.lock import hold_lock
from doccls.system.signals import Interrupted, stop_requested, stopping_gracefully
from launcher.closing import Closings, Command, Ended, find_command, log_closed
from launcher.forking import RankServer
from launcher.launch import serve_launch, train_queue
from launcher.leaderboard import Standing, render_leaderboard
from launcher.queued_run import Job, LaunchOptions, QueuedRun, queue_run
from launcher.standings import measure_runs
from launcher.study import StudyRun, Work, naming_study, order_folds
from launcher.study_file import (
    Member,
    Study,
    locate_member,
    locate_study_file,
    locate_study_lock,
    locate_update_lock,
    read_study,
    write_study,
)

_BLEND = "blend"
_UPDATE_LIMIT_S = 600.0  # how long other tasks may take to update the study, and to blend its runs


@dataclass(frozen=True)
class LoadedRun:
    """A run of a study with its config, and the options of a launch of this run alone."""

    run: StudyRun
    config: Config
    options: LaunchOptions


def launch_study(name: str, runs: Sequence[LoadedRun], blend: bool, now: datetime, log: RunLog) -> None:
    """Train the missing folds of all runs in one queue, merge each run as its last fold ends, and rank them.

    The options of the first run, such as its slots, are those of the queue. With `blend`, all runs are blended at last.

    Raises:
        UserError: a config or its data can't be used, another launcher has the study or a run, or folds failed.
        Interrupted: a signal came; each fold has stopped at its next safe point.
    """
    folder = open_study(runs[0].config, name)
    with ExitStack() as held:
        held.enter_context(hold_lock(locate_study_lock(folder), f"study {name} is being launched"))
        server = held.enter_context(serve_launch(runs[0].options, log))
        warnings = dict.fromkeys(warning for loaded in runs for warning in loaded.options.plan.warnings)
        for warning in warnings:
            log.line(f"[WARNING] {warning}")
        pairs = [(loaded.run, loaded.config) for loaded in runs]
        roots = [locate_run(config.output.exp_dir, run.run_id, now).root for run, config in pairs]
        study = describe_study(name, runs[0].options.resume_command, pairs, roots)
        rank_study(folder, study, {})
        queued = []
        for loaded, member in zip(runs, study.members, strict=True):
            described = " ".join(f"{key}={value}" for key, value in member.settings.items())
            log.line(f"[STUDY] run {member.run_id}: {described}".rstrip(": "))
            with naming_study():
                queued.append(queue_run(loaded.config, loaded.run.run_id, now, loaded.options, log, held))
        if blend:
            check_blendable([run.experiment for run in queued])
        launch = _StudyLaunch(folder, study, queued, log)
        launch.train(runs[0].options, server, blend)


def open_study(config: Config, name: str) -> Path:
    """Return the folder of the study, which is created if need be.

    Raises:
        UserError: it can't be created.
    """
    folder = locate_study(config.output.exp_dir, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output.exp_dir: {describe_error(error, folder, 'folder')}") from error
    return folder


def describe_study(
    name: str, resume_command: str, runs: Sequence[tuple[StudyRun, Config]], roots: Sequence[Path]
) -> Study:
    """Return the study of these runs, whose folders are `roots`."""
    settings = find_differing([config for _, config in runs])
    members = tuple(
        Member(
            run_id=run.run_id,
            folder=f"{root.parent.name}/{root.name}",
            config=str(run.config),
            seed=run.seed,
            num_folds=config.data.folds,
            settings=own,
            wanted=len(config.data.list_wanted()),
        )
        for (run, config), root, own in zip(runs, roots, settings, strict=True)
    )
    return Study(name, resume_command, members)


def rank_study(
    folder: Path, study: Study, problems: Mapping[str, str], wait_s: float = _UPDATE_LIMIT_S
) -> list[Standing]:
    """Write how the runs of the study did, and those of earlier commands, to study.json; return that of its own runs.

    Raises:
        UserError: another process updates the study for too long, or its file is damaged.
        OSError: the file can't be written.
    """
    with hold_lock(locate_update_lock(folder), f"study {study.name} is being updated", wait_s) as lock:
        joined = study.join(read_study(folder))
        standings = measure_runs(folder, joined, problems)
        lock.check()
        write_study(folder, joined, standings)
    own = {member.run_id for member in study.members}
    return [standing for standing in standings if standing.run_id in own]


def close_study_share(
    folder: Path, study: Study, problems: Mapping[str, str], log: RunLog, blend: bool = False
) -> str | None:
    """Update study.json at the end of a task, or of all: once the runs are complete, rank them, and `blend` them.

    Whatever goes wrong is a warning, since the folds are trained, and is returned.
    """
    try:
        standings = rank_study(folder, study, problems)
        unfinished = [standing for standing in standings if not standing.is_complete]
        if unfinished:
            runs = ", ".join(f"{run.run_id} ({run.finished} of {run.wanted} folds)" for run in unfinished)
            log.line(f"[STUDY] no leaderboard yet: {runs} not complete")
            return None
        log_leaderboard(standings, log)
        if blend:
            with hold_lock(locate_update_lock(folder), f"study {study.name} is being blended", _UPDATE_LIMIT_S):
                blend_runs([locate_member(folder, member) for member in study.members], log)
    except (OSError, UserError) as error:
        log.line(f"[WARNING] study {study.name}: {error}")
        return str(error)
    return None


def check_blendable(experiments: Sequence[Experiment]) -> None:
    """Check before the training that the runs can be blended after it.

    Raises:
        UserError: they differ in data or folds.
    """
    first, *others = experiments
    for other in others:
        names = f"runs {first.paths.run_id} and {other.paths.run_id}"
        if other.data.digest != first.data.digest:
            raise UserError(f"--blend: {names} are on different data, so they can't be blended")
        if other.data.assignment.digest() != first.data.assignment.digest():
            raise UserError(
                f"--blend: {names} are on different folds, so they can't be blended: give their configs the same "
                "data.folds, data.stratify, data.group_col and project.seed (or data.fold_seed)"
            )


def make_blend_command(runs: Sequence[RunPaths]) -> Command:
    """Return the command that blends the runs."""
    return Command([sys.executable, "-m", "doccls", "blend", *(str(paths.root) for paths in runs)])


def blend_runs(runs: Sequence[RunPaths], log: RunLog) -> None:
    """Blend the runs, and log the result.

    Raises:
        UserError: they can't be blended.
    """

    def report(ended: Ended) -> None:
        if ended.code:
            raise UserError(f"--blend: {ended.output}")
        log_closed(_BLEND, ended, log)

    closings = Closings(report)
    with closings.stopping(), stopping_gracefully():
        closings.add(_BLEND, make_blend_command(runs))
        closings.finish()


class _StudyLaunch:
    """The launch of a study whose runs are open and locked."""

    def __init__(self, folder: Path, study: Study, queued: Sequence[QueuedRun], log: RunLog) -> None:
        self._folder, self._study, self._queued, self._log = folder, study, queued, log
        self._closed: set[str] = set()  # run ids
        self._problems: dict[str, str] = {}
        self._closings = Closings(self._report_closing)

    def train(self, options: LaunchOptions, server: RankServer | None, blend: bool) -> None:
        """Train the missing folds, in ranks from the server; merge, blend and rank the runs.

        Raises:
            UserError: folds or merges failed, or runs were cancelled.
            Interrupted: a signal came.
        """
        jobs = _list_jobs(self._queued)
        self._log.line(f"[STUDY] {len(jobs)} folds of {len(self._queued)} runs to train")
        try:
            with self._closings.stopping(), stopping_gracefully():
                self._train(jobs, options, server)
                if blend:
                    self._blend()
        except Interrupted:
            self._log.line(f"[STUDY] to continue: {self._study.resume_command}")
            raise
        finally:
            try:
                self._rank()
            except (OSError, UserError) as error:  # how the folds ended matters more
                self._log.line(f"[WARNING] study {self._study.name}: {error}")
        if self._problems:
            problems = "\n".join(f"{_describe(run_id)}: {problem}" for run_id, problem in self._problems.items())
            raise UserError(f"{problems}\nto try again: {self._study.resume_command}")

    def _train(self, jobs: Sequence[Job], options: LaunchOptions, server: RankServer | None) -> None:
        for run in self._queued:
            if not run.missing:
                self._close(run)
        try:
            train_queue(self._queued, jobs, options, self._log, self._close, self._closings.poll, server)
        finally:
            if stop_requested() is None:
                self._close_complete()
            self._closings.finish()

    def _close_complete(self) -> None:
        """Close the runs that are complete although folds of others failed, and those that other processes completed.

        Whatever is wrong with one of them concerns no other: it is a problem of that run.
        """
        for run in self._queued:
            try:
                if set(run.experiment.config.data.list_wanted()) <= set(run.experiment.find_finished()):
                    self._close(run)
            except UserError as error:
                self._note_problem(run.paths.run_id, str(error))

    def _close(self, run: QueuedRun) -> None:
        command = find_command(run.experiment)
        if command is not None and run.paths.run_id not in self._closed:
            self._closed.add(run.paths.run_id)
            self._closings.add(run.paths.run_id, command)

    def _blend(self) -> None:
        merged = [run.paths for run in self._queued if is_merged(run.paths)]
        if len(merged) < len(self._queued):
            self._log.line("[WARNING] --blend: not all runs are merged: nothing is blended")
            return
        self._closings.add(_BLEND, make_blend_command(merged))
        self._closings.finish()

    def _report_closing(self, ended: Ended) -> None:
        if ended.code and ended.is_report:
            self._log.line(f"[WARNING] {_describe(ended.run_id)}: no report: {ended.output}")
        elif ended.code:
            self._note_problem(ended.run_id, ended.output)
        else:
            log_closed(_describe(ended.run_id), ended, self._log)

    def _note_problem(self, run_id: str, message: str) -> None:
        self._problems[run_id] = message
        self._log.line(f"[WARNING] {_describe(run_id)}: {message}")

    def _rank(self) -> None:
        """Write study.json, and log the leaderboard.

        Raises:
            UserError, OSError: see `rank_study`.
        """
        log_leaderboard(rank_study(self._folder, self._study, self._problems), self._log)
        self._log.line(f"[STUDY] -> {locate_study_file(self._folder)}")


def _describe(run_id: str) -> str:
    return _BLEND if run_id == _BLEND else f"run {run_id}"


def log_leaderboard(standings: Sequence[Standing], log: RunLog) -> None:
    """Log the runs of the study, the best first."""
    for line in render_leaderboard(standings):
        log.line(f"[STUDY] {line}")


def _list_jobs(runs: Sequence[QueuedRun]) -> list[Job]:
    works = [
        estimate_work(number, run.missing, run.experiment.config, len(run.experiment.data.manifest), run.paths)
        for number, run in enumerate(runs)
    ]
    return [Job(runs[number], fold) for number, fold in order_folds(works)]


def estimate_work(number: int, missing: tuple[int, ...], config: Config, num_pages: int, paths: RunPaths) -> Work:
    """Estimate how long the missing folds of the study's run `number` take, by its finished folds if it has any."""
    finished = {fold for fold in config.data.list_wanted() if fold not in missing}
    times_s = [row.time_s for row in read_metrics(paths)[0] if row.fold in finished]
    measured_s = sum(times_s) / len(finished) if times_s and finished else None
    return Work(number, missing, float(config.train.epochs * num_pages * config.train.img_size**2), measured_s)


def find_differing(configs: Sequence[Config]) -> list[dict[str, str]]:
    """Return for each config the keys whose values are not the same in all of them, without `output`."""
    values = [{key: str(value) for key, value in list_values(config)} for config in configs]
    keys = [
        key
        for key in dict.fromkeys(key for config in values for key in config)
        if not key.startswith("output.") and len({config.get(key) for config in values}) > 1
    ]
    return [{key: config[key] for key in keys if key in config} for config in values]
