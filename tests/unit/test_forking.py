"""The launcher's side of rank servers, which are imitated here: requests, refusals, deaths, silence."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from doccls.system.lifeline import PARENT
from launcher import forking, local
from launcher.forking import ForkedRank, RankServer
from launcher.plan import RankCommand
from launcher.rank_server import GO, READY, REFUSAL, find_fork_problem

PYTHON = "/usr/bin/python"
ARGV = (PYTHON, "-m", "doccls.train", "--set", "a=1")
ENVIRONMENT, ADDED = {"HOME": "/home"}, {"OMP_NUM_THREADS": "2"}


class ImitatedServer:
    """The server's end of the socket, and the parts of a process."""

    def __init__(self, environment: Mapping[str, str], served: socket.socket, output: IO[bytes]) -> None:
        self.environment, self.control, self.output, self.code = environment, served.dup(), output, 0

    def die(self, code: int, words: str = "") -> None:
        self.output.write(words.encode())
        self.output.flush()
        self.control.close()
        self.code = code

    def refuse(self, reason: str) -> None:
        """Become ready, and answer a request with the reason."""
        self.control.sendall(READY)
        threading.Thread(target=self._refuse, args=(reason,)).start()

    def _refuse(self, reason: str) -> None:
        _, descriptors, _, _ = socket.recv_fds(self.control, 1, 2)
        self.control.sendall(REFUSAL + reason.encode())
        for descriptor in descriptors:
            os.close(descriptor)

    def answer(self, pid: int | None) -> threading.Thread:
        """Answer one request with the process ID of a rank, or let the rank die before."""
        thread = threading.Thread(target=self._answer, args=(pid,))
        thread.start()
        return thread

    def _answer(self, pid: int | None) -> None:
        _, descriptors, _, _ = socket.recv_fds(self.control, 1, 2)
        os.close(descriptors[1])
        with socket.socket(fileno=descriptors[0]) as connection, connection.makefile("rb") as stream:
            self.request: Any = json.loads(stream.readline())
            if pid is not None:
                connection.sendall(f"{pid}\n".encode())
                self.last_word = stream.readline()

    def kill(self) -> None:
        self.control.close()

    def wait(self) -> int:
        return self.code


class Launch:
    """A rank server of which the other end is imitated."""

    def __init__(self) -> None:
        self.servers, self.lines = list[ImitatedServer](), list[str]()
        self.client: RankServer

    def start(self, python: str, environment: Mapping[str, str], served: socket.socket, output: IO[bytes]) -> Any:
        assert python == PYTHON
        self.servers.append(ImitatedServer(environment, served, output))
        return self.servers[-1]

    def fork(self, argv: tuple[str, ...] = ARGV, **changes: str) -> ForkedRank | None:
        with open(os.devnull, "wb") as console:  # noqa: PTH123
            return self.client.fork(argv, ENVIRONMENT | ADDED | changes, console.fileno())


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    launch = Launch()
    monkeypatch.setattr(forking, "start_server", launch.start)
    launch.client = RankServer(PYTHON, ENVIRONMENT, ADDED, launch.lines.append)
    yield launch
    launch.client.close()


def test_rank_is_told_its_words_and_what_differs_in_its_environment(launch: Launch) -> None:
    (server,) = launch.servers
    expected = ENVIRONMENT | ADDED | {"DOCCLS_PARENT_PID": str(os.getpid()), "OPENBLAS_NUM_THREADS": "1"}
    assert server.environment == expected
    server.control.sendall(READY)
    answering = server.answer(4711)
    rank = launch.fork(RANK="1", CUDA_VISIBLE_DEVICES="GPU-2")
    answering.join()
    assert rank is not None and rank.pid == 4711 and launch.lines == []
    changes = {"RANK": "1", "CUDA_VISIBLE_DEVICES": "GPU-2", "DOCCLS_PARENT_PID": None, "OPENBLAS_NUM_THREADS": None}
    assert server.request == [["--set", "a=1"], changes]
    assert server.last_word == GO


