"""`doccls-launch run` and `plan` for a study: from the arguments to its runs, each with its config and options."""

import argparse
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from doccls.errors import UserError
from doccls.run.paths import locate_study, name_log, new_run_id
from launcher.arguments import render_study_command
from launcher.options import load_config_for_training, make_local_plan, make_options
from launcher.placement import choose_slots
from launcher.study import check_study_name, list_runs, parse_seeds

if TYPE_CHECKING:
    from doccls.reporting.log import RunLog
    from launcher.end_command import EndCommand
    from launcher.study_launch import LoadedRun


def is_study(arguments: argparse.Namespace) -> bool:
    """Return whether the arguments of `run` or `plan` ask for more than one run, or name a study."""
    return len(arguments.configs) > 1 or arguments.seeds is not None or arguments.study is not None


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

        launch_study(name, runs, now, log)


def load_study(arguments: argparse.Namespace, name: str) -> "list[LoadedRun]":
    """Load the runs of a study, with the options of a launch of each alone.

    Raises:
        UserError: a config can't be used, or the options do not fit a study.
    """
    from launcher.study_launch import LoadedRun

    if arguments.backend == "slurm":
        raise UserError("--backend slurm: only one config and seed at a time; submit each run by itself")
    if arguments.run_id is not None:
        raise UserError("--run-id: the runs of a study are named by --study, the config's file and the seed")
    seeds = () if arguments.seeds is None else parse_seeds(arguments.seeds)
    resume_command, loaded_runs = render_study_command(arguments.argv, name), list["LoadedRun"]()
    for run in list_runs(name, arguments.configs, seeds):
        overrides = [*arguments.overrides, *run.overrides]
        own = argparse.Namespace(**vars(arguments) | {"config": run.config, "overrides": overrides})
        loaded = load_config_for_training(own)
        chosen = choose_slots(own, loaded.config)
        slots = loaded_runs[0].options.slots if loaded_runs else chosen.slots
        if len(slots[0].devices) != len(chosen.slots[0].devices):
            raise UserError(
                f"{run.config}: its folds take {len(chosen.slots[0].devices)} devices, those of {arguments.config} "
                f"{len(slots[0].devices)} (train.num_processes): the runs of a study share the same slots"
            )
        plan = make_local_plan(own, loaded, run.run_id, replace(chosen, slots=slots))
        options = replace(make_options(own, loaded.config, run.run_id, plan, slots), resume_command=resume_command)
        loaded_runs.append(LoadedRun(run, loaded.config, options))
    return loaded_runs
