"""The launcher's side of `launcher.rank_server`, from which ranks are forked instead of importing the stack each.

Whatever happens to the server, no fold depends on it: `RankServer.fork` returns None for a rank that the caller has to
start as a fresh interpreter.
"""

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import IO, Protocol

from doccls.system.cores import PROCESSES_HERE
from doccls.system.lifeline import LAUNCHED, PARENT
from doccls.system.rank import MEETING_FILE
from doccls.system.signals import stop_requested
from launcher.plan import Assignment, drop_job_variables
from launcher.rank_server import GO, PROGRAM, READY, REFUSAL, SERVER_VARIABLES, RankRequest

# Variables that no library reads as it is imported: those in which the ranks of a launch differ. A rank that differs
# from the server in another one starts fresh.
_OF_RANKS = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "NCCL_P2P_DISABLE",
    "NCCL_IB_DISABLE", MEETING_FILE, LAUNCHED, PARENT, PROCESSES_HERE, *SERVER_VARIABLES,
}  # fmt: skip
_IMPORT_LIMIT_S = 600.0  # for the server's imports
_ANSWER_LIMIT_S = 10.0  # for a fork, which takes some 30 ms
_POLL_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36


def serve_ranks(example: Assignment, report: Callable[[str], None]) -> "AbstractContextManager[RankServer | None]":
    """Start a server for ranks like those of the example, until the end of the block; None where that is impossible."""
    if sys.platform != "linux":
        return nullcontext()
    command = example.ranks[0]
    return closing(RankServer(command.argv[0], drop_job_variables(os.environ), command.environment, report))


class ForkedRank:
    """A rank that the server has forked for this process, its parent; the interface is that of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        """Take over the child with this process ID."""
        self.pid = pid
        self._code: int | None = None
        # Held by the only thread that may reap the rank: a second Ctrl-C is handled in a thread of its own.
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number if one killed it, or None while it runs."""
        if self._lock.acquire(blocking=False):
            try:
                self._reap()
            finally:
                self._lock.release()
        return self._code

    def wait(self, timeout: float) -> int:
        """Return the exit code once the rank has ended.

        Raises:
            subprocess.TimeoutExpired: it has not after `timeout` seconds.
        """
        end_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= end_s:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        """Send the signal if the rank still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # another thread may have reaped it since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _reap(self) -> None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)


class ServerProcess(Protocol):
    """The parts of `subprocess.Popen` that `RankServer` needs."""

    def kill(self) -> None:
        """Send SIGKILL."""
        ...

    def wait(self) -> int:
        """Return the exit code once the server has ended, minus the signal's number if one killed it."""
        ...


@dataclass(frozen=True)
class _Server:
    process: ServerProcess
    control: socket.socket
    output: IO[bytes]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.control.close()
        self.output.close()


