"""How a command ends: errors become exit codes, markers and the console's last words here, and nowhere else."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from doccls.errors import RankLocalError, UserError
from doccls.reporting.console import exit_code, print_last, render_exit
from doccls.system.signals import Interrupted, at_sudden_end, handling_signals, ignore_signals

if TYPE_CHECKING:  # it takes a while to import, and `doccls-launch --help` answers at once
    from doccls.reporting.log import RunLog


def run_command(name: str, act: Callable[[], int], rank: int = 0) -> int:
    """Run a command that keeps no log; returns its exit code. Of several ranks, the main one reports what all meet."""
    try:
        return act()
    except UserError as error:
        if rank == 0 or isinstance(error, RankLocalError):
            print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def run_training(act: Callable[["RunLog"], None], rank: int = 0) -> int:
    """Run a command that trains, launches or submits; it ends with the contract's markers. Returns its exit code.

    `act` is given the run's log, and opens it (`RunLog.writing_to`) once it knows where. Of several ranks, the main one
    reports what all meet, and each what it alone meets.
    """
    from doccls.reporting.log import RunLog

    log = RunLog(None)
    with handling_signals(), at_sudden_end(lambda reason, code: _end_suddenly(reason, code, rank, log.opened)):
        try:
            act(log)
        except (Exception, Interrupted) as error:  # noqa: BLE001 (the outermost handler: it reports every error)
            ignore_signals()
            _report_failure(error, rank, log)
            return exit_code(error)
        if log.opened:
            print_last(f"[EXIT] {log.last_words} (see logs/* for details)", sys.stdout)
    return 0


def _report_failure(error: BaseException, rank: int, log: "RunLog") -> None:
    expected = isinstance(error, UserError | Interrupted)
    if not expected and error is not log.error:  # else the log has shown it
        print_last("".join(traceback.format_exception(error)), sys.stderr)
    if rank == 0 and not log.opened:
        print_last(render_exit(exit_code(error)), sys.stdout)
    if rank == 0 or not expected or isinstance(error, RankLocalError):
        print_last(_render_failure(error, rank), sys.stderr)


def _end_suddenly(reason: str, code: int, rank: int, opened: bool) -> None:
    """The same, when the process ends at once: straight to the descriptors."""
    if rank == 0 and not opened:
        os.write(1, f"{render_exit(code)}\n".encode())
    if rank == 0 or code == 1:
        os.write(2, f"{_render_failure(reason, rank)}\n".encode())


def _render_failure(error: object, rank: int) -> str:
    who = "training" if rank == 0 else f"rank {rank} on {socket.gethostname()}"
    return f"[EXIT][ERROR] {who} failed: {error}"
