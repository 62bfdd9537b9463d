"""Several processes of one run: what became of the others, and the end of one that waits for them in vain.

A main thread that stands in a C call (NCCL, a copy from the GPU) meets no exception and runs no signal handler. So a
thread of its own looks whether it goes on, by its heartbeat.
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
from doccls.system.signals import Interrupted, end_now, stop_requested

_LOOK_S = 1.0
_HEARING_S = 5.0
"""Of a peer's failure the main thread hears as an exception (its connection breaks), if it can; then it tells."""


@dataclass(frozen=True)
class Standstill:
    """How long, in seconds, a process has not gone on, and since when there is a reason to leave; None is none."""

    silent_s: float
    failed_s: float | None
    """Since a peer was seen to have failed."""
    stop_s: float | None
    """Since a signal asked for the end, here or of another rank."""
    limit_s: float | None
    """How long it may stand still where it stands."""
    stop_limit_s: float
    """How long it may take to leave."""


@contextmanager
def reporting_peers(peers: Mapping[int, Path], log: RunLog) -> Iterator[None]:
    """If the block fails, perhaps for want of a peer, the log says what became of each: `peers` are heartbeats by rank.

    The main process has peers; for the others it is empty.
    """
    try:
        yield
    except Exception:
        await_failures(list(peers.values()))
        for line in describe_lost(peers):
            log.line(line)
        raise


@contextmanager
def watching(
    heartbeat: Heartbeat, peers: Mapping[int, Path], limit_s: float | None, stop_limit_s: float
) -> Iterator[None]:
    """While the block runs, a process is ended, and says why, where its main thread can't end it.

    That is: a peer failed and this process stands still; it trains or validates without a step for `limit_s`; or it was
    asked to stop and has not left after `stop_limit_s`. While it saves its state for a stop, only that limit counts.
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
    count, moved_s = -1, clock.read()
    failed_s: float | None = None
    stop_s: float | None = None
    while not done.wait(_LOOK_S):
        now_s, last = clock.read(), heartbeat.last
        if last.count != count:
            count, moved_s, failed_s = last.count, now_s, None
        elif failed_s is None and any(beat.phase == "failed" for beat in _read(peers).values()):
            failed_s = now_s
        if stop_s is None and stop_requested():
            stop_s = now_s
        seen = Standstill(
            silent_s=now_s - moved_s,
            failed_s=None if failed_s is None or last.phase == "stopping" else now_s - failed_s,
            stop_s=None if stop_s is None else now_s - stop_s,
            limit_s=limit_s if last.phase in ("train", "validate") else None,
            stop_limit_s=stop_limit_s,
        )
        ended = judge(seen, stop_requested(), format_progress(last))
        if ended is not None:
            _end(heartbeat, *ended, describe_lost(peers) + describe_silent(peers))


def judge(seen: Standstill, stop: int | None, place: str) -> tuple[str, int] | None:
    """(reason, exit code) of a process that is to end; None if it may go on. `stop` is the signal that asked."""
    if seen.failed_s is not None and min(seen.failed_s, seen.silent_s) >= _HEARING_S:
        return f"a peer failed, and this process stood still in {place}", 1
    if seen.stop_s is not None and stop is not None and seen.stop_s >= seen.stop_limit_s:
        limit = f"{seen.stop_limit_s:g} s (train.stop_timeout_s)"
        return f"{Interrupted(stop)}, and this process had not left after {limit}: it was in {place}", 128 + stop
    if seen.limit_s is not None and seen.silent_s >= seen.limit_s:
        return f"no step for {seen.limit_s:g} s (train.collective_timeout_s) in {place}", 1
    return None


def _end(heartbeat: Heartbeat, reason: str, code: int, lines: list[str]) -> None:
    if code == 1:
        heartbeat.beat(phase="failed", cause=Cause.ERROR, error="TimeoutError", message=reason)
        faulthandler.dump_traceback(all_threads=True)
    else:
        heartbeat.beat(phase="stopped", message=reason)
    end_now("\n".join([*lines, reason]), code)


def describe_lost(peers: Mapping[int, Path]) -> list[str]:
    """A line for each peer that failed, or whose process is gone without a word."""
    lines = []
    for rank, beat in _read(peers).items():
        if beat.phase == "failed":
            lines.append(f"[RANK {rank}] on {beat.host} failed: {beat.error}: {beat.message}")
        elif beat.phase != "stopped" and not _lives(beat):
            lines.append(
                f"[RANK {rank}] on {beat.host} is gone without a word (killed?), last seen in {format_progress(beat)}"
            )
    return lines


def describe_silent(peers: Mapping[int, Path]) -> list[str]:
    """A line for each peer that has neither failed nor gone: where it is."""
    return [
        f"[RANK {rank}] on {beat.host} was last heard of at {time.strftime('%H:%M:%S', time.localtime(beat.time_s))}, "
        f"in {format_progress(beat)}"
        for rank, beat in _read(peers).items()
        if beat.phase not in ("failed", "stopped") and _lives(beat)
    ]


def _read(peers: Mapping[int, Path]) -> dict[int, Beat]:
    found = {rank: read_beat(path) for rank, path in peers.items()}
    return {rank: beat for rank, beat in found.items() if beat is not None}


def _lives(beat: Beat) -> bool:
    """Whether the process does, as far as it is to be seen: one on another machine does."""
    if beat.host != socket.gethostname():
        return True
    try:
        return psutil.Process(beat.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
