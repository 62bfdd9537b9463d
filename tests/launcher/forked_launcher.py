"""The launcher for tests: it and its ranks are forks of processes that have imported the stack.

A fresh interpreter takes seconds of CPU to import torch and timm, and a launch starts one for each rank and restart.
Here the launcher comes from the server of `rank_launcher`. Before it does anything else, it forks a template, and each
rank is a fork of the template. A rank's first parent ends at once, and the launcher is a subreaper (prctl(2)), so that
the rank becomes the launcher's child.

A forked rank has the parent, session, output and environment of a real one. It differs in its command line as the
system shows it, in whatever reads the environment at import, in its hash seed, and in how the interpreter ends.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from refusals import refuse

from doccls.__main__ import main as run_doccls
from launcher import local
from launcher.cli import main as run_launcher
from launcher.plan import RankCommand, drop_job_variables

_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"launcher": run_launcher, "doccls": run_doccls}
_PR_SET_CHILD_SUBREAPER = 36
_START_S = 30


def main(argv: list[str]) -> int:
    """Run a command; argv is the program of the ranks (`module:function`), the command and its words."""
    program, command, *words = argv
    sys.argv = [command, *words]
    os.setsid()
    os.chdir(os.environ["DOCCLS_TEST_FOLDER"])
    if "DOCCLS_TEST_REFUSAL" in os.environ:
        refuse(os.environ["DOCCLS_TEST_REFUSAL"])
    local._start_rank = RankForker(program).start_rank  # type: ignore[assignment]
    return _COMMANDS[command](words)


def main_alone(argv: list[str]) -> int:
    """Run `main` with no other environment than argv[0], in JSON."""
    variables, *others = argv
    os.environ.clear()
    os.environ.update(json.loads(variables))
    return main(others)


class ForkedRank:
    """The parts of `subprocess.Popen` that `launcher.local` needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        # Held by the only thread that may reap the rank: a second Ctrl-C is handled in a thread of its own.
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        if self._lock.acquire(blocking=False):
            try:
                self._reap(os.WNOHANG)
            finally:
                self._lock.release()
        return self._code

    def wait(self, timeout: float) -> int:
        end_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= end_s:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # another thread may have reaped it since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _reap(self, options: int) -> None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)


class RankForker:
    """A starter of ranks: children of this process, forked from a template that has done nothing else."""

    def __init__(self, program: str) -> None:
        """Fork the template; each rank runs `program` with the arguments for `doccls.train`."""
        assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
        self._connection, served = multiprocessing.Pipe()
        launcher = os.getpid()
        if os.fork() == 0:
            self._connection.close()
            _serve(served, program, launcher)
        else:
            served.close()

    def start_rank(self, command: RankCommand, console: Path, variables: dict[str, str]) -> ForkedRank:
        """Replace `launcher.local._start_rank`, with the same errors for a console that can't be written."""
        assert command.argv[1:3] == ("-m", "doccls.train"), command
        console.parent.mkdir(parents=True, exist_ok=True)
        console.open("ab").close()
        environment = drop_job_variables(os.environ) | dict(command.environment) | variables
        self._connection.send((command.argv[3:], environment, console))
        if not self._connection.poll(_START_S):
            raise RuntimeError(f"the template forks no rank within {_START_S} s")
        return ForkedRank(self._connection.recv())


def _serve(requests: Connection, program: str, launcher: int) -> NoReturn:
    """Fork a rank for each request, in the template, until the launcher has ended; never return."""
    os.setsid()  # out of reach of signals to the launcher's group
    while True:
        try:
            words, environment, console = requests.recv()
        except EOFError:
            os._exit(0)
        intermediate = os.fork()
        if intermediate == 0:
            intermediate = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == intermediate:
                time.sleep(0.001)
            if os.getppid() != launcher:  # it has ended, and nobody would end this rank
                os._exit(1)
            _be_rank(requests, program, words, environment, console)
        os.waitpid(intermediate, 0)


def _be_rank(
    requests: Connection, program: str, words: Sequence[str], environment: dict[str, str], console: Path
) -> NoReturn:
    """Turn this process into what the launcher's `Popen` would have started, and run the program."""
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
    requests.send(os.getpid())
    requests.close()
    module, function = program.split(":")
    sys.argv = [module, *words]
    sys.exit(getattr(import_module(module), function)(list(words)))