def test_what_the_launcher_sets_for_itself_later_makes_no_difference(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server,) = launch.servers
    server.control.sendall(READY)
    answering = server.answer(4711)
    monkeypatch.setenv("KMP_INIT_AT_FORK", "FALSE")
    rank = local._start_rank(RankCommand(ARGV, ADDED), tmp_path / "console", {"RANK": "0"}, launch.client)
    answering.join()
    assert isinstance(rank, ForkedRank) and server.request[1].keys() == {"RANK", PARENT, "OPENBLAS_NUM_THREADS"}


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (ARGV, {"OMP_NUM_THREADS": "3"}),
        (ARGV, {"PYTHONWARNINGS": "error"}),
        (("/other/python", *ARGV[1:]), {}),
        ((PYTHON, "-X", "dev", *ARGV[1:]), {}),
        ((PYTHON, "-m", "doccls.predict"), {}),
    ],
)
def test_rank_with_other_interpreter_or_variables_read_by_imports_is_not_forked(
    launch: Launch, argv: tuple[str, ...], changes: dict[str, str]
) -> None:
    (server,) = launch.servers
    server.control.sendall(READY)
    launch.client.await_ready()
    assert launch.fork(argv, **changes) is None
    server.control.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.control.recv(1)


def test_rank_is_not_forked_before_server_is_ready(launch: Launch) -> None:
    assert launch.fork() is None and launch.lines == [] and len(launch.servers) == 1


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda server: server.control.sendall(REFUSAL + b"has 3 threads"), "has 3 threads"),
        (lambda server: server.refuse("can't fork"), "can't fork"),
        (lambda server: server.die(1, "Traceback:\nImportError: no torch\n\n"),
         "ended during its imports (ImportError: no torch)"),
        (lambda server: server.die(-9), "ended during its imports (killed by SIGKILL)"),
    ],
)  # fmt: skip
def test_server_that_can_never_fork_is_reported_once_and_not_replaced(
    launch: Launch, end: Callable[[ImitatedServer], None], reason: str
) -> None:
    end(launch.servers[0])
    launch.client.await_ready()
    assert launch.fork() is launch.fork() is None
    assert launch.lines == [f"[WARNING] ranks start fresh, since the rank server {reason}"] and len(launch.servers) == 1


def test_server_that_can_not_be_started_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(forking, "start_server", refuse)
    lines: list[str] = []
    client = RankServer(PYTHON, ENVIRONMENT, ADDED, lines.append)
    client.await_ready()
    assert client.fork(ARGV, ENVIRONMENT, 1) is None
    reason = "can't be started: [Errno 11] Resource temporarily unavailable"
    assert lines == [f"[WARNING] ranks start fresh, since the rank server {reason}"]


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        ("has ended (killed by SIGKILL)", lambda server: server.die(-9)),
        ("started no rank (timed out)", lambda server: None),
        ("started no rank (it ended before it reported its process ID)", lambda server: server.answer(None)),
    ],
)
def test_server_that_fails_later_is_replaced(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, reason: str, end: Callable[[ImitatedServer], object]
) -> None:
    monkeypatch.setattr(forking, "_ANSWER_LIMIT_S", 0.3)
    first = launch.servers[0]
    first.control.sendall(READY)
    launch.client.await_ready()
    end(first)
    assert launch.fork() is None
    assert launch.lines == [f"[WARNING] the rank server {reason}; ranks start fresh until a new one is ready"]
    assert launch.fork() is None  # the second is not ready yet
    _, second = launch.servers
    second.control.sendall(READY)
    answering = second.answer(4711)
    assert launch.fork() is not None
    answering.join()
    assert len(launch.lines) == 1


def test_wait_for_server_ends_with_request_to_stop(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "stop_requested", lambda: 15)
    launch.client.await_ready()
    assert launch.fork() is None and launch.lines == []


def test_process_with_threads_must_not_fork() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        problem = find_fork_problem()
    finally:
        done.set()
        thread.join()
    assert problem is not None and re.match(r"has \d+ threads after its imports \(", problem)


def test_wait_for_server_has_a_limit(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_IMPORT_LIMIT_S", 0.0)
    launch.client.await_ready()
    assert launch.lines == ["[WARNING] ranks start fresh, since the rank server is not ready after 0 s"]
