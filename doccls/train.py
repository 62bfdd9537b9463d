"""Entry point `python -m doccls.train --config ...`: arguments -> config -> folds -> exit marker."""

import argparse
import os
import secrets
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doccls.config import Config, Override, load_config, parse_override, render_snapshot
from doccls.config.load import MODES, list_values
from doccls.data.workers import start_worker_server
from doccls.errors import OwnError, UserError
from doccls.run.artifacts import write_text
from doccls.run.paths import RunError, RunPaths, check_run_id, locate_run, name_log
from doccls.run.rank import rank_by_environment
from doccls.run.runlog import RunLog, exit_code, render_exit
from doccls.run.signals import (
    Interrupted,
    at_sudden_end,
    handling_signals,
    ignore_signals,
    naming_one_cause,
    stopping_gracefully,
)

if TYPE_CHECKING:  # the stack takes seconds to import: a mistake in the config is told before that
    from accelerate import Accelerator

    from doccls.data.prepare import PreparedData


def build_parser() -> argparse.ArgumentParser:
    """The command line of `doccls.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m doccls.train",
        description="Train the folds of an image classifier and write the merged out-of-fold predictions.",
        epilog="Several processes: accelerate launch --config_file accelerate_configs/FILE -m doccls.train ...",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--run-id", metavar="ID", help="name of the run; an existing one is joined: finished folds are kept"
    )
    return parser


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The arguments that say which config, for every command that takes one."""
    parser.add_argument(
        "--config", type=Path, required=required, metavar="FILE", help="YAML file; its paths are relative to it"
    )
    parser.add_argument(
        "--mode", choices=MODES, help="named set of defaults under the YAML's own values (default: basic)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override one key, as in --set train.epochs=3; may be given many times",
    )  # fmt: skip
    parser.add_argument("--num-workers", type=int, metavar="N", help="short for --set data.num_workers=N")


