"""The experiment that all folds of a run share, and the only functions that open and close a run."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from doccls.config import Config, render_snapshot
from doccls.config.files import check_files
from doccls.config.load import complete_snapshot, list_values
from doccls.config.paths import find_output_problem
from doccls.data.mixing import check_mixing
from doccls.data.prepare import PreparedData, describe_folds, prepare_data
from doccls.data.sampler import BatchPlan
from doccls.data.scan_cache import read_scan_cache, write_scan_cache
from doccls.data.store import choose_store
from doccls.errors import UserError
from doccls.oof.merge import lock_merge, merge_locked
from doccls.oof.predictions import find_finished_folds
from doccls.oof.summary import list_scores
from doccls.report.make import is_reported, report_run
from doccls.reporting.log import RunLog
from doccls.run.fingerprint import check_snapshot, derive_fingerprint, digest_weights
from doccls.run.paths import RunPaths
from doccls.run.provenance import describe_software, render_command
from doccls.system.atomic_files import read_text, restore_files, write_text
from doccls.system.lifeline import is_launched
from doccls.system.lock import Lock
from doccls.system.signals import stopping_gracefully


@dataclass(frozen=True)
class Experiment:
    """The config, data and folder that all folds of a run share."""

    config: Config
    data: PreparedData
    fingerprint: str
    paths: RunPaths

    def plan(self, fold: int) -> BatchPlan:
        """Return the plan of the batches that train the fold."""
        seed, train = self.config.project.seed, self.config.train
        return BatchPlan(seed, fold, self.data.list_train(fold), train.batch_size, train.epochs)

    def find_finished(self) -> tuple[int, ...]:
        """Return the folds whose predictions exist.

        Raises:
            UserError: some belong to another experiment.
        """
        return tuple(find_finished_folds(self.paths, self.fingerprint, self.config.data.folds))


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder exists and belongs to this experiment."""

    experiment: Experiment
    finished: tuple[int, ...]  # folds
    lock: Lock | None = None  # taken by `before_write`

    def list_missing(self, folds: Sequence[int]) -> list[int]:
        """Return those of `folds` that are not finished."""
        return [fold for fold in folds if fold not in self.finished]


def log_config(config: Config, log: RunLog) -> None:
    """Log every resolved config value."""
    for key, value in list_values(config):
        log.line(f"[CFG] {key}={value}")
    log.line(f"[SEED] {config.project.seed} for Python, NumPy and PyTorch; {config.train.cpu_threads} CPU threads")


def prepare(config: Config, paths: RunPaths, log: RunLog) -> PreparedData:
    """Check the paths and the data, and log the results; images in the run's scan cache are not read again.

    Raises:
        UserError: files are missing, or the data can't be used.
    """
    check_files(config)
    check_mixing(config.train, config.train.batch_size, config.train.num_processes or 1)
    data = config.data
    log.line(
        f"[PATH] OK | train_csv={data.train_csv} | sample_csv={data.sample_csv}"
        f" | image_dir_train={data.image_dir_train}"
    )
    cache = read_scan_cache(paths.images, data.max_image_pixels, {})
    prepared = prepare_data(config, cache, choose_store(config), log)
    log.line(f"[DATA] OK | {len(prepared.manifest)} rows, {len(prepared.manifest.classes)} classes")
    for warning in prepared.warnings:
        log.line(f"[WARNING] {warning}")
    for line in describe_folds(prepared):
        log.line(f"[FOLD] {line}")
    return prepared


