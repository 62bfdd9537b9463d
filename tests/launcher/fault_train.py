"""`doccls.train` with a fault in its fourth step, once or in each attempt.

DOCCLS_TEST_FAULT is `FAULT`, or `FAULT of rank 1`; DOCCLS_TEST_FOLDER holds marker files.
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

from doccls import train as train_module
from doccls.train import main
from doccls.training import resume
from doccls.training import step as step_module

STEP = 3
# Marker files: the fault has happened; a later attempt has reached its first step.
FAULT_MARKER = "fault"
STEP_MARKER = "step"


def train_with_fault(argv: list[str]) -> int:
    """Train with the fault that the environment names."""
    fault, _, rank = os.environ["DOCCLS_TEST_FAULT"].partition(" of rank ")
    if fault == "slow save":
        resume.write_resume = functools.partial(write_slowly, resume.write_resume)  # type: ignore[attr-defined]
        fault = "SIGTERM"
    if fault == "impatient":
        train_module._LOCK_WAIT_S = 0.0
    elif os.environ.get("RANK", "0") == (rank or "0"):
        step_module._take_step = functools.partial(take_faulty_step, fault, step_module._take_step)
    return main(argv)


def write_slowly(write_resume: Callable[..., None], *others: Any) -> None:
    """Take longer than siblings have after a failure, as a slow disk does."""
    time.sleep(8)
    write_resume(*others)


def train_with_changed_weight(argv: list[str]) -> int:
    """Train, but change one weight of each resume checkpoint that is read."""

    def read_changed(path: Path, read_resume: Callable[[Path], Any] = resume.read_resume) -> Any:
        checkpoint = read_resume(path)
        checkpoint.model["raw"]["head.fc.weight"] += 1e-3
        return checkpoint

    resume.read_resume = read_changed
    return main(argv)


def find_marker(name: str) -> Path:
    """Return the path of a file that records that something has happened."""
    return Path(os.environ["DOCCLS_TEST_FOLDER"]) / name


def find_ledger() -> Path:
    (ledger,) = find_marker("experiments").glob("*/*/launch.json")
    return ledger


def inject_fault(fault: str, largest_micro_batch: int) -> None:
    """Inject the fault in the middle of a step."""
    if fault == "error":
        raise KeyError("a defect")
    if fault.startswith("out of memory above "):
        if largest_micro_batch > int(fault.split()[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return
    marker = find_marker(FAULT_MARKER)
    if marker.exists():
        if fault == "ledger that can't be written":
            find_ledger().rmdir()
        return
    marker.touch()
    if fault == "loader worker":
        (server,) = [child for child in psutil.Process().children() if child.children()]
        server.children()[0].kill()  # torch notices when it waits for a batch
    elif fault == "whole fold":
        ranks = json.loads(find_ledger().read_text())["attempts"][-1]["pids"]
        for rank in sorted(ranks, key=os.getpid().__eq__):  # this process last
            os.kill(rank, signal.SIGKILL)
    elif fault == "ledger that can't be written":
        ledger = find_ledger()
        ledger.unlink()
        ledger.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "launcher":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    else:
        os.kill(os.getpid(), signal.Signals[fault])
        if fault == "SIGSTOP":
            time.sleep(60)  # SIGCONT wakes it to dump its stacks; it must still wait to be killed


def take_faulty_step(fault: str, take_step: Callable[..., Any], engine: Any, batches: Any, step: int) -> Any:
    if find_marker(FAULT_MARKER).exists() and not find_marker(STEP_MARKER).exists():
        find_marker(STEP_MARKER).touch()
    if step == STEP:
        rank_batch_size = -(-engine.config.batch_size // engine.accelerator.num_processes)
        inject_fault(fault, min(engine.config.micro_batch_size or rank_batch_size, rank_batch_size))
    return take_step(engine, batches, step)
