"""`doccls.train`, killed at a given moment: at a step, at a validation batch, or while it writes a file."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

from doccls.run.heartbeat import Heartbeat
from doccls.system import atomic_files
from doccls.system.rank import rank_by_environment
from doccls.train import main


def kill_at_moment(argv: list[str]) -> int:
    """Train; kill rank DOCCLS_TEST_RANK at its moment number DOCCLS_TEST_MOMENT (from 1); 0 only lists the moments.

    Moments are before each heartbeat in training or validation, each fsync of a file and each rename into place.
    """
    wanted, moments = int(os.environ["DOCCLS_TEST_MOMENT"]), itertools.count(1)
    if rank_by_environment() == int(os.environ["DOCCLS_TEST_RANK"]):
        beat, sync, rename = Heartbeat.beat, os.fsync, Path.replace

        def reach(event: str) -> None:
            number = next(moments)
            if wanted == 0:
                with Path(os.environ["DOCCLS_TEST_MOMENTS"]).open("a") as file:
                    file.write(f"{number} {event}\n")
            if number == wanted:
                os.kill(os.getpid(), signal.SIGKILL)

        def beat_at_moment(heartbeat: Heartbeat, **changes: Any) -> None:
            if changes.get("phase") in ("train", "validate"):
                reach(changes["phase"])
            beat(heartbeat, **changes)

        def sync_at_moment(descriptor: int) -> None:
            reach("sync")
            sync(descriptor)

        def rename_at_moment(source: Path, target: Path) -> Path:
            if "ckpt" in target.parts or "oof" in target.parts or "metrics" in target.name:
                reach(f"rename to {target.name}")
            return rename(source, target)

        Heartbeat.beat = beat_at_moment  # type: ignore[method-assign]
        atomic_files.os.fsync = sync_at_moment  # type: ignore[attr-defined]
        Path.replace = rename_at_moment  # type: ignore[method-assign, assignment]
    return main(argv)
