"""Programs for tests that signal a run at a known point: `doccls.train` with one operation blocked or slowed down."""

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

from doccls import experiment as experiment_module
from doccls.data import scan as scan_module
from doccls.model import build as build_module
from doccls.model.download import download
from doccls.oof.summary import Summary
from doccls.run.heartbeat import Heartbeat
from doccls.run.owner import FoldOwner
from doccls.run.paths import RunPaths
from doccls.system.lock import Lock
from doccls.system.rank import rank_by_environment
from doccls.system.signals import handling_signals
from doccls.train import main
from doccls.training import engine as engine_module
from doccls.training import resume as resume_module
from doccls.training import step as step_module
from doccls.training import validation as validation_module
from tests.unit.test_signals import WRITES, disturb_write

_T = TypeVar("_T")
# Files in the run's folder:
HELD = "held"  # exists once the program blocks
GO = "go"  # ends the block
FORKS = "forks.txt"  # PID and number of threads at each fork


def improve_each_epoch(argv: list[str]) -> int:
    """Train with a score that improves each epoch, so that each epoch writes a checkpoint."""
    scores = itertools.count(1)
    validation_module.selection_f1 = lambda *arguments: next(scores) / 1e6  # type: ignore[attr-defined]
    return main(argv)


def record_forks(argv: list[str]) -> int:
    """Train in a process group of its own; this process and each interpreter that it starts record their forks."""
    os.setsid()
    folder = Path(__file__).parent / "recording_forks"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    runpy.run_path(str(folder / "sitecustomize.py"))
    return main(argv)


def slow_steps(argv: list[str]) -> int:
    """Train; in each step the main thread spends 0.7 s in one C call, during which no Python signal handler runs."""

    def block(take_step: Callable[..., _T], *arguments: Any) -> _T:
        _block_in_c(0.7)
        return take_step(*arguments)

    step_module._take_step = functools.partial(block, step_module._take_step)
    return main(argv)


def hold_step(argv: list[str]) -> int:
    """Train; the second step creates the file HELD and blocks in a C call for ten minutes."""
    calls = itertools.count(1)

    def block(take_step: Callable[..., _T], *arguments: Any) -> _T:
        if next(calls) == 2:
            _mark_held()
            _block_in_c(600)
        return take_step(*arguments)

    step_module._take_step = functools.partial(block, step_module._take_step)
    return main(argv)


def slow_saves(argv: list[str]) -> int:
    """Train; delay the write of each resume checkpoint by up to 0.5 s, drawn with the seed DOCCLS_TEST_SEED."""
    rng = random.Random(int(os.environ["DOCCLS_TEST_SEED"]))

    def write_slowly(write_resume: Callable[..., None], *arguments: Any) -> None:
        time.sleep(rng.choice([0.0, rng.uniform(0, 0.5)]))
        write_resume(*arguments)

    resume_module.write_resume = functools.partial(write_slowly, resume_module.write_resume)  # type: ignore[attr-defined]
    return main(argv)


def hold_save(argv: list[str]) -> int:
    """Train; writing a resume checkpoint creates the file HELD and waits for the file GO."""

    def write_held(*arguments: Any) -> None:
        _mark_held()
        while not _locate_marker(GO).exists():
            time.sleep(0.02)
        write_resume(*arguments)

    write_resume, resume_module.write_resume = resume_module.write_resume, write_held  # type: ignore[attr-defined]
    return main(argv)


def stop_in_validation(argv: list[str]) -> int:
    """Train; the last rank receives SIGTERM in its first validation."""
    beat, validation_beats = Heartbeat.beat, itertools.count()

    def signal_and_beat(heartbeat: Heartbeat, **changes: Any) -> None:
        is_last = rank_by_environment() == int(os.environ.get("WORLD_SIZE", "1")) - 1
        if changes.get("phase") == "validate" and is_last and next(validation_beats) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        beat(heartbeat, **changes)

    Heartbeat.beat = signal_and_beat  # type: ignore[method-assign]
    return main(argv)


