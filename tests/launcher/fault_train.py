"""`doccls.train` that meets a fault in its fourth step, once or as long as it has cause.

DOCCLS_TEST_FAULT is `what`, or `what of rank 1`; DOCCLS_TEST_FOLDER holds the marks.
"""

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from doccls import train as train_room
from doccls.train import main
from doccls.training import resume
from doccls.training import step as loop_room

STEP = 3
STRUCK = "struck"
STEPPED = "stepped"


def train_with_fault(argv: list[str]) -> int:
    """Train; the fault is in the environment."""
    what, _, rank = os.environ["DOCCLS_TEST_FAULT"].partition(" of rank ")
    if what == "slow save":
        resume.write_resume = functools.partial(write_slowly, resume.write_resume)  # type: ignore[attr-defined]
        what = "SIGTERM"
    if what == "impatient":
        train_room._LOCK_WAIT_S = 0.0
    elif os.environ.get("RANK", "0") == (rank or "0"):
        loop_room._take_step = functools.partial(step_into, what, loop_room._take_step)
    return main(argv)


def write_slowly(write_resume: Callable[..., None], *others: Any) -> None:
    """As a slow disk does; the ranks' siblings are given less to end after a failure."""
    time.sleep(8)
    write_resume(*others)


def train_with_changed_weight(argv: list[str]) -> int:
    """Train; each resume checkpoint that is read has one weight changed."""

    def read_changed(path: Path, read_resume: Callable[[Path], Any] = resume.read_resume) -> Any:
        checkpoint = read_resume(path)
        checkpoint.model["raw"]["head.fc.weight"] += 1e-3
        return checkpoint

    resume.read_resume = read_changed
    return main(argv)


def find_mark(name: str) -> Path:
    """A file that says that something has happened."""
    return Path(os.environ["DOCCLS_TEST_FOLDER"]) / name


def find_ledger() -> Path:
    (ledger,) = find_mark("experiments").glob("*/*/launch.json")
    return ledger


def meet(what: str, largest_micro_batch: int) -> None:
    """The fault, in the midst of a step."""
    if what == "error":
        raise KeyError("a defect")
    if what.startswith("out of memory above "):
        if largest_micro_batch > int(what.split()[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return
    struck = find_mark(STRUCK)
    if struck.exists():
        if what == "ledger that can't be written":
            find_ledger().rmdir()
        return
    struck.touch()
    if what == "loader worker":
        (server,) = [one for one in psutil.Process().children() if one.children()]
        server.children()[0].kill()  # torch tells of it when it waits for a batch
    elif what == "whole fold":
        ranks = json.loads(find_ledger().read_text())["attempts"][-1]["pids"]
        for rank in sorted(ranks, key=os.getpid().__eq__):  # this one last
            os.kill(rank, signal.SIGKILL)
    elif what == "ledger that can't be written":
        ledger = find_ledger()
        ledger.unlink()
        ledger.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "launcher":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    else:
        os.kill(os.getpid(), signal.Signals[what])
        if what == "SIGSTOP":
            time.sleep(60)  # it may not end before it is killed, just because it was woken for its stacks


def step_into(what: str, take_step: Callable[..., Any], engine: Any, batches: Any, step: int) -> Any:
    if find_mark(STRUCK).exists() and not find_mark(STEPPED).exists():
        find_mark(STEPPED).touch()
    if step == STEP:
        share = -(-engine.config.batch_size // engine.accelerator.num_processes)
        meet(what, min(engine.config.micro_batch_size or share, share))
    return take_step(engine, batches, step)
