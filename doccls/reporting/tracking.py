"""Experiment tracking with one W&B group per run and one W&B run per fold; it never stops or delays training.

W&B runs in a separate process (`doccls.reporting.wandb_process`), which receives messages through a non-blocking pipe.
"""

import hashlib
import json
import os
import re
import secrets
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
from doccls.system.atomic_files import read_text, write_text
from doccls.system.signals import stop_requested

_MARGIN_S = 5.0  # on top of FINISH_S, after which the process gives up by itself
_FAILURE_S = 5.0  # how long a failed or stopped fold waits for the process, which may then continue alone
_POLL_S = 0.05
_ID_LENGTH = 16
_TOKEN = re.compile("[0-9a-f]{16}")
_MAX_UNSENT_BYTES = 2**20  # buffer, beyond the pipe's, for a process that does not read: 15,000 steps


class Tracker(Protocol):
    """A receiver of one fold's metrics."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values at an optimizer step."""


class _NoTracker:
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""


class _WandbTracker:
    """Connection to the W&B process, whose output it logs; if the process is lost, training continues without it."""

    def __init__(self, run: WandbRun, log: RunLog) -> None:
        self._log = log
        self._received = b""
        self._unsent = bytearray()
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "doccls.reporting.wandb_process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        self._send(asdict(run))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._send({"values": dict(values), "step": step})
        self._log_output()

    def finish(self, exit_code: int, within_s: float) -> None:
        """Send the exit code and wait up to `within_s` seconds for the process, which may then continue alone."""
        self._send({"exit_code": exit_code})
        end_s = time.monotonic() + within_s
        while self._process is not None and self._process.poll() is None and time.monotonic() < end_s:
            if stop_requested():
                end_s = min(end_s, time.monotonic() + _FAILURE_S)
            self._write()
            time.sleep(_POLL_S)
        self._log_output()

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process is not None:
            self._unsent += f"{json.dumps(message)}\n".encode()
            self._write()

    def _write(self) -> None:
        """Write as much as the pipe takes without blocking."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            while self._unsent:
                del self._unsent[: os.write(self._process.stdin.fileno(), self._unsent)]
        except BlockingIOError:
            if len(self._unsent) > _MAX_UNSENT_BYTES:
                self._give_up("it does not read its input")
        except OSError as error:
            self._give_up(str(error.strerror))

    def _give_up(self, reason: str) -> None:
        assert self._process is not None
        self._log_output()
        self._log.line(f"[TRACKING] lost the W&B process ({reason}); training continues without it")
        self._process.kill()
        self._process.wait()
        self._process = None

    def _log_output(self) -> None:
        """Log the lines that the process has printed since the last call."""
        if self._process is None:
            return
        assert self._process.stdout is not None
        with suppress(BlockingIOError):
            while chunk := os.read(self._process.stdout.fileno(), 65536):
                self._received += chunk
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._log.line(f"[TRACKING] {line.decode(errors='replace')}")


@contextmanager
def track_fold(config: Config, run_dir: Path | None, fold: int, fingerprint: str, log: RunLog) -> Iterator[Tracker]:
    """Yield a tracker for one fold; with `run_dir` None (every process but the main one) it tracks nothing.

    A restart of the fold continues its W&B run.
    """
    if run_dir is None or not config.tracking.wandb:
        yield _NoTracker()
        return
    run = WandbRun(
        id=_derive_id(_keep_token(run_dir / "wandb" / f"fold{fold}.token", log), fingerprint),
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


def _keep_token(path: Path, log: RunLog) -> str:
    """Return the fold's random token, which its first start writes to the file: run IDs repeat in a W&B project."""
    with suppress(OSError, UnicodeDecodeError):
        earlier = read_text(path).strip()
        if _TOKEN.fullmatch(earlier):
            return earlier
    token = secrets.token_hex(8)
    try:
        write_text(path, f"{token}\n")
    except OSError as error:
        log.line(f"[TRACKING] {error}: a restart of this fold will begin another W&B run")
    return token


def _derive_id(token: str, fingerprint: str) -> str:
    """Return the ID of the W&B run of a fold: one of another config is another run."""
    return hashlib.sha256(f"{token}/{fingerprint}".encode()).hexdigest()[:_ID_LENGTH]
