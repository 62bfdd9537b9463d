"""`doccls-launch run | plan | status | cancel | merge`: what each command does with its words.

What a command needs beside the config is imported by that command: `--help` and `plan` answer at once.
"""

import argparse
import functools
import json
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime

from doccls.config.arguments import load_arguments
from doccls.errors import UserError
from doccls.run.paths import RunError, RunPaths, check_run_id, name_log, new_run_id
from launcher.arguments import build_parser, choose_slots, make_plan, make_workload, render_again
from launcher.plan import describe_plan, render_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(words)
    if arguments.command == "run":
        return _run(arguments, words)
    try:
        return _COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"doccls-launch {arguments.command}: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    from doccls.run.runlog import RunLog, exit_code, render_exit
    from doccls.run.signals import (
        Interrupted,
        at_sudden_end,
        handling_signals,
        ignore_signals,
        naming_one_cause,
    )

    def end_suddenly(signum: int) -> None:
        error = Interrupted(signum)
        if not log.opened:
            os.write(1, f"{render_exit(error.exit_code)}\n".encode())
        os.write(2, f"[EXIT][ERROR] training failed: {error}\n".encode())

    log = RunLog(None)
    with handling_signals(), at_sudden_end(end_suddenly):
        try:
            config = load_arguments(arguments)
            slots = choose_slots(arguments, config)
            now = datetime.now()
            run_id = check_run_id(arguments.run_id or new_run_id(config.project.version))
            plan = make_plan(arguments, config, run_id, slots)
            log = RunLog(name_log(config.output.logs_dir, run_id, now))
            with log, naming_one_cause():
                from launcher.launch import LaunchOptions, launch
                from launcher.supervise import Policy

                workload = make_workload(arguments, config, run_id)
                options = LaunchOptions(
                    slots,
                    workload,
                    Policy(arguments.max_restarts, arguments.fail_fast),
                    arguments.hang_timeout,
                    arguments.takeover,
                    render_again(words, run_id),
                )
                launch(config, run_id, now, plan, options, log)
        except (Exception, Interrupted) as error:  # noqa: BLE001 (the last place: an error ends the process, told)
            ignore_signals()
            code = exit_code(error)
            if not log.opened:
                if not isinstance(error, UserError | Interrupted):
                    traceback.print_exception(error)
                print(render_exit(code), flush=True)
            print(f"[EXIT][ERROR] training failed: {error}", file=sys.stderr, flush=True)
            return code
    print("[EXIT] training finished successfully (see logs/* for details)")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    config = load_arguments(arguments)
    run_id = check_run_id(arguments.run_id or f"{config.project.version}-NEW")
    plan = make_plan(arguments, config, run_id, choose_slots(arguments, config))
    print(json.dumps(describe_plan(plan), indent=2) if arguments.json else render_plan(plan))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from doccls.oof.merge import merge_run  # scikit-learn takes a second to import
    from doccls.oof.summary import list_scores

    paths = _find_run(arguments)
    scores = list_scores(merge_run(paths))
    print(f"[OOF] -> {paths.oof_logits}")
    for line in scores:
        print(line)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from launcher.status import describe_status, read_status, render_status

    status = read_status(_find_run(arguments))
    now = datetime.now().astimezone()
    print(json.dumps(describe_status(status), indent=2) if arguments.json else render_status(status, now))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from launcher.cancel import cancel_run

    cancel_run(_find_run(arguments), functools.partial(print, flush=True))
    return 0


def _find_run(arguments: argparse.Namespace) -> RunPaths:
    paths = RunPaths(arguments.run.resolve())
    if not paths.root.is_dir():
        raise RunError(f"no such run folder: {paths.root} (runs lie in <output.exp_dir>/YYYYMMDD/<run_id>)")
    return paths


_COMMANDS = {"plan": _plan, "status": _status, "cancel": _cancel, "merge": _merge}
"""All but `run`, which tells its errors into a log."""


if __name__ == "__main__":
    sys.exit(main())
