"""Supervision within a run of several processes: reports on failed peers, and the exit of a process that hangs.

A main thread inside a C call (NCCL, a copy from the GPU) receives no exception and runs no signal handler. So a
separate thread watches its progress by the heartbeat.
"""

import faulthandler
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from doccls.reporting.log import RunLog
from doccls.run.heartbeat import Beat, Cause, Heartbeat, await_failures, format_progress, read_beat
from doccls.system.clock import RunningClock
from doccls.system.signals import Interrupted, exit_immediately, stop_requested

_POLL_S = 1.0
# A peer's failure usually reaches the main thread within this time, as an exception that it reports: the connection
# breaks.
_EXCEPTION_GRACE_S = 5.0


@dataclass(frozen=True)
class Stall:
    """The time without progress of a process, and its reasons to exit, in seconds; None where a reason is absent."""

    silent_s: float
    failed_s: float | None  # since a peer's failure was seen
    stop_s: float | None  # since a signal requested a stop, of this rank or another one
    limit_s: float | None  # of the time without progress in the current phase
    stop_limit_s: float  # of the time between the signal and the exit


@contextmanager
def reporting_peers(peers: Mapping[int, Path], log: RunLog) -> Iterator[None]:
    """Log the failed peers if the block fails, perhaps because of one of them; `peers` are heartbeat paths by rank.

    Only the main process has peers; for the others the mapping is empty.
    """
    try:
        yield
    except Exception:
        await_failures(list(peers.values()))
        for line in describe_failed_peers(peers):
            log.line(line)
        raise


@contextmanager
def watching(
    heartbeat: Heartbeat, peers: Mapping[int, Path], limit_s: float | None, stop_limit_s: float
) -> Iterator[None]:
    """Exit with the reason if this process hangs within the block, where its main thread can't do so.

    It hangs if a peer failed and it makes no progress; if it trains or validates without a step for `limit_s`; or if it
    has not stopped `stop_limit_s` after a stop request. While it saves for a stop, only the last limit applies.
    """
    done = threading.Event()
    arguments = done, heartbeat, peers, limit_s, stop_limit_s
    thread = threading.Thread(target=_watch, args=arguments, name="doccls-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(
    done: threading.Event, heartbeat: Heartbeat, peers: Mapping[int, Path], limit_s: float | None, stop_limit_s: float
) -> None:
    clock = RunningClock()
    count, progress_s = -1, clock.read()
    failed_s: float | None = None
    stop_s: float | None = None
    while not done.wait(_POLL_S):
        now_s, last = clock.read(), heartbeat.last
        if last.count != count:
            count, progress_s, failed_s = last.count, now_s, None
        elif failed_s is None and any(beat.phase == "failed" for beat in _read_beats(peers).values()):
            failed_s = now_s
        if stop_s is None and stop_requested():
            stop_s = now_s
        stall = Stall(
            silent_s=now_s - progress_s,
            failed_s=None if failed_s is None or last.phase == "stopping" else now_s - failed_s,
            stop_s=None if stop_s is None else now_s - stop_s,
            limit_s=limit_s if last.phase in ("train", "validate") else None,
            stop_limit_s=stop_limit_s,
        )
        decision = decide_exit(stall, stop_requested(), format_progress(last))
        if decision is not None:
            _exit(heartbeat, *decision, describe_failed_peers(peers) + describe_running_peers(peers))


def decide_exit(stall: Stall, signum: int | None, progress: str) -> tuple[str, int] | None:
    """Return (reason, exit code) if the process has to exit, else None; `signum` is the stop signal, if any."""
    if stall.failed_s is not None and min(stall.failed_s, stall.silent_s) >= _EXCEPTION_GRACE_S:
        return f"a peer failed, and this process made no progress in {progress}", 1
    if stall.stop_s is not None and signum is not None and stall.stop_s >= stall.stop_limit_s:
        limit = f"{stall.stop_limit_s:g} s (train.stop_timeout_s)"
        return f"{Interrupted(signum)}, and this process had not stopped after {limit} in {progress}", 128 + signum
    if stall.limit_s is not None and stall.silent_s >= stall.limit_s:
        return f"no step for {stall.limit_s:g} s (train.collective_timeout_s) in {progress}", 1
    return None


def _exit(heartbeat: Heartbeat, reason: str, code: int, lines: list[str]) -> None:
    if code == 1:
        heartbeat.beat(phase="failed", cause=Cause.ERROR, error="TimeoutError", message=reason)
        faulthandler.dump_traceback(all_threads=True)
    else:
        heartbeat.beat(phase="stopped", message=reason)
    exit_immediately("\n".join([*lines, reason]), code)


def describe_failed_peers(peers: Mapping[int, Path]) -> list[str]:
    """Return a line for each peer that failed, or whose process disappeared without an error."""
    lines = []
    for rank, beat in _read_beats(peers).items():
        if beat.phase == "failed":
            lines.append(f"[RANK {rank}] on {beat.host} failed: {beat.error}: {beat.message}")
        elif beat.phase != "stopped" and not _is_alive(beat):
            lines.append(
                f"[RANK {rank}] on {beat.host} disappeared without an error (killed?), last seen in "
                f"{format_progress(beat)}"
            )
    return lines


def describe_running_peers(peers: Mapping[int, Path]) -> list[str]:
    """Return a line with the progress of each peer that is still running."""
    return [
        f"[RANK {rank}] on {beat.host} was last heard from at "
        f"{time.strftime('%H:%M:%S', time.localtime(beat.time_s))}, in {format_progress(beat)}"
        for rank, beat in _read_beats(peers).items()
        if beat.phase not in ("failed", "stopped") and _is_alive(beat)
    ]


def _read_beats(peers: Mapping[int, Path]) -> dict[int, Beat]:
    beats = {rank: read_beat(path) for rank, path in peers.items()}
    return {rank: beat for rank, beat in beats.items() if beat is not None}


def _is_alive(beat: Beat) -> bool:
    """Return whether the process is alive; a process on another machine counts as alive."""
    if beat.host != socket.gethostname():
        return True
    try:
        return psutil.Process(beat.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
