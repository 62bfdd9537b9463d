"""`doccls-launch run` and `plan` for a study: from the arguments to its runs, each with its config and options."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from doccls.config import Config
from doccls.config.arguments import load_arguments
from doccls.config.files import check_inputs
from doccls.config.load import LoadedConfig
from doccls.errors import UserError
from doccls.run.paths import RunPaths, locate_study, name_log, new_run_id
from launcher.arguments import render_study_command
from launcher.options import load_config_for_training, make_local_plan, make_options
from launcher.placement import ChosenSlots, choose_slots
from launcher.study import (
    StudyRun,
    check_study_name,
    list_runs,
    naming_study,
    order_folds,
    order_runs,
    parse_grid,
    parse_seeds,
)
from launcher.study_plan import StudyPlan, plan_study

if TYPE_CHECKING:
    from doccls.reporting.log import RunLog
    from launcher.end_command import EndCommand
    from launcher.study_launch import LoadedRun


def is_study(arguments: argparse.Namespace) -> bool:
    """Return whether the arguments of `run` or `plan` ask for more than one run, or name a study."""
    is_named = arguments.seeds is not None or arguments.study is not None
    return len(arguments.configs) > 1 or is_named or bool(arguments.set_each) or arguments.blend


def run_study(arguments: argparse.Namespace, log: "RunLog", end_command: "EndCommand") -> None:
    """Train the folds of all runs of the study.

    Raises:
        UserError: see `load_study` and `launch_study`.
    """
    name = check_study_name(arguments.study or new_run_id("study"))
    now = datetime.now()
    runs = load_study(arguments, name)
    output = runs[0].config.output
    end_command.run_folder = locate_study(output.exp_dir, name)
    with log.writing_to(name_log(output.logs_dir, name, now)):
        from launcher.study_launch import launch_study

        launch_study(name, runs, arguments.blend, now, log)


def load_study(arguments: argparse.Namespace, name: str, is_plan: bool = False) -> "list[LoadedRun]":
    """Load the runs of a study, with the options of a launch of each alone.

    `is_plan`: data that does not exist on this machine is only a warning.

    Raises:
        UserError: a config can't be used, or the options do not fit a study.
    """
    from launcher.study_launch import LoadedRun

    _refuse_run_id(arguments)
    resume_command, loaded_runs = render_study_command(arguments.argv, name), list["LoadedRun"]()
    for run, own in _list_runs(arguments, name):
        loaded = load_config_for_training(own)
        absent = check_inputs(loaded.config, may_be_absent=True) if is_plan else ()
        chosen = choose_slots(own, loaded.config)
        slots = loaded_runs[0].options.slots if loaded_runs else chosen.slots
        if len(slots[0].devices) != len(chosen.slots[0].devices):
            raise UserError(
                f"{run.config}: its folds take {len(chosen.slots[0].devices)} devices, those of {arguments.config} "
                f"{len(slots[0].devices)} (train.num_processes): the runs of a study share the same slots"
            )
        if loaded_runs:
            _check_exp_dir(run, loaded.config, arguments.config, loaded_runs[0].config)
        with naming_study():
            plan = make_local_plan(own, loaded, run.run_id, ChosenSlots(slots, (*absent, *chosen.warnings)))
        options = replace(make_options(own, loaded.config, run.run_id, plan, slots), resume_command=resume_command)
        loaded_runs.append(LoadedRun(run, loaded.config, replace(options, study=name)))
    if arguments.blend:
        _check_blend([loaded_run.config for loaded_run in loaded_runs])
    return loaded_runs


@dataclass(frozen=True)
class NumberedRun:
    """A run of a study in a job array, whose index is the number of a fold of a run."""

    run: StudyRun
    arguments: argparse.Namespace  # of a task that trains this run alone
    config: Config
    warnings: tuple[str, ...]
    offset: int  # number of the run's fold 0 among the folds of all runs
    resume_command: str  # trains the missing folds of the study

    @property
    def run_id(self) -> str:
        """The name of the run."""
        return self.run.run_id


def load_numbered_runs(arguments: argparse.Namespace, name: str) -> list[NumberedRun]:
    """Load the runs of a study and number their folds: the runs whose folds are expected to take longest come first.

    The numbers depend on the arguments and configs alone, so all tasks of an array agree on them.

    Raises:
        UserError: a config can't be used, or the options do not fit a study.
    """
    _refuse_run_id(arguments)
    resume_command = getattr(arguments, "resume_command", None) or render_study_command(arguments.argv, name)
    loaded_runs: list[tuple[StudyRun, argparse.Namespace, LoadedConfig]] = []
    for run, own in _list_runs(arguments, name):
        loaded = load_config_for_training(own)
        if loaded_runs:
            _check_exp_dir(run, loaded.config, arguments.config, loaded_runs[0][2].config)
        loaded_runs.append((run, own, loaded))
    if arguments.blend:
        _check_blend([loaded.config for *_, loaded in loaded_runs])
    efforts = [float(loaded.config.train.epochs * loaded.config.train.img_size**2) for *_, loaded in loaded_runs]
    runs, offset = [], 0
    for number in order_runs(efforts):
        run, own, loaded = loaded_runs[number]
        runs.append(NumberedRun(run, own, loaded.config, loaded.warnings, offset, resume_command))
        offset += loaded.config.data.folds
    return runs


def _list_runs(arguments: argparse.Namespace, name: str) -> list[tuple[StudyRun, argparse.Namespace]]:
    """List the runs of a study, each with the arguments of a command about this run alone."""
    seeds = () if arguments.seeds is None else parse_seeds(arguments.seeds)
    runs = []
    for run in list_runs(name, arguments.configs, seeds, parse_grid(arguments.set_each)):
        own = {"config": run.config, "overrides": [*arguments.overrides, *run.settings]}
        if run.seed is not None:
            config = load_arguments(argparse.Namespace(**vars(arguments) | own))
            fold_seed = config.project.seed if config.data.fold_seed is None else None
            own["overrides"] = [*arguments.overrides, *run.list_overrides(fold_seed)]
        runs.append((run, argparse.Namespace(**vars(arguments) | own)))
    return runs


def _refuse_run_id(arguments: argparse.Namespace) -> None:
    if arguments.run_id is not None:
        raise UserError("--run-id: the runs of a study are named by --study, the config's file and the seed")


def _check_exp_dir(run: StudyRun, config: Config, first_path: Path, first: Config) -> None:
    if config.output.exp_dir != first.output.exp_dir:
        raise UserError(
            f"{run.config}: output.exp_dir = {config.output.exp_dir}, that of {first_path} is {first.output.exp_dir}: "
            "the runs of a study are in the same folder"
        )


def _check_blend(configs: Sequence[Config]) -> None:
    """Check before anything is read that the runs of these configs can be blended.

    Raises:
        UserError: there is only one, or one does not train all folds.
    """
    if len(configs) < 2:
        raise UserError("--blend: the study has only one run; state several --config, --seeds or --set-each")
    for config in configs:
        if config.data.valid_fold != "all":
            raise UserError(
                f"--blend: data.valid_fold = {config.data.valid_fold}: only runs with predictions of all folds can be "
                "blended; set it to all, or leave --blend out"
            )


def make_study_plan(arguments: argparse.Namespace) -> StudyPlan:
    """Derive what a launch of the study would do.

    Raises:
        UserError: see `load_study`.
    """
    from launcher.study_launch import estimate_work

    name = check_study_name(arguments.study or "study-NEW")
    runs = {loaded.run.run_id: loaded for loaded in load_study(arguments, name, is_plan=True)}
    plans = {run_id: loaded.options.plan for run_id, loaded in runs.items()}
    works = []
    for number, (run_id, loaded) in enumerate(runs.items()):
        missing = tuple(assignment.fold for wave in plans[run_id].waves for assignment in wave)
        paths = RunPaths(Path(plans[run_id].run_folder))
        works.append(estimate_work(number, missing, loaded.config, _count_pages(loaded.config), paths))
    run_ids = list(runs)
    order = [(run_ids[number], fold) for number, fold in order_folds(works)]
    workloads = {run_id: loaded.options.workload for run_id, loaded in runs.items()}
    return plan_study(name, plans, workloads, order, next(iter(runs.values())).options.slots)


def _count_pages(config: Config) -> int:
    """Return the number of rows of the training CSV; 1 where it can't be read, which the launch will report."""
    from doccls.data.table import read_table

    with suppress(UserError):
        return len(read_table(config.data.train_csv, "data.train_csv", [config.data.id_col]))
    return 1
