"""`doccls.train` that meets a fault at a place of its work; each step that it takes is counted."""

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
from doccls.training import step as loop_room
from doccls.training import trainer as fold_room

PLACES = ("first step", "mid-epoch", "validation", "rename of a state", "between best weights and part", "merge")
"""Of fold 0; in its second epoch, where there is a choice."""
SECOND_FOLD = "mid-epoch of fold 1"
FAULTS = ("SIGKILL", "SIGSTOP, then SIGKILL", "SIGTERM", "SIGTERM three times", "disk full")
FILLER = "filler"
STEPS = "steps.txt"
_MIDST = {0: 9, 1: 7}
"""By fold: a step (0-based) of the second epoch that is not its first."""
_APART_S = 1.1
"""Signals closer than a second are one."""


def meet_fault(argv: list[str]) -> int:
    """Train; DOCCLS_TEST_PLACE and DOCCLS_TEST_FAULT say what the main process meets, once; nothing without them."""
    folder = Path(os.environ["DOCCLS_TEST_FOLDER"])
    wanted, fault = os.environ.get("DOCCLS_TEST_PLACE"), os.environ.get("DOCCLS_TEST_FAULT", "")
    if rank_by_environment() == 0:
        _watch(folder, wanted, functools.partial(_kill_ranks, fault, folder))
    return main(argv)


def _watch(folder: Path, wanted: str | None, kill: Callable[[], None]) -> None:
    """Have each place of the work say that it is reached."""
    met: set[str] = set()

    def reach(place: str) -> None:
        if place == wanted and not met:
            met.add(place)
            kill()

    take_step, beat, move, write_predictions = (
        loop_room._take_step,
        Heartbeat.beat,
        Path.replace,
        fold_room.write_predictions,
    )

    def watched_step(engine: Any, batches: Any, step: int) -> Any:
        fold = engine.plan.fold
        with (folder / STEPS).open("a") as file:
            file.write(f"{fold} {step}\n")
        if fold == 0 and step == 0:
            reach("first step")
        if step == _MIDST.get(fold):
            reach("mid-epoch" if fold == 0 else SECOND_FOLD)
        return take_step(engine, batches, step)

    def watched_beat(heartbeat: Heartbeat, **changes: Any) -> None:
        if changes.get("phase") == "validate" and heartbeat.last.epoch == 2:
            reach("validation")
        beat(heartbeat, **changes)

    def watched_move(source: Path, target: Path) -> Path:
        if target.name == "last_fold0_0.safetensors" and target.exists():
            reach("rename of a state")
        if target.name == "oof_logits.npy":
            reach("merge")
        return move(source, target)

    def watched_predictions(*others: Any) -> None:
        reach("between best weights and part")
        write_predictions(*others)

    loop_room._take_step = watched_step
    Heartbeat.beat = watched_beat  # type: ignore[method-assign]
    Path.replace = watched_move  # type: ignore[method-assign, assignment]
    fold_room.write_predictions = watched_predictions  # type: ignore[attr-defined]


def _kill_ranks(fault: str, folder: Path) -> None:
    own = os.getpid()
    match fault:
        case "SIGKILL":
            os.kill(own, signal.SIGKILL)
        case "SIGSTOP, then SIGKILL":
            os.kill(own, signal.SIGSTOP)  # whoever started this process kills it
        case "SIGTERM":
            os.kill(own, signal.SIGTERM)
        case "SIGTERM three times":
            for _ in range(3):
                os.kill(own, signal.SIGTERM)
                time.sleep(_APART_S)
        case "disk full":
            free = os.statvfs(folder / "experiments")
            with suppress(OSError):  # a state may be being written, and take of what was free
                (folder / "experiments" / FILLER).write_bytes(bytes(free.f_bavail * free.f_frsize))
        case _:
            raise AssertionError(fault)
