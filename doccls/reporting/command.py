"""The end of a command: the only place that turns errors into exit codes, markers and closing messages."""

import socket
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from doccls.errors import RankLocalError, UserError
from doccls.reporting.console import ConsoleStream, exit_code, render_exit, report_lost_output
from doccls.system.descriptors import write_closing
from doccls.system.signals import Interrupted, handling_signals, ignore_signals, on_immediate_exit

if TYPE_CHECKING:  # its import is slow, and `doccls-launch --help` has to be fast
    from doccls.reporting.log import RunLog


def run_command(name: str, command: Callable[[], int], rank: int = 0, prints: bool = False) -> int:
    """Run a command that keeps no log and return its exit code. Only rank 0 reports errors that all ranks share.

    `prints`: all it does is to print. Then it waits for a slow reader of its output, and fails if output is lost:
    silently with 128 + SIGPIPE if its reader is gone, else with a message.
    """
    console = sys.stdout
    if not prints or not isinstance(console, ConsoleStream):
        return _run(name, command, rank)
    console.patience_s = None
    return _run(name, command, rank) or report_lost_output(name, console)


def _run(name: str, command: Callable[[], int], rank: int) -> int:
    try:
        return command()
    except UserError as error:
        if rank == 0 or isinstance(error, RankLocalError):
            print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def run_training(command: Callable[["RunLog"], None], rank: int = 0) -> int:
    """Run a command that trains, launches or submits, write the exit markers, and return its exit code.

    `command` receives the run's log, and opens it (`RunLog.writing_to`) once it knows the path. Rank 0 reports errors
    that all ranks share, and each rank those of its own.
    """
    from doccls.reporting.log import RunLog

    log = RunLog(None)
    with handling_signals(), on_immediate_exit(lambda reason, code: _end_immediately(reason, code, rank, log.opened)):
        try:
            command(log)
        except (Exception, Interrupted) as error:  # noqa: BLE001 (the outermost handler reports every error)
            ignore_signals()
            _report_failure(error, rank, log)
            return exit_code(error)
        if log.opened:
            print(f"[EXIT] {log.closing_message} (see logs/* for details)")
    return 0


def _report_failure(error: BaseException, rank: int, log: "RunLog") -> None:
    expected = isinstance(error, UserError | Interrupted)
    if not expected and error is not log.error:  # otherwise the log has already shown it
        print("".join(traceback.format_exception(error)), file=sys.stderr)
    if rank == 0 and not log.opened:
        print(render_exit(exit_code(error)))
    if rank == 0 or not expected or isinstance(error, RankLocalError):
        print(_render_failure(error, rank), file=sys.stderr)


def _end_immediately(reason: str, code: int, rank: int, opened: bool) -> None:
    """Report the failure when the process exits immediately: straight to the descriptors."""
    if rank == 0 and not opened:
        write_closing(1, f"{render_exit(code)}\n")
    if rank == 0 or code == 1:
        write_closing(2, f"{_render_failure(reason, rank)}\n")


def _render_failure(error: object, rank: int) -> str:
    subject = "training" if rank == 0 else f"rank {rank} on {socket.gethostname()}"
    return f"[EXIT][ERROR] {subject} failed: {error}"
