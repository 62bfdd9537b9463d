"""What all folds of a run share, and the only way to open a run (checked data, fingerprint, folder) and to close it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from doccls.config import Config, render_snapshot
from doccls.config.load import complete_snapshot, list_values
from doccls.data.manifest import check_paths
from doccls.data.prepare import PreparedData, describe_folds, prepare_data
from doccls.data.sampler import BatchPlan
from doccls.data.scan_cache import read_scan_cache, write_scan_cache
from doccls.data.store import choose_store
from doccls.errors import UserError
from doccls.oof.merge import merge_run
from doccls.oof.predictions import find_finished_folds
from doccls.oof.summary import list_scores
from doccls.reporting.log import RunLog
from doccls.run.fingerprint import check_snapshot, derive_fingerprint, digest_file
from doccls.run.paths import RunPaths
from doccls.run.provenance import describe_software, render_command
from doccls.system.atomic_files import write_text
from doccls.system.lock import Lock


@dataclass(frozen=True)
class Experiment:
    """What all folds of a run share."""

    config: Config
    data: PreparedData
    fingerprint: str
    paths: RunPaths

    def plan(self, fold: int) -> BatchPlan:
        """The batches that train the fold."""
        seed, train = self.config.project.seed, self.config.train
        return BatchPlan(seed, fold, self.data.list_train(fold), train.batch_size, train.epochs)

    def find_finished(self) -> tuple[int, ...]:
        """The folds whose predictions exist.

        Raises:
            UserError: some are another experiment's.
        """
        return tuple(find_finished_folds(self.paths, self.fingerprint, self.config.data.folds))


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder exists and belongs to this experiment."""

    experiment: Experiment
    finished: tuple[int, ...]
    """The folds that are finished."""
    lock: Lock | None = None
    """What `before_write` took."""

    def list_missing(self, folds: Sequence[int]) -> list[int]:
        """Those of `folds` that are not finished."""
        return [fold for fold in folds if fold not in self.finished]


def check_files(config: Config) -> None:
    """Every file and folder that the config names is there.

    Raises:
        UserError: some are not; all are named.
    """
    data = config.data
    needed = {"data.train_csv": (data.train_csv, "file"), "data.image_dir_train": (data.image_dir_train, "folder")}
    optional = {
        "data.sample_csv": (data.sample_csv, "file"),
        "data.image_dir_test": (data.image_dir_test, "folder"),
        "model.weights": (config.model.weights, "file"),
    }
    check_paths(needed | {key: stated for key, stated in optional.items() if stated[0] is not None})


def log_config(config: Config, log: RunLog) -> None:
    """Log every value that is in force."""
    for key, value in list_values(config):
        log.line(f"[CFG] {key}={value}")
    log.line(f"[SEED] {config.project.seed} for Python, NumPy and PyTorch; {config.train.cpu_threads} CPU threads")


def prepare(config: Config, paths: RunPaths, log: RunLog) -> PreparedData:
    """Check the paths and the data, and log what was found; images that the run has seen are not read again.

    Raises:
        UserError: files are missing, or the data can't be used.
    """
    check_files(config)
    data = config.data
    log.line(
        f"[PATH] OK | train_csv={data.train_csv} | sample_csv={data.sample_csv}"
        f" | image_dir_train={data.image_dir_train}"
    )
    cache = read_scan_cache(paths.images, data.max_image_pixels, {})
    prepared = prepare_data(config, cache, choose_store(config), log)
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
    """Prepare the data, check that the run is this experiment's, and create or join its folder; the main process calls.

    `processes` is what the snapshot says of them. `before_write` is called once the data is checked, before anything is
    written to the folder: there, a launcher takes its lock.

    Raises:
        UserError: the data can't be used, the lock can't be taken, the folder can't be made, or the run id belongs to
            another experiment.
    """
    data = prepare(config, paths, log)
    weights = digest_file(config.model.weights) if config.model.weights else None
    fingerprint = derive_fingerprint(config, data.digest, data.assignment.digest(), weights)
    experiment = Experiment(config, data, fingerprint, paths)
    lock = before_write()
    finished = experiment.find_finished()
    check_snapshot(paths, fingerprint)
    try:
        paths.live.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output.exp_dir: can't make {paths.root}: {error.strerror}") from error
    if not data.scans_in_store:
        write_scan_cache(paths.images, data.scans, config.data.max_image_pixels, {})
    _write_snapshot(experiment, now, processes)
    without_scans = replace(experiment, data=replace(data, scans={}))  # nobody needs them any more
    return OpenRun(without_scans, finished, lock)


def _write_snapshot(experiment: Experiment, now: datetime, processes: Mapping[str, Any]) -> None:
    """Write the run's snapshot; one that exists gets what a launcher can't know: what the ranks compute on."""
    config, data, paths = experiment.config, experiment.data, experiment.paths
    if paths.snapshot.exists():
        completed = complete_snapshot(paths.snapshot.read_text(encoding="utf-8"), processes)
        if completed is not None:
            write_text(paths.snapshot, completed)
    elif config.output.snapshots:
        described = {
            "run_id": paths.run_id,
            "started": now.isoformat(timespec="seconds"),
            "command": render_command(sys.argv),
            "fingerprint": experiment.fingerprint,
            "data_digest": data.digest,
            "folds_digest": data.assignment.digest(),
            "num_samples": len(data.manifest),
            "skipped_rows": sorted(data.skipped),
            "classes": list(data.manifest.classes),
            **processes,
            **describe_software(),
        }
        write_text(paths.snapshot, render_snapshot(config, described))


def close_run(experiment: Experiment, log: RunLog) -> None:
    """Merge the folds, if all were asked for, and log the scores and the end; the main process calls.

    Raises:
        UserError: the parts do not make one whole.
    """
    paths = experiment.paths
    if experiment.config.data.valid_fold == "all":
        scores = list_scores(merge_run(paths))
        log.line(f"[OOF] -> {paths.oof_logits}")
        for line in scores:
            log.line(line)
    else:
        log.line(describe_unmerged(experiment))
    log_done(paths, log)


def log_done(paths: RunPaths, log: RunLog) -> None:
    """The last lines of a run before its exit marker."""
    log.line(f"[DONE] run={paths.run_id} folder={paths.root}")
    log.line("[BOOT] training pipeline finished successfully")


def describe_unmerged(experiment: Experiment) -> str:
    """What is still to do for a run whose command asked for one fold alone."""
    paths, num_folds = experiment.paths, experiment.config.data.folds
    missing = sorted(set(range(num_folds)) - set(experiment.find_finished()))
    if missing:
        return f"[OOF] not merged: folds {missing} of this run are still to train, with --run-id {paths.run_id}"
    return f"[OOF] all {num_folds} folds are there; merge them: doccls-launch merge {paths.root}"
