"""What a command that trains derives from its arguments: the config, the plan, and the options of the launch."""

import argparse
from typing import TYPE_CHECKING

from doccls.config import Config
from doccls.config.arguments import load_arguments_with_warnings
from doccls.config.load import LoadedConfig
from doccls.system.cores import count_cores
from doccls.system.signals import stop_on_sigusr2
from launcher.arguments import make_plan, make_workload, render_resume_command
from launcher.placement import ChosenSlots
from launcher.plan import LaunchPlan, Slot

if TYPE_CHECKING:
    from launcher.queued_run import LaunchOptions


def load_config_for_training(arguments: argparse.Namespace) -> LoadedConfig:
    """Load the config of a training command, and install the SIGUSR2 handler that it asks for."""
    loaded = load_arguments_with_warnings(arguments)
    if loaded.config.train.sigusr2 == "stop":
        stop_on_sigusr2()
    return loaded


def make_local_plan(
    arguments: argparse.Namespace, loaded: LoadedConfig, run_id: str, chosen: ChosenSlots
) -> LaunchPlan:
    """Derive what a launch on this machine's slots would do.

    Raises:
        UserError: see `make_plan`.
    """
    folds, warnings = loaded.config.data.list_wanted(), (*loaded.warnings, *chosen.warnings)
    return make_plan(arguments, loaded.config, run_id, chosen.slots, folds, count_cores(), warnings)


def make_options(
    arguments: argparse.Namespace,
    config: Config,
    run_id: str,
    plan: LaunchPlan,
    slots: tuple[Slot, ...],
) -> "LaunchOptions":
    """Derive the options of a launch of one run."""
    from launcher.queued_run import LaunchOptions
    from launcher.supervise import Policy

    return LaunchOptions(
        plan,
        slots,
        make_workload(arguments, config, run_id),
        Policy(arguments.max_restarts, arguments.fail_fast, shrink=not arguments.no_shrink),
        arguments.hang_timeout,
        getattr(arguments, "resume_command", None) or render_resume_command(arguments.argv, run_id),
        arguments.start,
    )
