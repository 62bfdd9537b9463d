"""Entry point `python -m doccls.train --config ...`: arguments -> config -> folds -> exit marker."""

import argparse
import gc
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from doccls.config import Config
from doccls.config.arguments import add_config_arguments, load_arguments
from doccls.data.shared_memory import expects_workers
from doccls.data.workers import start_worker_server
from doccls.errors import OwnError, UserError
from doccls.run.allocator import keep_freed_memory
from doccls.run.console import close_console, say_last
from doccls.run.heartbeat import Heartbeat, beating
from doccls.run.identity import claim_precision
from doccls.run.lifeline import LAUNCHED, end_with_parent, is_launched
from doccls.run.lock import LockError, find_holder
from doccls.run.owner import FoldOwner
from doccls.run.paths import RunPaths, check_run_id, locate_run, name_log, new_run_id
from doccls.run.peers import telling_of_peers, watching
from doccls.run.rank import rank_by_environment
from doccls.run.runlog import RunLog, exit_code, render_exit
from doccls.run.signals import (
    Interrupted,
    at_sudden_end,
    handling_signals,
    ignore_signals,
    naming_one_cause,
    stop_on_sigusr2,
    stopping_gracefully,
)

if TYPE_CHECKING:  # the stack takes seconds to import: a mistake in the config is told before that
    from accelerate import Accelerator

    from doccls.experiment import Experiment


_OUTLIVING_S = 20.0
"""How long the process of a fold that is started again may outlive the launcher's word that it is gone."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of `doccls.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m doccls.train",
        description="Train the folds of an image classifier and write the merged out-of-fold predictions.",
        epilog="Several processes: accelerate launch --config_file accelerate_configs/FILE -m doccls.train ...",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--run-id",
        metavar="ID",
        help="name of the run; an existing one is joined: finished folds are kept, others go on",
    )
    parser.add_argument(
        "--allow-world-size-change",
        action="store_true",
        help="go on with a fold that another number of processes began: the same batches, not the same bits",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code. Never raises for what a user did."""
    end_with_parent()
    arguments = build_parser().parse_args(argv)
    with handling_signals():
        code = _train(arguments)
    close_console()
    return code


def _train(arguments: argparse.Namespace) -> int:
    log = RunLog(None)
    with at_sudden_end(lambda reason, code: _end_suddenly(reason, code, log.opened)):
        try:
            with beating() as heart:
                config, now = load_arguments(arguments), datetime.now()
                if config.train.sigusr2 == "stop":
                    stop_on_sigusr2()
                if is_launched():  # into a run that is known to be this config's: its launcher hears of any mistake
                    paths = locate_run(config.output.exp_dir, check_run_id(arguments.run_id), now)
                    if not _is_trained_by_another(paths, _find_fold(config)):  # else the heartbeat is that process's
                        heart.write_to(paths.heartbeat(_find_fold(config), rank_by_environment()))
                if expects_workers(config.data.num_workers, config.data.store != "off"):
                    start_worker_server()  # it imports while this process does
                from doccls.training.processes import on_main, start_processes

                accelerator = start_processes(config)
                run_id = arguments.run_id or new_run_id(config.project.version)
                run_id = on_main(accelerator, lambda: check_run_id(run_id))
                fold = _find_fold(config)
                path = name_log(config.output.logs_dir, run_id, now, "" if fold is None else f"fold{fold}")
                log = RunLog(path if accelerator.is_main_process else None)
                with log, naming_one_cause():
                    _run(config, run_id, now, arguments.allow_world_size_change, accelerator, log, heart)
        except (Exception, Interrupted) as error:  # noqa: BLE001 (the last place: an error ends the process, told)
            return _fail(error, logged=log.opened)
    accelerator.end_training()
    if accelerator.is_main_process:
        say_last("[EXIT] training finished successfully (see logs/* for details)", sys.stdout)
    return 0


def _is_trained_by_another(paths: RunPaths, fold: int | None) -> bool:
    """Whether a process that this one's launcher has not started trains the fold."""
    with suppress(LockError):
        holder = None if fold is None else find_holder(paths.fold_lock(fold))
        return holder is not None and holder.launch != os.environ[LAUNCHED]
    return False


def _find_fold(config: Config) -> int | None:
    """The one fold that is trained; None is all."""
    return None if config.data.valid_fold == "all" else config.data.valid_fold


