"""Entry point `python -m doccls.train --config ...`: arguments -> config -> folds -> exit marker."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from doccls.config import Config
from doccls.config.arguments import add_config_arguments, load_arguments_with_warnings
from doccls.config.files import check_files
from doccls.config.load import LoadedConfig
from doccls.config.paths import find_output_problem
from doccls.data.loader import start_worker_server
from doccls.data.shared_memory import expects_workers
from doccls.reporting.command import run_training
from doccls.reporting.console import guarding_console
from doccls.reporting.log import RunLog, open_log
from doccls.run.fingerprint import claim_precision
from doccls.run.heartbeat import open_heartbeat
from doccls.run.owner import FoldOwner
from doccls.run.paths import RunPaths, check_run_id, locate_run, name_log, new_run_id
from doccls.run.watchdog import reporting_peers, watching
from doccls.system.allocator import keep_freed_memory
from doccls.system.lifeline import LAUNCHED, end_with_parent, is_launched
from doccls.system.lock import LockError, find_holder
from doccls.system.rank import rank_by_environment
from doccls.system.signals import check_stop, stop_on_sigusr2, stopping_gracefully, stopping_immediately
from doccls.system.user import complete_user
from doccls.system.variables import drop_empty_variables

if TYPE_CHECKING:  # torch takes seconds to import: config errors should be reported before that
    from accelerate import Accelerator

    from doccls.experiment import OpenRun
    from doccls.training.engine import RunContext


# A restarted fold waits this long for the lock: its last process may exit later than the launcher noticed its end.
_LOCK_WAIT_S = 20.0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the `doccls.train` command line."""
    parser = argparse.ArgumentParser(
        prog="python -m doccls.train",
        description="Train the folds of an image classifier and write the merged out-of-fold predictions.",
        epilog="Several processes: accelerate launch --config_file accelerate_configs/FILE -m doccls.train ...",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--run-id",
        metavar="ID",
        help="run id; an existing run is resumed: its finished folds are kept",
    )
    parser.add_argument(
        "--allow-world-size-change",
        action="store_true",
        help="resume folds saved by another number of processes: same batches, but not bit-identical",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train the folds of a config and return the exit code; user errors are reported, not raised."""
    end_with_parent()
    with guarding_console():
        drop_empty_variables(os.environ)
        complete_user(os.environ)
        arguments = build_parser().parse_args(argv)
        return run_training(lambda log: _train(arguments, log), rank_by_environment())


def _train(arguments: argparse.Namespace, log: RunLog) -> None:
    with open_heartbeat() as heartbeat:
        loaded, now = load_arguments_with_warnings(arguments), datetime.now()
        config = loaded.config
        if config.train.sigusr2 == "stop":
            stop_on_sigusr2()
        fold = _find_fold(config)
        if is_launched():  # the launcher has checked that the run is this config's, so its folder may be written
            paths = locate_run(config.output.exp_dir, check_run_id(arguments.run_id), now)
            if not _is_trained_by_another(paths, fold):  # otherwise the heartbeat belongs to that process
                heartbeat.write_to(paths.heartbeat(fold, rank_by_environment()))
        if expects_workers(config.data.num_workers, config.data.store != "off"):
            start_worker_server()  # early, so that both processes import in parallel
        from doccls.training.distributed import on_main, start_processes

        accelerator = start_processes(config)
        run_id = arguments.run_id or new_run_id(config.project.version)
        run_id = on_main(accelerator, lambda: check_run_id(run_id))
        path = name_log(config.output.logs_dir, run_id, now, "" if fold is None else f"fold{fold}")
        on_main(accelerator, lambda: _check_log(config, path))  # otherwise the others would wait for the main process
        # From the first step to the end, a rank that exited alone would make the others fail. After the last step
        # nothing is left to stop but the merge, which mostly takes seconds: it finishes.
        with stopping_gracefully(), log.writing_to(path if accelerator.is_main_process else None):
            from doccls.experiment import close_run
            from doccls.training.engine import RunContext

            with FoldOwner() as owner:
                with stopping_immediately():
                    check_stop()  # a signal may have come during the imports
                    run = _open(loaded, run_id, now, accelerator, owner, log)
                    heartbeat.write_to(run.experiment.paths.heartbeat(fold, accelerator.process_index))
                    log.line(f"[ARTIFACTS] {run.experiment.paths.root}")
                context = RunContext(run.experiment, accelerator, log, heartbeat, owner)
                _train_folds(context, run.finished, arguments.allow_world_size_change)
            on_main(accelerator, lambda: close_run(run.experiment, log))
            accelerator.end_training()


def _check_log(config: Config, path: Path) -> None:
    """Check that the log can be written; if its folder can't be used, report the problems of all other paths too."""
    if find_output_problem(path.parent) is not None:
        check_files(config)
    open_log(path).close()


def _is_trained_by_another(paths: RunPaths, fold: int | None) -> bool:
    """Return whether the fold is being trained by a process that this process's launcher did not start."""
    with suppress(LockError):
        holder = None if fold is None else find_holder(paths.fold_lock(fold))
        return holder is not None and holder.launch != os.environ[LAUNCHED]
    return False


def _find_fold(config: Config) -> int | None:
    """Return the single fold to train, or None for all."""
    return None if config.data.valid_fold == "all" else config.data.valid_fold


def _open(
    loaded: LoadedConfig, run_id: str, now: datetime, accelerator: "Accelerator", owner: FoldOwner, log: RunLog
) -> "OpenRun":
    """Open the run on the main process and lock the folds to train. All ranks must call."""
    from doccls.experiment import log_config, open_run
    from doccls.model.names import check_names
    from doccls.training.distributed import list_devices, on_main

    config = loaded.config
    log_config(config, log)
    for warning in loaded.warnings:
        log.line(f"[WARNING] {warning}")
    processes = {
        "world_size": accelerator.num_processes,
        "device": list_devices(accelerator),
        "precision": accelerator.mixed_precision,
    }

    def open_on_main() -> "OpenRun":
        check_names(config)
        paths = locate_run(config.output.exp_dir, run_id, now)
        run = open_run(config, paths, now, processes, log)
        claim_precision(paths, accelerator.mixed_precision)
        owner.take(paths, run.list_missing(config.data.list_wanted()), _LOCK_WAIT_S if is_launched() else 0.0)
        return replace(run, finished=run.experiment.find_finished())  # the previous owner may have finished some

    return on_main(accelerator, open_on_main)


def _train_folds(context: "RunContext", finished: Sequence[int], allow_change: bool) -> None:
    """Train the unfinished folds under the watchdog of each process. All ranks must call."""
    from doccls.oof.predictions import remove_resume_checkpoints
    from doccls.training.batches import load_folds
    from doccls.training.distributed import on_main
    from doccls.training.resume import find_resume_points
    from doccls.training.trainer import release_memory, train_fold

    accelerator, log, heartbeat = context.accelerator, context.log, context.heartbeat
    config, paths = context.experiment.config, context.experiment.paths
    ranks = range(1, accelerator.num_processes) if accelerator.is_main_process else ()
    peers = {rank: paths.heartbeat(_find_fold(config), rank) for rank in ranks}
    limit_s = config.train.collective_timeout_s if accelerator.num_processes > 1 else None
    with reporting_peers(peers, log), watching(heartbeat, peers, limit_s, config.train.stop_timeout_s):
        wanted = config.data.list_wanted()
        with stopping_immediately():
            check_stop()
            for fold in wanted:
                if fold in finished:
                    log.line(f"[FOLD {fold}] finished before: kept {paths.predictions(fold)}")
            on_main(accelerator, lambda: remove_resume_checkpoints(paths, finished))  # left by a kill
            missing = [fold for fold in wanted if fold not in finished]
            starts = find_resume_points(context, missing, allow_change)
            gc.freeze()  # the libraries own a million objects, which collections between folds need not visit
            if accelerator.device.type == "cpu":  # after the scan, whose threads would each keep their decode buffers
                keep_freed_memory(os.environ)
        with load_folds(context, missing, starts) as batches:
            for fold in missing:
                train_fold(context, fold, starts.get(fold), batches)
                release_memory(accelerator)


if __name__ == "__main__":
    sys.exit(main())
