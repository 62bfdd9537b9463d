"""`doccls.train` that is killed at a moment of its work: a step, a validation batch, or a file's way to the disk."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

from doccls.run.heartbeat import Heartbeat
from doccls.system import atomic_files as artifacts
from doccls.system.rank import rank_by_environment
from doccls.train import main


def die_at_a_moment(argv: list[str]) -> int:
    """The rank DOCCLS_TEST_RANK is killed at its moment DOCCLS_TEST_MOMENT (1 is the first); 0 counts them.

    Moments: before each beat of training or validating, each sync of a file and each rename into place.
    """
    last, moments = int(os.environ["DOCCLS_TEST_MOMENT"]), itertools.count(1)
    if rank_by_environment() == int(os.environ["DOCCLS_TEST_RANK"]):
        beat, sync, move = Heartbeat.beat, os.fsync, Path.replace

        def reach(what: str) -> None:
            number = next(moments)
            if last == 0:
                with Path(os.environ["DOCCLS_TEST_MOMENTS"]).open("a") as file:
                    file.write(f"{number} {what}\n")
            if number == last:
                os.kill(os.getpid(), signal.SIGKILL)

        def watched_beat(heartbeat: Heartbeat, **changes: Any) -> None:
            if changes.get("phase") in ("train", "validate"):
                reach(changes["phase"])
            beat(heartbeat, **changes)

        def watched_sync(descriptor: int) -> None:
            reach("sync")
            sync(descriptor)

        def watched_move(source: Path, target: Path) -> Path:
            if "ckpt" in target.parts or "oof" in target.parts or "metrics" in target.name:
                reach(f"rename to {target.name}")
            return move(source, target)

        Heartbeat.beat = watched_beat  # type: ignore[method-assign]
        artifacts.os.fsync = watched_sync  # type: ignore[attr-defined]
        Path.replace = watched_move  # type: ignore[method-assign, assignment]
    return main(argv)