def open_run(
    config: Config,
    paths: RunPaths,
    now: datetime,
    processes: Mapping[str, Any],
    log: RunLog,
    before_write: Callable[[], Lock | None] = lambda: None,
) -> OpenRun:
    """Prepare the data, check that the run id belongs to this experiment, and create or join its folder.

    Only the main process may call. `processes` describes the ranks in the snapshot. `before_write` is called after the
    data is checked and before anything is written to the folder; a launcher takes its lock there.

    Raises:
        UserError: the data can't be used, the lock can't be taken, the folder can't be created, or the run id belongs
            to another experiment.
    """
    data = prepare(config, paths, log)
    weights = digest_weights(config.model)
    fingerprint = derive_fingerprint(config, data.digest, data.assignment.digest(), weights)
    experiment = Experiment(config, data, fingerprint, paths)
    lock = before_write()
    restore_files(paths.root)
    finished = experiment.find_finished()
    check_snapshot(paths, fingerprint)
    try:
        paths.live.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output.exp_dir: can't create {paths.root}: {error.strerror}") from error
    for folder in (paths.root, paths.live, paths.best_checkpoint(0).parent, paths.predictions_dir, paths.metrics_dir):
        problem = find_output_problem(folder)
        if problem is not None:
            raise UserError(f"output.exp_dir: {problem}")
    if not data.scans_in_store:
        write_scan_cache(paths.images, data.scans, config.data.max_image_pixels, {})
    _write_snapshot(experiment, now, processes)
    without_scans = replace(experiment, data=replace(data, scans={}))  # frees them: no later step reads them
    return OpenRun(without_scans, finished, lock)


def _write_snapshot(experiment: Experiment, now: datetime, processes: Mapping[str, Any]) -> None:
    """Write the run's snapshot, or add to an existing one what a launcher can't know: the devices of the ranks."""
    config, data, paths = experiment.config, experiment.data, experiment.paths
    try:
        earlier = read_text(paths.snapshot)
    except FileNotFoundError:
        earlier = None
    if earlier is not None:
        completed = complete_snapshot(earlier, processes)
        if completed is not None:
            write_text(paths.snapshot, completed)
    elif config.output.snapshots:
        provenance = {
            "run_id": paths.run_id,
            "started": now.isoformat(timespec="seconds"),
            "command": render_command(sys.argv),
            "fingerprint": experiment.fingerprint,
            "data_digest": data.digest,
            "folds_digest": data.assignment.digest(),
            "damage_version": config.damage_version,
            "num_samples": len(data.manifest),
            "skipped_rows": sorted(data.skipped),
            "classes": list(data.manifest.classes),
            **processes,
            **describe_software(),
        }
        write_text(paths.snapshot, render_snapshot(config, provenance))


def close_run(experiment: Experiment, log: RunLog) -> None:
    """Merge the folds if `valid_fold` is 'all', report, and log the scores and the end; as `merge` and `report` do.

    Raises:
        UserError: the fold predictions do not match each other or are incomplete.
        LockError: another process has been merging them for ten minutes.
    """
    if experiment.config.data.valid_fold == "all":
        with lock_merge(experiment.paths) as lock:
            merge(experiment, lock, log)
    else:
        log.line(describe_unmerged(experiment))
    report(experiment, log)
    log_done(experiment.paths, log)


def merge(experiment: Experiment, lock: Lock, log: RunLog) -> None:
    """Merge the folds and log the scores, also after a stop was requested. Only the main process may call.

    `lock` is that of `lock_merge`.

    Raises:
        UserError: the fold predictions do not match each other or are incomplete.
    """
    with stopping_gracefully():
        scores = list_scores(merge_locked(experiment.paths, lock))
    log.line(f"[OOF] -> {experiment.paths.oof_logits}")
    for line in scores:
        log.line(line)


def report(experiment: Experiment, log: RunLog) -> None:
    """Write a report of the finished folds if `output.report` asks for it. Only the main process may call.

    A process that a launcher has started leaves the report to it, and a requested stop ends it early.
    """
    if experiment.config.output.report and not is_launched() and not is_reported(experiment.paths):
        with stopping_gracefully():
            report_run(experiment.paths, log.line)


def log_done(paths: RunPaths, log: RunLog) -> None:
    """Log the last lines of a run before its exit marker."""
    log.line(f"[DONE] run={paths.run_id} folder={paths.root}")
    log.line("[BOOT] training pipeline finished successfully")


def describe_unmerged(experiment: Experiment) -> str:
    """Return what remains to be done for a run that was asked to train a single fold."""
    paths, num_folds = experiment.paths, experiment.config.data.folds
    missing = sorted(set(range(num_folds)) - set(experiment.find_finished()))
    if missing:
        return f"[OOF] not merged: folds {missing} of this run are missing; train them with --run-id {paths.run_id}"
    return f"[OOF] all {num_folds} folds are finished; merge them: doccls-launch merge {paths.root}"