def _run(
    config: Config,
    run_id: str,
    now: datetime,
    allow_change: bool,
    accelerator: "Accelerator",
    log: RunLog,
    heart: Heartbeat,
) -> None:
    """The run, in the order of the contract. All ranks must call."""
    from doccls.experiment import close_run, identify, open_run, prepare, tell_config
    from doccls.model.names import check_names
    from doccls.training.processes import list_devices, on_main

    tell_config(config, log)
    on_main(accelerator, lambda: check_names(config))
    paths = on_main(accelerator, lambda: locate_run(config.output.exp_dir, run_id, now))

    described = {
        "world_size": accelerator.num_processes,
        "device": list_devices(accelerator),
        "precision": accelerator.mixed_precision,
    }

    def make_run() -> "tuple[Experiment, list[int]]":
        made = identify(config, prepare(config, paths, log), paths)
        finished = open_run(made, now, described)
        return replace(made, data=replace(made.data, scans={})), finished  # nobody needs the looks any more

    experiment, finished = on_main(accelerator, make_run)
    on_main(accelerator, lambda: claim_precision(paths, accelerator.mixed_precision))
    with FoldOwner() as owner:
        finished = on_main(accelerator, lambda: _take_folds(owner, experiment, finished))
        heart.write_to(paths.heartbeat(_find_fold(config), accelerator.process_index))
        log.line(f"[ARTIFACTS] {paths.root}")
        ranks = range(1, accelerator.num_processes) if accelerator.is_main_process else ()
        peers = {rank: paths.heartbeat(_find_fold(config), rank) for rank in ranks}
        limit_s = config.train.collective_timeout_s if accelerator.num_processes > 1 else None
        with telling_of_peers(peers, log), watching(heart, peers, limit_s, config.train.stop_timeout_s):
            _train_folds(experiment, finished, allow_change, accelerator, log, heart, owner)
    on_main(accelerator, lambda: close_run(experiment, log))


def _take_folds(owner: FoldOwner, experiment: "Experiment", finished: list[int]) -> list[int]:
    """Take the folds that are to be trained; which of all are finished, perhaps by who owned them a moment ago."""
    from doccls.oof.parts import find_finished_folds

    config = experiment.config
    missing = [fold for fold in config.data.list_wanted() if fold not in finished]
    owner.take(experiment.paths, missing, _OUTLIVING_S if is_launched() else 0.0)
    return find_finished_folds(experiment.paths, experiment.identity, config.data.folds)


def _train_folds(
    experiment: "Experiment",
    finished: list[int],
    allow_change: bool,
    accelerator: "Accelerator",
    log: RunLog,
    heart: Heartbeat,
    owner: FoldOwner,
) -> None:
    from doccls.oof.parts import remove_states
    from doccls.training.batches import load_folds
    from doccls.training.fold import release_memory, train_fold
    from doccls.training.processes import on_main
    from doccls.training.resume import find_resume_points

    wanted = experiment.config.data.list_wanted()
    for fold in wanted:
        if fold in finished:
            log.line(f"[FOLD {fold}] finished before: kept {experiment.paths.part(fold)}")
    on_main(accelerator, lambda: remove_states(experiment.paths, finished))  # killed before they could
    missing = [fold for fold in wanted if fold not in finished]
    starts = find_resume_points(experiment, missing, accelerator, allow_change, log)
    gc.freeze()  # the imported libraries are a million objects: collecting what a fold leaves need not visit them
    if accelerator.device.type == "cpu":  # not before the look, each of whose threads would keep what it decoded in
        keep_freed_memory(os.environ)
    with stopping_gracefully(), load_folds(experiment, missing, starts, accelerator, log) as batches:
        for fold in missing:
            train_fold(experiment, fold, starts.get(fold), batches, accelerator, log, heart, owner)
            release_memory(accelerator)


def _fail(error: BaseException, logged: bool) -> int:
    """Say the console's last words, once: the main process's, and another's where the error is its own."""
    ignore_signals()
    rank, code = rank_by_environment(), exit_code(error)
    expected = isinstance(error, UserError | Interrupted)
    if not expected and not (logged and rank == 0):  # the main process's log has shown it
        say_last("".join(traceback.format_exception(error)), sys.stderr)
    if rank == 0:
        if not logged:
            say_last(render_exit(code), sys.stdout)
        say_last(_render_failure(error), sys.stderr)
    elif not expected or isinstance(error, OwnError):
        say_last(_render_own_failure(error), sys.stderr)
    return code


def _end_suddenly(reason: str, code: int, logged: bool) -> None:
    """The same, when the process ends at once: straight to the descriptors."""
    rank = rank_by_environment()
    if rank == 0:
        if not logged:
            os.write(1, f"{render_exit(code)}\n".encode())
        os.write(2, f"{_render_failure(reason)}\n".encode())
    elif code == 1:
        os.write(2, f"{_render_own_failure(reason)}\n".encode())


def _render_failure(error: object) -> str:
    return f"[EXIT][ERROR] training failed: {error}"


def _render_own_failure(error: object) -> str:
    """Of another process than the main one."""
    return f"[EXIT][ERROR] rank {rank_by_environment()} on {socket.gethostname()} failed: {error}"


if __name__ == "__main__":
    sys.exit(main())