def load_arguments(arguments: argparse.Namespace) -> Config:
    """The config that the arguments of `add_config_arguments` say.

    Raises:
        ConfigError: see `load_config`.
    """
    overrides = [parse_override(text) for text in arguments.overrides]
    if arguments.num_workers is not None:
        overrides.append(Override("data.num_workers", arguments.num_workers, "--num-workers"))
    return load_config(arguments.config, arguments.mode, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code. Never raises for what a user did."""
    arguments = build_parser().parse_args(argv)
    with handling_signals():
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    log = RunLog(None)
    with at_sudden_end(lambda signum: _end_suddenly(signum, log.opened)):
        try:
            config = load_arguments(arguments)
            if config.data.num_workers:
                start_worker_server()  # it imports while this process does
            from doccls.training.processes import on_main, start_processes

            accelerator = start_processes(config)
            now = datetime.now()
            run_id = on_main(accelerator, lambda: _name_run(arguments.run_id, config))
            log = RunLog(name_log(config.output.logs_dir, run_id, now) if accelerator.is_main_process else None)
            with log, naming_one_cause():
                _run(config, run_id, now, accelerator, log)
        except (Exception, Interrupted) as error:  # noqa: BLE001 (the last place: an error ends the process, told)
            return _fail(error, logged=log.opened)
    accelerator.end_training()
    if accelerator.is_main_process:
        print("[EXIT] training finished successfully (see logs/* for details)")
    return 0


def _name_run(asked: str | None, config: Config) -> str:
    return check_run_id(asked or f"{config.project.version}-{secrets.token_hex(3)}")


def _run(config: Config, run_id: str, now: datetime, accelerator: "Accelerator", log: RunLog) -> None:
    """The run, in the order of the contract. All ranks must call."""
    from doccls.training.processes import on_main

    for key, value in list_values(config):
        log.line(f"[CFG] {key}={value}")
    log.line(f"[SEED] {config.project.seed} for Python, NumPy and PyTorch; {config.train.cpu_threads} CPU threads")
    data = _prepare(config, accelerator, log)
    paths, identity, finished = on_main(accelerator, lambda: _open_run(config, run_id, now, data, accelerator))
    log.line(f"[ARTIFACTS] {paths.root}")
    _train_folds(config, data, identity, paths, finished, accelerator, log)
    if config.data.valid_fold == "all":
        on_main(accelerator, lambda: _merge(paths, log))
    else:
        on_main(accelerator, lambda: _tell_finished(paths, identity, config.data.folds, log))
    log.line(f"[DONE] run={run_id} folder={paths.root}")
    log.line("[BOOT] training pipeline finished successfully")


def check_statements(config: Config) -> None:
    """What can be told of a config without reading the data: files, folders and names exist.

    Raises:
        UserError: some don't.
    """
    from doccls.data.manifest import check_paths
    from doccls.model.build import check_model_name
    from doccls.model.optim import check_optimizer_name

    data = config.data
    needed = {"data.train_csv": (data.train_csv, "file"), "data.image_dir_train": (data.image_dir_train, "folder")}
    optional = {
        "data.sample_csv": (data.sample_csv, "file"),
        "data.image_dir_test": (data.image_dir_test, "folder"),
        "model.weights": (config.model.weights, "file"),
    }
    check_paths(needed | {key: stated for key, stated in optional.items() if stated[0] is not None})
    check_model_name(config.model.name)
    check_optimizer_name(config.train.optimizer)


def _prepare(config: Config, accelerator: "Accelerator", log: RunLog) -> "PreparedData":
    from doccls.data.prepare import prepare_data
    from doccls.training.processes import on_main

    data = config.data
    on_main(accelerator, lambda: check_statements(config))
    log.line(
        f"[PATH] OK | train_csv={data.train_csv} | sample_csv={data.sample_csv}"
        f" | image_dir_train={data.image_dir_train}"
    )
    prepared = on_main(accelerator, lambda: prepare_data(config))
    for warning in prepared.warnings:
        log.line(f"[WARNING] {warning}")
    log.line(f"[FOLD] distribution={prepared.assignment.count()}")
    return prepared


def _open_run(
    config: Config, run_id: str, now: datetime, data: "PreparedData", accelerator: "Accelerator"
) -> tuple[RunPaths, str, list[int]]:
    """Create or join the run's folder; the main process calls. Returns its paths, identity and finished folds."""
    from doccls.oof.merge import find_finished_folds
    from doccls.run.identity import check_snapshot, derive_identity, digest_file

    weights = digest_file(config.model.weights) if config.model.weights else None
    identity = derive_identity(config, data.digest, data.assignment.digest(), weights)
    paths = locate_run(config.output.exp_dir, run_id, now)
    finished = find_finished_folds(paths, identity, config.data.folds)
    check_snapshot(paths, identity)
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output.exp_dir: can't make {paths.root}: {error.strerror}") from error
    if config.output.snapshots and not finished:
        write_text(paths.snapshot, render_snapshot(config, _describe(run_id, now, identity, data, accelerator)))
    return paths, identity, finished


def _describe(
    run_id: str, now: datetime, identity: str, data: "PreparedData", accelerator: "Accelerator"
) -> dict[str, Any]:
    from doccls.run.provenance import describe_software, render_command

    return {
        "run_id": run_id,
        "started": now.isoformat(timespec="seconds"),
        "command": render_command(sys.argv),
        "identity": identity,
        "data_digest": data.digest,
        "folds_digest": data.assignment.digest(),
        "num_samples": len(data.manifest),
        "skipped_rows": sorted(data.skipped),
        "classes": list(data.manifest.classes),
        "world_size": accelerator.num_processes,
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        **describe_software(),
    }


def _train_folds(
    config: Config, data: "PreparedData", identity: str, paths: RunPaths, finished: list[int],
    accelerator: "Accelerator", log: RunLog,
) -> None:  # fmt: skip
    from doccls.training.fold import Experiment, load_folds, release_memory, train_fold

    experiment = Experiment(config, data, identity, paths)
    wanted = range(config.data.folds) if config.data.valid_fold == "all" else (config.data.valid_fold,)
    for fold in wanted:
        if fold in finished:
            log.line(f"[FOLD {fold}] finished before: kept {paths.part(fold)}")
    missing = [fold for fold in wanted if fold not in finished]
    with stopping_gracefully(), load_folds(experiment, missing, accelerator) as batches:
        for fold in missing:
            train_fold(experiment, fold, batches, accelerator, log)
            release_memory(accelerator)


def _merge(paths: RunPaths, log: RunLog) -> None:
    from doccls.oof.merge import merge_run

    merged = merge_run(paths)
    for fold, score in enumerate(merged.fold_scores):
        log.line(f"[OOF] fold={fold} macro_f1={score:.5f}")
    log.line(f"[OOF] all folds macro_f1={merged.macro_f1:.5f} rows={len(merged.ids)} -> {paths.oof_logits}")


def _tell_finished(paths: RunPaths, identity: str, num_folds: int, log: RunLog) -> None:
    from doccls.oof.merge import find_finished_folds

    missing = sorted(set(range(num_folds)) - set(find_finished_folds(paths, identity, num_folds)))
    if missing:
        log.line(f"[OOF] not merged: folds {missing} of this run are still to train, with --run-id {paths.run_id}")
    else:
        log.line(f"[OOF] all {num_folds} folds are there; merge them: doccls-launch merge {paths.root}")


def _fail(error: BaseException, logged: bool) -> int:
    """Say the console's last words, once: the main process's, and another's where the error is its own."""
    ignore_signals()
    rank, code = rank_by_environment(), exit_code(error)
    expected = isinstance(error, UserError | Interrupted)
    if not expected and not (logged and rank == 0):  # the main process's log has shown it
        traceback.print_exception(error)
    if rank == 0:
        if not logged:
            print(render_exit(code), flush=True)
        print(_render_failure(error), file=sys.stderr, flush=True)
    elif not expected or isinstance(error, OwnError):
        print(f"[EXIT][ERROR] rank {rank} failed: {error}", file=sys.stderr, flush=True)
    return code


def _end_suddenly(signum: int, logged: bool) -> None:
    """The same, when a signal ends the process at once: straight to the descriptors."""
    error = Interrupted(signum)
    if rank_by_environment() == 0:
        if not logged:
            os.write(1, f"{render_exit(error.exit_code)}\n".encode())
        os.write(2, f"{_render_failure(error)}\n".encode())


def _render_failure(error: BaseException) -> str:
    return f"[EXIT][ERROR] training failed: {error}"


if __name__ == "__main__":
    sys.exit(main())