class RankServer:
    """The server of a launch. One that dies is replaced; one that can't fork is not, and all ranks start fresh."""

    def __init__(
        self, python: str, environment: Mapping[str, str], added: Mapping[str, str], report: Callable[[str], None]
    ) -> None:
        """Start the server, which imports the stack in the background.

        `python` is the interpreter of the ranks, `environment` what they all have, and `added` what one of them has
        beside it: a rank whose variables differ can be forked only if no library reads these as it is imported.
        `report` takes lines for the log.
        """
        # That of the ranks, so that what the launcher's own imports set meanwhile makes no difference.
        self.environment = environment
        self._python, self._report = python, report
        self._environment = {**environment, **added, PARENT: str(os.getpid()), **SERVER_VARIABLES}
        self._server: _Server | None = None
        self._is_ready = False
        self._start()

    def await_ready(self) -> None:
        """Wait until the server has imported the stack, it can't be used, or a stop is requested."""
        end_s = time.monotonic() + _IMPORT_LIMIT_S
        while not self._can_fork() and self._server is not None and stop_requested() is None:
            if time.monotonic() > end_s:
                self._give_up(f"is not ready after {_IMPORT_LIMIT_S:.0f} s")
            else:
                select.select([self._server.control], [], [], _POLL_S)

    def fork(self, argv: Sequence[str], environment: Mapping[str, str], console: int) -> ForkedRank | None:
        """Start a rank with the command, the environment and the descriptor of its output; None: start it fresh."""
        changes = _list_changes(self._environment, environment)
        if tuple(argv[:3]) != (self._python, "-m", PROGRAM) or not changes.keys() <= _OF_RANKS:
            return None
        if not self._can_fork():
            return None
        assert self._server is not None
        request = RankRequest(tuple(argv[3:]), changes)
        try:
            with _adopting():
                return ForkedRank(_request(self._server.control, request, console))
        except OSError as error:
            if self._can_fork():  # it has neither died nor said why it can't fork
                self._replace(f"started no rank ({error})")
            return None

    def close(self) -> None:
        """End the server; the ranks go on."""
        if self._server is not None:
            self._server.end()
            self._server = None

    def _start(self) -> None:
        self._is_ready = False
        control, served = socket.socketpair()
        with served:
            try:
                output = os.fdopen(os.memfd_create("rank server"), "w+b")
                self._server = _Server(start_server(self._python, self._environment, served, output), control, output)
            except OSError as error:
                control.close()
                self._give_up(f"can't be started: {error}")

    def _can_fork(self) -> bool:
        """Return whether the server can be asked for a rank; read what it says, and replace it if it has died."""
        while self._server is not None and select.select([self._server.control], [], [], 0)[0]:
            try:
                message = self._server.control.recv(4096)
            except ConnectionError:
                message = b""
            if message == READY:
                self._is_ready = True
            elif message:
                self._give_up(message.removeprefix(REFUSAL).decode(errors="replace"))
            elif self._is_ready:
                self._replace(f"has ended ({_describe_end(self._server)})")
            else:
                self._give_up(f"ended during its imports ({_describe_end(self._server)})")
        return self._server is not None and self._is_ready

    def _replace(self, reason: str) -> None:
        self.close()
        self._report(f"[WARNING] the rank server {reason}; ranks start fresh until a new one is ready")
        self._start()

    def _give_up(self, reason: str) -> None:
        self.close()
        self._report(f"[WARNING] ranks start fresh, since the rank server {reason}")


def start_server(
    python: str, environment: Mapping[str, str], served: socket.socket, output: IO[bytes]
) -> ServerProcess:
    """Start the process of a server that answers on the socket.

    Raises:
        OSError: it can't be started.
    """
    return subprocess.Popen(
        (python, "-m", "launcher.rank_server", str(served.fileno())),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[served.fileno()],
        start_new_session=True,  # only the launcher handles a terminal's Ctrl-C
    )


def _list_changes(environment: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables that differ in the wanted environment; None for those that it lacks."""
    names = environment.keys() | wanted.keys()
    return {name: wanted.get(name) for name in names if environment.get(name) != wanted.get(name)}


def _request(control: socket.socket, request: RankRequest, console: int) -> int:
    """Ask the server for a rank, and return its process ID.

    Raises:
        OSError: the server or the rank has died before it reported the ID, or is silent. No rank has started to work:
            it waits for a word that does not come.
    """
    own, served = socket.socketpair()
    with own, own.makefile("rb") as answers:
        own.settimeout(_ANSWER_LIMIT_S)
        with served:
            socket.send_fds(control, [b"r"], [served.fileno(), console])
        own.sendall(request.render())
        answer = answers.readline()
        if not answer:
            raise ConnectionError("it ended before it reported its process ID")
        with suppress(OSError):  # a rank that has been killed since is reported like any other
            own.sendall(GO)
    return int(answer)


@contextmanager
def _adopting() -> Iterator[None]:
    """Make this process the parent of descendants whose own parent exits within the block.

    Only there: orphans of folds would stay zombies until the launcher ends.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _describe_end(server: _Server) -> str:
    """Return how the server has ended: by which signal, or its last words."""
    code = server.process.wait()
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    server.output.seek(0)
    lines = server.output.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
