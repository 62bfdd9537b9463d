"""The launcher for tests: it and its ranks are forks of processes that have imported the stack.

A fresh interpreter takes seconds of CPU to import torch and timm, and a launch starts one for each rank and restart.
Here the launcher comes from the server of `rank_launcher`. Before it does anything else, it forks a template, and the
launcher's rank servers (`launcher.rank_server`) are forks of the template, which need no imports. All that follows is
the launcher's own. (`test_rank_server.py` starts real servers.)
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import IO

from refusals import refuse

from doccls.__main__ import main as run_doccls
from doccls.system.lifeline import end_with_parent
from launcher import forking, rank_server
from launcher.cli import main as run_launcher

_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"launcher": run_launcher, "doccls": run_doccls}
SERVER_THREAD = "DOCCLS_TEST_SERVER_THREAD"  # environment variable: start a thread in the server
_SERVER_END_S = 30.0


def main(argv: list[str]) -> int:
    """Run a command; argv is the program of the ranks (`module:function`), the command and its words."""
    program, command, *words = argv
    sys.argv = [command, *words]
    os.setsid()
    os.chdir(os.environ["DOCCLS_TEST_FOLDER"])
    if "DOCCLS_TEST_REFUSAL" in os.environ:
        refuse(os.environ["DOCCLS_TEST_REFUSAL"])
    forking.start_server = ServerForker(program).start_server  # type: ignore[assignment]
    return _COMMANDS[command](words)


def main_alone(argv: list[str]) -> int:
    """Run `main` with no other environment than argv[0], in JSON."""
    variables, *others = argv
    os.environ.clear()
    os.environ.update(json.loads(variables))
    return main(others)


class ServerForker:
    """A starter of rank servers, forked from a template that has done nothing else."""

    def __init__(self, program: str) -> None:
        """Fork the template; each rank runs `program` with the arguments for `doccls.train`."""
        self._connection, served = multiprocessing.Pipe()
        if os.fork() == 0:
            self._connection.close()
            _serve(served, program)
        served.close()

    def start_server(
        self, python: str, environment: Mapping[str, str], served: socket.socket, output: IO[bytes]
    ) -> "ForkedServer":
        """Replace `launcher.forking.start_server`."""
        with forking._adopting():
            self._connection.send(dict(environment))
            for file in (served, output):
                send_handle(self._connection, file.fileno(), None)
            return ForkedServer(self._connection.recv())


class ForkedServer(forking.ForkedRank):
    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = _SERVER_END_S) -> int:
        return super().wait(timeout)


def _serve(requests: Connection, program: str) -> None:
    """Fork a rank server for each request, in the template, until the launcher has ended; return only in ranks."""
    os.setsid()  # out of reach of signals to the launcher's group
    launcher = os.getppid()
    while True:
        try:
            environment = requests.recv()
        except EOFError:
            os._exit(0)
        served, output = recv_handle(requests), recv_handle(requests)
        if (intermediate := os.fork()) == 0:
            break
        os.waitpid(intermediate, 0)
        os.close(served)
        os.close(output)
    if os.fork():
        os._exit(0)
    while os.getppid() != launcher:  # a server is the launcher's child, as in a real launch
        time.sleep(0.001)
    requests.send(os.getpid())
    requests.close()
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(output, 2)
    if SERVER_THREAD in os.environ:
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    end_with_parent()
    request = rank_server.serve(socket.socket(fileno=served))
    module, function = program.split(":")
    rank_server.run_rank(request, lambda: sys.exit(getattr(import_module(module), function)(sys.argv[1:])))
