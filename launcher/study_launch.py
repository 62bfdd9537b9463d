"""`doccls-launch run` with several configs or seeds: trains the folds of all runs in one queue, and ranks the runs."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime

from doccls.config import Config
from doccls.config.load import list_values
from doccls.config.paths import describe_error
from doccls.errors import UserError
from doccls.experiment import close_run
from doccls.oof.predictions import is_merged
from doccls.oof.summary import read_summary
from doccls.reporting.log import RunLog
from doccls.run.metrics_log import read_metrics
from doccls.run.paths import locate_study
from doccls.system.atomic_files import write_text
from doccls.system.lock import hold_lock
from launcher.launch import Job, LaunchOptions, QueuedRun, queue_run, serve_launch, train_queue
from launcher.study import Standing, StudyRun, Work, describe_study, order_folds, render_leaderboard


@dataclass(frozen=True)
class LoadedRun:
    """A run of a study with its config, and the options of a launch of this run alone."""

    run: StudyRun
    config: Config
    options: LaunchOptions


def launch_study(name: str, runs: Sequence[LoadedRun], now: datetime, log: RunLog) -> None:
    """Train the missing folds of all runs in one queue, merge each run as its last fold ends, and rank them.

    The options of the first run, such as its slots, are those of the queue.

    Raises:
        UserError: a config or its data can't be used, another launcher has the study or a run, or folds failed.
        Interrupted: a signal came; each fold has stopped at its next safe point.
    """
    folder = locate_study(runs[0].config.output.exp_dir, name)
    problems: dict[str, str] = {}

    def close(queued: QueuedRun) -> None:
        try:
            close_run(queued.experiment, log)
        except Exception as error:  # noqa: BLE001 (the folds of other runs must not end for it)
            problems[queued.paths.run_id] = str(error) or type(error).__name__
            log.line(f"[WARNING] run {queued.paths.run_id}: {problems[queued.paths.run_id]}")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output.exp_dir: {describe_error(error, folder, 'folder')}") from error
    with ExitStack() as held:
        held.enter_context(hold_lock(folder / "study.lock", f"study {name} is being launched"))
        server = held.enter_context(serve_launch(runs[0].options, log))
        settings = _find_differing([loaded.config for loaded in runs])
        for loaded, own in zip(runs, settings, strict=True):
            log.line(f"[STUDY] run {loaded.run.run_id}: {' '.join(f'{key}={value}' for key, value in own.items())}")
        warnings = dict.fromkeys(warning for loaded in runs for warning in loaded.options.plan.warnings)
        for warning in warnings:
            log.line(f"[WARNING] {warning}")
        queued = [queue_run(loaded.config, loaded.run.run_id, now, loaded.options, log, held) for loaded in runs]
        jobs = _list_jobs(queued)
        log.line(f"[STUDY] {len(jobs)} folds of {len(runs)} runs to train")
        try:
            for run in queued:
                if not run.missing and not is_merged(run.paths):
                    close(run)
            train_queue(queued, jobs, runs[0].options, log, close, server)
        finally:
            try:
                standings = [
                    _measure(loaded.run, run, own, problems.get(loaded.run.run_id))
                    for loaded, run, own in zip(runs, queued, settings, strict=True)
                ]
                for line in render_leaderboard(standings):
                    log.line(f"[STUDY] {line}")
                write_text(folder / "study.json", json.dumps(describe_study(name, standings), indent=2) + "\n")
                log.line(f"[STUDY] -> {folder / 'study.json'}")
            except (OSError, UserError) as error:  # how the folds ended matters more
                log.line(f"[WARNING] study {name}: {error}")
    if problems:
        raise UserError("\n".join(f"run {run_id}: {problem}" for run_id, problem in problems.items()))


def _list_jobs(runs: Sequence[QueuedRun]) -> list[Job]:
    works = [_estimate(number, run) for number, run in enumerate(runs)]
    return [Job(runs[number], fold, f"{runs[number].paths.run_id} fold {fold}") for number, fold in order_folds(works)]


def _estimate(number: int, run: QueuedRun) -> Work:
    train, data = run.experiment.config.train, run.experiment.data
    finished = {fold for fold in run.experiment.config.data.list_wanted() if fold not in run.missing}
    times_s = [row.time_s for row in read_metrics(run.paths)[0] if row.fold in finished]
    measured_s = sum(times_s) / len(finished) if times_s and finished else None
    return Work(number, run.missing, float(train.epochs * len(data.manifest) * train.img_size**2), measured_s)


def _measure(run: StudyRun, queued: QueuedRun, settings: dict[str, str], problem: str | None) -> Standing:
    epochs, _ = read_metrics(queued.paths)
    ranks = len(queued.ledger.content.attempts[-1].devices) if queued.ledger.content.attempts else 1
    seconds = sum(row.time_s for row in epochs)
    finished = queued.experiment.find_finished()
    return Standing(
        run_id=run.run_id,
        folder=str(queued.paths.root),
        config=str(run.config),
        seed=run.seed,
        finished=len(finished),
        num_folds=queued.experiment.config.data.folds,
        device_hours=seconds * ranks / 3600 if epochs else None,
        settings=settings,
        summary=read_summary(queued.paths.summary) if is_merged(queued.paths) else None,
        problem=problem,
    )


def _find_differing(configs: Sequence[Config]) -> list[dict[str, str]]:
    """Return for each config the keys whose values are not the same in all of them, without `output`."""
    values = [{key: str(value) for key, value in list_values(config)} for config in configs]
    keys = [
        key
        for key in dict.fromkeys(key for config in values for key in config)
        if not key.startswith("output.") and len({config.get(key) for config in values}) > 1
    ]
    return [{key: config[key] for key in keys if key in config} for config in values]
