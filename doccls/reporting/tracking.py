"""Tracking behind one small interface: one W&B group a run, one W&B run a fold; it never stops nor delays training.

W&B works in a process of its own (`doccls.reporting.wandb_process`). It is told through a pipe that nobody waits for.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from doccls.config.schema import Config
from doccls.reporting.log import RunLog
from doccls.reporting.wandb_process import FINISH_S, WandbRun
from doccls.system.signals import stop_requested

_MARGIN_S = 5.0
"""The process gives up by itself after FINISH_S."""
_FAILURE_S = 5.0
"""How long a fold that failed or was stopped waits for it; it goes on alone, as far as the machine lets it."""
_LOOK_S = 0.05
_MOST_UNREAD_BYTES = 2**20
"""What is kept for a process that does not read, beside what the pipe holds: 15,000 steps."""


class Tracker(Protocol):
    """Takes one fold's numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at an optimizer step."""


class _NoTracker:
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Nothing is tracked."""


class _WandbTracker:
    """Tells the process that has W&B, and logs what it says. If that is lost, it is said once and training goes on."""

    def __init__(self, run: WandbRun, log: RunLog) -> None:
        self._log = log
        self._said = b""
        self._unread = bytearray()
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "doccls.reporting.wandb_process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        self._tell(asdict(run))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tell({"values": dict(values), "step": step})
        self._hear()

    def finish(self, exit_code: int, within_s: float) -> None:
        """The last word; it is waited for at most so long, and then goes on alone."""
        self._tell({"exit_code": exit_code})
        end_s = time.monotonic() + within_s
        while self._process is not None and self._process.poll() is None and time.monotonic() < end_s:
            if stop_requested():
                end_s = min(end_s, time.monotonic() + _FAILURE_S)
            self._write()
            time.sleep(_LOOK_S)
        self._hear()

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self._process is not None:
            self._unread += f"{json.dumps(message)}\n".encode()
            self._write()

    def _write(self) -> None:
        """As much as the pipe takes at once."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            while self._unread:
                del self._unread[: os.write(self._process.stdin.fileno(), self._unread)]
        except BlockingIOError:
            if len(self._unread) > _MOST_UNREAD_BYTES:
                self._lose("it does not read")
        except OSError as error:
            self._lose(str(error.strerror))

    def _lose(self, reason: str) -> None:
        assert self._process is not None
        self._hear()
        self._log.line(f"[TRACKING] W&B's process is lost ({reason}); training goes on without it")
        self._process.kill()
        self._process.wait()
        self._process = None

    def _hear(self) -> None:
        """Log the lines that it has said meanwhile."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        with suppress(BlockingIOError):
            while said := os.read(self._process.stdout.fileno(), 65536):
                self._said += said
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            self._log.line(f"[TRACKING] {line.decode(errors='replace')}")


@contextmanager
def track_fold(config: Config, run_dir: Path | None, fold: int, log: RunLog) -> Iterator[Tracker]:
    """A tracker for one fold; `run_dir` None (every process but the main one) tracks nothing."""
    if run_dir is None or not config.tracking.wandb:
        yield _NoTracker()
        return
    run = WandbRun(
        project=config.tracking.project or config.project.name,
        entity=config.tracking.entity,
        group=run_dir.name,
        name=f"{run_dir.name}-fold{fold}",
        config=config.model_dump(mode="json", exclude={"provenance"}) | {"fold": fold},
        folder=str(run_dir),
    )
    tracker = _WandbTracker(run, log)
    try:
        yield tracker
    except BaseException:
        tracker.finish(1, _FAILURE_S)
        raise
    tracker.finish(0, FINISH_S + _MARGIN_S)
