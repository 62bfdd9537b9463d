"""Start ranks as real processes, forked from a server that has imported the stack (saves 5 s of CPU per process).

A rank runs `main(argv) -> exit code`, named as `module:function`, in the environment that `doccls-launch` sets.
(tests/distributed/test_group_refusals.py covers the environment of `accelerate launch` and torchrun.)
"""

import faulthandler
import importlib
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

from doccls.system.rank import MEETING_FILE
from launcher.devices import list_cpus, render_environment

REPOSITORY = Path(__file__).resolve().parents[2]
_FROM_LAUNCHERS = (
    MEETING_FILE, "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NO_COLOR", "FORCE_COLOR",
)  # fmt: skip
_GRACE_S = 30.0  # how long the other ranks may run after one has failed
_POLL_S = 0.1

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["doccls.training.trainer", "doccls.train", "doccls.predict", "doccls.__main__", "launcher.cli", "launcher.launch"]
)


@dataclass(frozen=True)
class Rank:
    """The exit code and output of one rank."""

    code: int | None  # exit code; None if it hung and was killed
    stdout: str
    stderr: str


def clean_environment() -> dict[str, str]:
    """Return this process's environment without a launcher's variables, and with GPUs, terminal and W&B disabled."""
    kept = {name: value for name, value in os.environ.items() if name not in _FROM_LAUNCHERS}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def group_environment(rank: int, world_size: int, meeting_file: Path) -> dict[str, str]:
    """Return the variables that `doccls-launch` sets for a rank; none for a single process."""
    if world_size == 1:
        return {}
    return {**render_environment(list_cpus(world_size), rank, 1), MEETING_FILE: str(meeting_file)}


def find_free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def launch_ranks(
    program: str,
    argv: Sequence[str],
    folder: Path,
    world_size: int = 1,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 150,
    kill_stopped: bool = False,
) -> list[Rank]:
    """Run `program` as `world_size` ranks with their output in `folder`, and return how each ended, by rank.

    A rank that hangs (past the timeout, or long after another failed) is killed and has no exit code. With
    `kill_stopped`, a rank that has stopped itself (SIGSTOP) is killed as well; its exit code is that of SIGKILL.
    """
    ranks = start_ranks(program, argv, folder, world_size, environment)
    try:
        _await(ranks, timeout_s, kill_stopped)
    finally:
        hung = [process for process in ranks if process.is_alive()]
        for process in hung:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGABRT)  # its stacks go to its stderr
        for process in ranks:
            process.join(10)
            process.kill()
            process.join(10)
    return [
        Rank(None if process in hung else process.exitcode, *(_read(folder, name, rank) for name in ("out", "err")))
        for rank, process in enumerate(ranks)
    ]


def start_ranks(
    program: str, argv: Sequence[str], folder: Path, world_size: int = 1, environment: Mapping[str, str] | None = None
) -> list[ForkServerProcess]:
    """Start ranks as `launch_ranks` does, without waiting; the caller ends the processes."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting_file = folder / f"meeting_{secrets.token_hex(4)}"
    ranks = []
    for rank in range(world_size):
        variables = clean_environment() | group_environment(rank, world_size, meeting_file) | dict(environment or {})
        process = _CONTEXT.Process(target=_be_rank, args=(program, list(argv), str(folder), rank, variables))
        process.start()
        ranks.append(process)
    return ranks


def _await(ranks: Sequence[ForkServerProcess], timeout_s: float, kill_stopped: bool) -> None:
    deadline = time.monotonic() + timeout_s
    alive = list(ranks)
    while alive and time.monotonic() < deadline:
        limit_s = _POLL_S if kill_stopped else timeout_s
        wait([process.sentinel for process in alive], timeout=min(limit_s, max(0.0, deadline - time.monotonic())))
        if kill_stopped:
            for process in filter(_is_stopped, alive):
                process.kill()
        ended = [process for process in alive if not process.is_alive()]
        alive = [process for process in alive if process not in ended]
        if any(process.exitcode for process in ended):
            deadline = min(deadline, time.monotonic() + _GRACE_S)


def _is_stopped(process: ForkServerProcess) -> bool:
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _be_rank(program: str, argv: list[str], folder: str, rank: int, environment: dict[str, str]) -> None:
    """Redirect output, set the environment and the command line, and run the program (in the new process)."""
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(Path(folder) / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    faulthandler.enable()
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # not the server's own
    os.environ.clear()
    os.environ.update(environment)
    module, function = program.split(":")
    sys.argv = [module, *argv]
    sys.exit(getattr(importlib.import_module(module), function)(argv))


def _read(folder: Path, name: str, rank: int) -> str:
    file = folder / f"rank{rank}.{name}"
    return file.read_text(encoding="utf-8") if file.exists() else ""