def stop_in_merge(argv: list[str]) -> int:
    """Train; the main process receives SIGTERM while it merges the folds."""
    merge_locked = experiment_module.merge_locked

    def signal_and_merge(paths: RunPaths, lock: Lock) -> Summary:
        os.kill(os.getpid(), signal.SIGTERM)
        return merge_locked(paths, lock)

    experiment_module.merge_locked = signal_and_merge  # type: ignore[attr-defined]
    return main(argv)


def stop_before_merge(argv: list[str]) -> int:
    """Train; the main process receives SIGTERM as it unlocks the folds after the last one."""
    leave = FoldOwner.__exit__

    def signal_and_leave(*arguments: Any) -> None:
        if rank_by_environment() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        leave(*arguments)

    FoldOwner.__exit__ = signal_and_leave  # type: ignore[method-assign]
    return main(argv)


def stop_between_folds(argv: list[str]) -> int:
    """Train; the main process receives SIGTERM when it builds the model of its second fold."""
    calls = itertools.count(1)

    def signal_and_build(build_model: Callable[..., _T], *arguments: Any) -> _T:
        if next(calls) == 2 and rank_by_environment() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return build_model(*arguments)

    engine_module.build_model = functools.partial(signal_and_build, engine_module.build_model)  # type: ignore[attr-defined]
    return main(argv)


def train_on_terminal(argv: list[str]) -> int:
    """Train with DOCCLS_TEST_TERMINAL as the controlling terminal; closing it sends SIGHUP."""
    os.setsid()
    terminal = os.open(os.environ["DOCCLS_TEST_TERMINAL"], os.O_RDWR)
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    return main(argv)


def fail_while_main_blocks(argv: list[str]) -> int:
    """Train as two ranks; in the second step rank 1 fails while the main process blocks in a C call."""
    if rank_by_environment() == 0:
        return hold_step(argv)
    calls = itertools.count(1)

    def fail(take_step: Callable[..., _T], *arguments: Any) -> _T:
        if next(calls) == 2:
            raise RuntimeError("rank 1 met this alone")
        return take_step(*arguments)

    step_module._take_step = functools.partial(fail, step_module._take_step)
    return main(argv)


def hold_scan(argv: list[str]) -> int:
    """Train; scanning the images creates the file HELD and takes ten minutes."""
    scan_module.scan_files = _hold  # type: ignore[assignment]
    return main(argv)


def hold_model(argv: list[str]) -> int:
    """Train; a download for the model creates the file HELD and takes ten minutes."""
    build_module.download = lambda name, fetch: download(name, _hold)  # type: ignore[attr-defined]
    return main(argv)


def hold_write(argv: list[str]) -> int:
    """Create the file HELD in a write call and block there. argv = kind of file, number of the write call, path."""
    with pytest.MonkeyPatch.context() as patch, handling_signals():
        disturb_write(patch, int(argv[1]), _hold)
        WRITES[argv[0]][0](Path(argv[2]))
    return 0


def _hold(*arguments: Any) -> None:
    _mark_held()
    time.sleep(600)


def _mark_held() -> None:
    _locate_marker(HELD).touch()


def _locate_marker(name: str) -> Path:
    return Path(os.environ["DOCCLS_TEST_FOLDER"]) / name


def _block_in_c(time_s: float) -> None:
    """Block in one C call without the GIL: locking a locked mutex, which no signal interrupts."""
    libc = ctypes.CDLL(None)
    mutex = (ctypes.c_uint64 * 8)()  # on Linux, zeros are PTHREAD_MUTEX_INITIALIZER
    seconds, nanoseconds = divmod(time.time_ns() + int(time_s * 1e9), 10**9)
    deadline = (ctypes.c_long * 2)(seconds, nanoseconds)  # a timespec
    assert libc.pthread_mutex_lock(mutex) == 0
    assert libc.pthread_mutex_timedlock(mutex, deadline) == errno.ETIMEDOUT


if __name__ == "__main__":  # what `accelerate launch -m` starts
    sys.exit(slow_steps(sys.argv[1:]))
