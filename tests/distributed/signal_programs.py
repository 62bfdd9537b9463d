"""What ranks run to be struck by a signal at a known place: `doccls.train` with one of its pieces held or made slow."""

import ctypes
import errno
import functools
import itertools
import os
import random
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from doccls.data import scan as scan_room
from doccls.run.heartbeat import Heartbeat
from doccls.system.rank import rank_by_environment
from doccls.system.signals import handling_signals
from doccls.train import main
from doccls.training import engine as engine_room
from doccls.training import resume as resume_room
from doccls.training import step as loop_room
from doccls.training import trainer as fold_room
from tests.unit.test_signals import WRITES, disturb_write

_T = TypeVar("_T")
HELD = "held"
"""File of the run's folder that says: now."""
GO = "go"
"""File of the run's folder that ends a hold."""
FORKS = "forks.txt"
"""File of the run's folder: process and number of its threads, for each fork."""


def best_each_epoch(argv: list[str]) -> int:
    """Train; each epoch is better than the last, so each writes a checkpoint."""
    scores = itertools.count(1)
    fold_room.selection_f1 = lambda *others: next(scores) / 1e6  # type: ignore[attr-defined]
    return main(argv)


def note_forks(argv: list[str]) -> int:
    """Train in a process group of its own; this process and each interpreter that it starts note their forks."""
    os.setsid()
    folder = Path(__file__).parent / "noting_forks"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    runpy.run_path(str(folder / "sitecustomize.py"))
    return main(argv)


def slow_steps(argv: list[str]) -> int:
    """Train; in each step the main thread is in one C call for most of a second, where no Python handler runs."""

    def stand(take_step: Callable[..., _T], *others: Any) -> _T:
        _stand_in_c(0.7)
        return take_step(*others)

    loop_room._take_step = functools.partial(stand, loop_room._take_step)
    return main(argv)


def hold_a_step(argv: list[str]) -> int:
    """Train; the second step says so and stands in a C call longer than anybody waits."""
    calls = itertools.count(1)

    def stand(take_step: Callable[..., _T], *others: Any) -> _T:
        if next(calls) == 2:
            _say_held()
            _stand_in_c(600)
        return take_step(*others)

    loop_room._take_step = functools.partial(stand, loop_room._take_step)
    return main(argv)


def slow_saves(argv: list[str]) -> int:
    """Train; the write of each state takes up to half a second more, drawn by DOCCLS_TEST_SEED."""
    draw = random.Random(int(os.environ["DOCCLS_TEST_SEED"]))

    def write_slowly(write_resume: Callable[..., None], *others: Any) -> None:
        time.sleep(draw.choice([0.0, draw.uniform(0, 0.5)]))
        write_resume(*others)

    resume_room.write_resume = functools.partial(write_slowly, resume_room.write_resume)  # type: ignore[attr-defined]
    return main(argv)


def hold_a_save(argv: list[str]) -> int:
    """Train; the write of a state says so and waits for the file GO."""

    def write_held(*others: Any) -> None:
        _say_held()
        while not _find_mark(GO).exists():
            time.sleep(0.02)
        write_resume(*others)

    write_resume, resume_room.write_resume = resume_room.write_resume, write_held  # type: ignore[attr-defined]
    return main(argv)


def stop_in_validation(argv: list[str]) -> int:
    """Train; the last rank is asked for the end in its first validation."""
    beat, asked = Heartbeat.beat, itertools.count()

    def watched_beat(heartbeat: Heartbeat, **changes: Any) -> None:
        is_last = rank_by_environment() == int(os.environ.get("WORLD_SIZE", "1")) - 1
        if changes.get("phase") == "validate" and is_last and next(asked) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        beat(heartbeat, **changes)

    Heartbeat.beat = watched_beat  # type: ignore[method-assign]
    return main(argv)


def train_on_a_terminal(argv: list[str]) -> int:
    """Train with the terminal of the environment as this process's own, which hears when it is closed."""
    os.setsid()
    terminal = os.open(os.environ["DOCCLS_TEST_TERMINAL"], os.O_RDWR)
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    return main(argv)


def fail_while_the_main_process_stands(argv: list[str]) -> int:
    """Train as two ranks: in the second step rank 1 fails, while the main process stands in a C call, and for long."""
    if rank_by_environment() == 0:
        return hold_a_step(argv)
    calls = itertools.count(1)

    def fail(take_step: Callable[..., _T], *others: Any) -> _T:
        if next(calls) == 2:
            raise RuntimeError("rank 1 met this alone")
        return take_step(*others)

    loop_room._take_step = functools.partial(fail, loop_room._take_step)
    return main(argv)


def hold_the_look_at_the_data(argv: list[str]) -> int:
    """Train; the scan of the images says so and takes longer than anybody waits."""
    scan_room.scan_files = _hold  # type: ignore[assignment]
    return main(argv)


def hold_the_model(argv: list[str]) -> int:
    """Train; the model says so and comes from a hub slower than anybody waits."""
    engine_room.build_model = _hold  # type: ignore[attr-defined]
    return main(argv)


def hold_a_write(argv: list[str]) -> int:
    """argv = kind, number of the write call, path. Say so in that call, and wait there to be ended."""
    with pytest.MonkeyPatch.context() as patch, handling_signals():
        disturb_write(patch, int(argv[1]), _hold)
        WRITES[argv[0]][0](Path(argv[2]))
    return 0


def _hold(*others: Any) -> None:
    _say_held()
    time.sleep(600)


def _say_held() -> None:
    _find_mark(HELD).touch()


def _find_mark(name: str) -> Path:
    return Path(os.environ["DOCCLS_TEST_FOLDER"]) / name


def _stand_in_c(time_s: float) -> None:
    """Stay in one C call without the GIL: the second lock of a mutex, which no signal interrupts."""
    libc = ctypes.CDLL(None)
    mutex = (ctypes.c_uint64 * 8)()  # on Linux, zeros are PTHREAD_MUTEX_INITIALIZER
    seconds, nanoseconds = divmod(time.time_ns() + int(time_s * 1e9), 10**9)
    deadline = (ctypes.c_long * 2)(seconds, nanoseconds)  # a timespec
    assert libc.pthread_mutex_lock(mutex) == 0
    assert libc.pthread_mutex_timedlock(mutex, deadline) == errno.ETIMEDOUT


if __name__ == "__main__":  # what `accelerate launch -m` starts
    sys.exit(slow_steps(sys.argv[1:]))
