"""`doccls.train` with a fault injected at a given point; each step is counted."""

import functools
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from doccls.run.heartbeat import Heartbeat
from doccls.system.rank import rank_by_environment
from doccls.train import main
from doccls.training import step as step_module
from doccls.training import trainer as trainer_module

# Points of fold 0, of its second epoch where possible.
POINTS = (
    "first step", "mid-epoch", "validation", "rename of a resume checkpoint", "between best weights and predictions",
    "merge",
)  # fmt: skip
SECOND_FOLD = "mid-epoch of fold 1"
FAULTS = ("SIGKILL", "SIGSTOP, then SIGKILL", "SIGTERM", "SIGTERM three times", "disk full")
FILLER = "filler"
STEPS = "steps.txt"
_MID_EPOCH = {0: 9, 1: 7}  # for each fold a step (0-based) of the second epoch that is not its first
_INTERVAL_S = 1.1  # signals within a second count as one


def inject_fault(argv: list[str]) -> int:
    """Train; inject DOCCLS_TEST_FAULT when the main process reaches DOCCLS_TEST_PLACE; without them, only count."""
    folder = Path(os.environ["DOCCLS_TEST_FOLDER"])
    point, fault = os.environ.get("DOCCLS_TEST_PLACE"), os.environ.get("DOCCLS_TEST_FAULT", "")
    if rank_by_environment() == 0:
        _watch(folder, point, functools.partial(_inject, fault, folder))
    return main(argv)


def _watch(folder: Path, wanted: str | None, inject: Callable[[], None]) -> None:
    """Count steps, and call `inject` when training first reaches the wanted point."""
    reached: set[str] = set()

    def reach(point: str) -> None:
        if point == wanted and not reached:
            reached.add(point)
            inject()

    take_step, beat, rename, write_predictions = (
        step_module._take_step,
        Heartbeat.beat,
        Path.replace,
        trainer_module.write_predictions,
    )

    def take_counted_step(engine: Any, batches: Any, step: int) -> Any:
        fold = engine.plan.fold
        with (folder / STEPS).open("a") as file:
            file.write(f"{fold} {step}\n")
        if fold == 0 and step == 0:
            reach("first step")
        if step == _MID_EPOCH.get(fold):
            reach("mid-epoch" if fold == 0 else SECOND_FOLD)
        return take_step(engine, batches, step)

    def beat_at_point(heartbeat: Heartbeat, **changes: Any) -> None:
        if changes.get("phase") == "validate" and heartbeat.last.epoch == 2:
            reach("validation")
        beat(heartbeat, **changes)

    def rename_at_point(source: Path, target: Path) -> Path:
        if target.name == "last_fold0_0.safetensors" and target.exists():
            reach("rename of a resume checkpoint")
        if target.name == "oof_logits.npy":
            reach("merge")
        return rename(source, target)

    def write_at_point(*arguments: Any) -> None:
        reach("between best weights and predictions")
        write_predictions(*arguments)

    step_module._take_step = take_counted_step
    Heartbeat.beat = beat_at_point  # type: ignore[method-assign]
    Path.replace = rename_at_point  # type: ignore[method-assign, assignment]
    trainer_module.write_predictions = write_at_point  # type: ignore[attr-defined]


def _inject(fault: str, folder: Path) -> None:
    own = os.getpid()
    match fault:
        case "SIGKILL":
            os.kill(own, signal.SIGKILL)
        case "SIGSTOP, then SIGKILL":
            os.kill(own, signal.SIGSTOP)  # its parent kills it
        case "SIGTERM":
            os.kill(own, signal.SIGTERM)
        case "SIGTERM three times":
            for _ in range(3):
                os.kill(own, signal.SIGTERM)
                time.sleep(_INTERVAL_S)
        case "disk full":
            free = os.statvfs(folder / "experiments")
            with suppress(OSError):  # a resume checkpoint may be written meanwhile and take some of the free space
                (folder / "experiments" / FILLER).write_bytes(bytes(free.f_bavail * free.f_frsize))
        case _:
            raise AssertionError(fault)
