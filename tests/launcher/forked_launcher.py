"""The launcher for tests: it and the ranks that it starts are forks of processes that have imported the stack.

A fresh interpreter takes seconds of CPU to import torch and timm, and a launch starts one for each rank and restart.
Here the launcher comes from the server of `rank_launcher`. Before it does anything else, it forks a template, and each
rank is a fork of that one. A rank's first parent ends at once, and the launcher is a subreaper (prctl(2)), so that the
rank becomes the launcher's child. Its parent, session, output and environment are those of a fresh interpreter.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from doccls.__main__ import main as run_doccls
from launcher import local
from launcher.cli import main as run_launcher
from launcher.plan import RankCommand, drop_ranks

_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"launcher": run_launcher, "doccls": run_doccls}
_PR_SET_CHILD_SUBREAPER = 36


def main(argv: list[str]) -> int:
    """argv = program that a rank runs as `module:function`, module of the command, words of the command."""
    program, command, *words = argv
    sys.argv = [command, *words]
    os.setsid()
    os.chdir(os.environ["DOCCLS_TEST_FOLDER"])
    local._start_rank = RankForker(program).start_rank  # type: ignore[assignment]
    return _COMMANDS[command](words)


class ForkedRank:
    """What `launcher.local` needs of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._await(os.WNOHANG)

    def wait(self) -> int | None:
        return self._await(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _await(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


class RankForker:
    """Starts ranks as children of this process, forked from a template that has done nothing else."""

    def __init__(self, program: str) -> None:
        """Fork the template. Each rank runs `program` with the words that the launcher gives to `doccls.train`."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._connection, served = multiprocessing.Pipe()
        launcher = os.getpid()
        if os.fork() == 0:
            self._connection.close()
            _serve(served, program, launcher)
        else:
            served.close()

    def start_rank(self, command: RankCommand, console: Path, told: dict[str, str]) -> ForkedRank:
        """Stands for `launcher.local._start_rank`."""
        assert command.argv[1:3] == ("-m", "doccls.train"), command
        console.parent.mkdir(parents=True, exist_ok=True)
        environment = drop_ranks(os.environ) | dict(command.environment) | told
        self._connection.send((command.argv[3:], environment, console))
        return ForkedRank(self._connection.recv())


def _serve(requests: Connection, program: str, launcher: int) -> None:
    """In the template: a rank for each request, until the launcher is gone. Returns only in a rank, at its end."""
    os.setsid()  # signals to the launcher's group are not for it
    while True:
        try:
            words, environment, console = requests.recv()
        except EOFError:
            os._exit(0)
        middle = os.fork()
        if middle == 0:
            if os.fork():
                os._exit(0)
            _be_rank(requests, program, launcher, words, environment, console)
        os.waitpid(middle, 0)


def _be_rank(
    requests: Connection, program: str, launcher: int, words: Sequence[str], environment: dict[str, str], console: Path
) -> None:
    """In the rank: become what the launcher's `Popen` would have made, and run the program."""
    os.setsid()
    for path, flags, descriptors in (
        (Path(os.devnull), os.O_RDONLY, (0,)), (console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, (1, 2))
    ):  # fmt: skip
        file = os.open(path, flags)
        for descriptor in descriptors:
            os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    while os.getppid() != launcher:
        time.sleep(0.001)  # for the process between to end
    requests.send(os.getpid())
    requests.close()
    module, function = program.split(":")
    sys.argv = [module, *words]
    sys.exit(getattr(import_module(module), function)(list(words)))
