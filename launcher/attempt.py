"""One attempt at a fold: its processes, their heartbeats, hang detection, and the outcome when they have ended."""

import re
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from doccls.run.heartbeat import Beat, Cause, format_progress, has_begun, read_beat
from doccls.run.paths import RunPaths
from doccls.system.clock import RunningClock
from doccls.system.lock import LockError, find_holder
from launcher.local import KILL_LIMIT_S, LAUNCH, Backend
from launcher.plan import Assignment
from launcher.supervise import STOP_CODES, Ending, Outcome, classify_exit

# The other ranks may run on for this long after one has ended: they may be about to report the reason.
_SIBLING_GRACE_S = 5.0
# The launcher waits this much longer for a stop than the ranks themselves, which report why they end.
_STOP_MARGIN_S = 10.0
_POLL_S = 0.5  # between two reads of the heartbeats
# Limit for imports, the scan of the data and the download of weights, during which there is no heartbeat.
_START_LIMIT_S = 3600.0
# The same once another fold of the launch has begun: by then the data is scanned and the weights are downloaded.
_LATER_START_LIMIT_S = 600.0
_TAIL_LINES = 5
_SIGNALLED = 128  # the exit code of a process that stops at a signal is this plus the signal's number
_LOG_STARTED = ">> Logger started: "
_FAILED = re.compile(r"\[EXIT\]\[ERROR\] (?:training failed: |rank \d+ (?:on \S+ )?failed: )?(.*)")


@dataclass(frozen=True)
class Limits:
    """Time limits for the ranks of a fold, in seconds."""

    hang_s: float  # without progress, once they train (--hang-timeout); 0 is no limit
    stop_s: float  # from a request to stop to their end (train.stop_timeout_s)


class RunningFold:
    """The processes of one attempt, and the progress that the launcher has observed."""

    def __init__(self, assignment: Assignment, paths: RunPaths, backend: Backend, limits: Limits) -> None:
        """Start the processes.

        Raises:
            StartError: a process can't be started.
        """
        fold, self._ranks = assignment.fold, range(len(assignment.ranks))
        self._limits, self._stop_requested_s = limits, float("inf")
        self._clock = RunningClock()
        self._first_end_s: float | None = None
        self._killed_s: float | None = None  # time of the first SIGKILL
        self._heartbeats = [paths.heartbeat(fold, rank) for rank in self._ranks]
        # Beats of the attempt before: the files stay, since the fold derives from them how much work it repeats.
        self._beats_before = [read_beat(heartbeat) for heartbeat in self._heartbeats]
        self._lock = paths.fold_lock(fold)
        self._checkpoints = paths.resume_checkpoints(fold)
        self._saves_before = _list_saves(self._checkpoints)
        self._consoles = [paths.console(fold, rank) for rank in self._ranks]
        self._console_offsets = [_measure_bytes(console) for console in self._consoles]
        self.processes = backend.start(assignment, self._consoles)
        self._hang_message: str | None = None
        self._beat_counts = [0 for _ in self._ranks]
        self._progress_s = [self._clock.read() for _ in self._ranks]  # when a rank's beat count last changed
        self._polled_s = self._clock.read()
        self._another_began_s: float | None = None
        self.has_begun = False  # whether a rank was seen to train

    def request_stop(self) -> None:
        """Ask each rank to stop at its next safe point; `has_ended` kills those that take too long."""
        self._stop_requested_s = min(self._stop_requested_s, self._clock.read())
        self.processes.terminate()

    def has_ended(self, another_has_begun: bool = False) -> bool:
        """Return whether all ranks have exited or can't be killed.

        Call it often: it kills hung ranks, and the siblings of a rank that has ended. `another_has_begun` says that
        another fold of the launch has begun to train.
        """
        now_s, codes = self._clock.read(), self.processes.poll()
        if None not in codes:
            return True
        if self._first_end_s is None and self.processes.ended:
            self._first_end_s = now_s
        if self._hang_message is not None:
            self._kill_ranks(now_s)
        elif self._first_end_s is not None:
            is_stopping = not STOP_CODES.isdisjoint(codes)  # rank 0 may still write the resume checkpoint
            since_s = min(self._stop_requested_s, self._first_end_s) if is_stopping else self._first_end_s
            if now_s - since_s > (self._stop_limit_s if is_stopping else _SIBLING_GRACE_S):
                self._kill_ranks(now_s)
        elif now_s - self._polled_s >= _POLL_S:
            self._polled_s = now_s
            self._hang_message = self._detect_hang(now_s, another_has_begun)
            if self._hang_message is not None:
                self.processes.dump_stacks()
                self._kill_ranks(now_s)
        return self._killed_s is not None and now_s - self._killed_s > KILL_LIMIT_S

    def _kill_ranks(self, now_s: float) -> None:
        self.processes.kill()
        if self._killed_s is None:
            self._killed_s = now_s

    @property
    def _stop_limit_s(self) -> float:
        return self._limits.stop_s + _STOP_MARGIN_S

    @property
    def has_advanced(self) -> bool:
        """Whether this attempt saved a resume checkpoint for the next one."""
        return _list_saves(self._checkpoints) - self._saves_before != set()

    def conclude(self, done: bool, stopping: bool) -> tuple[Ending, str]:
        """Return how the attempt ended, and the reason as a message. `done`: valid predictions of the fold exist."""
        codes, beats = self.processes.poll(), self._read_beats()
        causes = [beat.cause if beat else None for beat in beats]
        if None in codes:
            return Ending(Outcome.DONE if done else Outcome.UNKILLABLE, is_stuck=True), self._format_unkillable(codes)
        outcome = classify_exit(codes, causes, done, self._hang_message is not None, stopping, self.has_advanced)
        if outcome in (Outcome.DONE, Outcome.STOPPED):
            return Ending(outcome), str(outcome)
        if self._hang_message is not None:
            return Ending(outcome), self._hang_message
        with suppress(LockError):  # a file server that does not answer
            owner = find_holder(self._lock)
            if owner is not None and owner.launch != LAUNCH:  # the heartbeats may be those of the owner
                return Ending(Outcome.USER_ERROR), str(owner)
        rank = self._find_culprit(codes, causes)
        return self._describe_failure(outcome, rank, codes[rank], beats[rank])

    def _describe_failure(self, outcome: Outcome, rank: int, code: int | None, beat: Beat | None) -> tuple[Ending, str]:
        """Return the ending with the error that the rank printed, or else with its exit code and last lines."""
        console = self._read_console(rank)
        assert code is not None
        errors = _FAILED.findall(console)
        if code > 0 and beat is not None and beat.cause is not None:
            is_permanent = beat.cause is not Cause.DOWNLOAD_FAILED
            error = f"{beat.error} after step {beat.step} of fold {beat.fold}" if is_permanent else None
            message = errors[-1] if errors else f"{beat.error}: {beat.message}"
            return Ending(outcome, error), self._prefix_rank(rank, message)
        if code > 0 and errors:
            # A stop at somebody's request is no error of the fold: it may well happen several times.
            error = None if code > _SIGNALLED else errors[-1]
            return Ending(outcome, error), self._prefix_rank(rank, errors[-1])
        progress = f", last seen in {format_progress(beat)}" if beat is not None else ""
        lines = (console or self._read_console(0)).splitlines()[-_TAIL_LINES:]  # mostly only rank 0 prints
        lines += self.processes.read_messages().splitlines()[-_TAIL_LINES:]
        tail = "".join(f"\n  | {line}" for line in lines)
        return Ending(outcome), f"rank {rank} {format_exit_code(code)}{progress}; its last lines:{tail or ' none'}"

    def _format_unkillable(self, codes: Sequence[int | None]) -> str:
        ranks = ", ".join(f"rank {rank}" for rank, code in enumerate(codes) if code is None)
        reason = f" ({self._hang_message})" if self._hang_message is not None else ""
        return (
            f"{ranks} could not be killed within {KILL_LIMIT_S:g} s{reason}: the driver of its GPU or a file server "
            f"does not answer (see: ps -o pid,stat,wchan -p {','.join(map(str, self.processes.pids))}; dmesg)"
        )

    def _find_culprit(self, codes: Sequence[int | None], causes: Sequence[Cause | None]) -> int:
        """Return the rank that explains the failure: the one with the most specific cause, else the first that failed.

        Ranks that were asked to stop do so together, and rank 0 reports the reason for all.
        """
        for cause in (Cause.USER_ERROR, Cause.PORT_TAKEN, Cause.OUT_OF_MEMORY, Cause.MEMORY_TAKEN):
            if cause in causes:
                return causes.index(cause)
        first = next((rank for rank in self.processes.ended if codes[rank]), 0)
        code = codes[first]
        stopped_together = code is not None and code > _SIGNALLED and codes[0] == code
        return 0 if stopped_together else first

    def find_log(self) -> Path:
        """Return the path of the fold's log, or of its console output if no log was started."""
        return find_log_name(self._read_console(0)) or self._consoles[0]

    def _prefix_rank(self, rank: int, message: str) -> str:
        return f"rank {rank}: {message}" if len(self._ranks) > 1 else message

    def _read_beats(self) -> list[Beat | None]:
        beats = [read_beat(heartbeat) for heartbeat in self._heartbeats]
        return [None if beat == old else beat for beat, old in zip(beats, self._beats_before, strict=True)]

    def _read_console(self, rank: int) -> str:
        """Return the output of the rank in this attempt."""
        try:
            with self._consoles[rank].open("rb") as file:
                file.seek(self._console_offsets[rank])
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _update_progress(self, now_s: float) -> list[Beat | None]:
        """Return each rank's last beat, and record when its count changed."""
        beats = self._read_beats()
        for rank, beat in enumerate(beats):
            count = beat.count if beat else 0
            if self._beat_counts[rank] != count:
                self._beat_counts[rank], self._progress_s[rank] = count, now_s
        self.has_begun |= any(has_begun(beat) for beat in beats)
        return beats

    def _detect_hang(self, now_s: float, another_has_begun: bool) -> str | None:
        """Return a message if a rank has made no progress for too long; in a collective its siblings hang with it.

        For a fold that was asked to stop, only the limit of the stop counts.
        """
        beats = self._update_progress(now_s)
        idle_s = [now_s - progress_s for progress_s in self._progress_s]
        hang_s, start_s, stop_s = self._limits.hang_s, self._limit_start(now_s, another_has_begun), self._stop_limit_s
        limits_s = {"start": start_s, "stopping": stop_s}
        phases = ["start" if beat is None else beat.phase for beat in beats]
        overdue = {phase for phase, time_s in zip(phases, idle_s, strict=True) if time_s > limits_s.get(phase, hang_s)}
        if now_s - self._stop_requested_s > stop_s or "stopping" in overdue:
            problem = f"not stopped within {stop_s:g} s (train.stop_timeout_s + {_STOP_MARGIN_S:g} s)"
        elif self._stop_requested_s < now_s or not hang_s or not overdue:
            return None
        elif overdue == {"start"}:
            problem = f"training did not begin within {start_s:g} s"
        else:
            problem = f"no progress within {hang_s:g} s (--hang-timeout)"
        return self._describe_hang(problem, idle_s, beats)

    def _limit_start(self, now_s: float, another_has_begun: bool) -> float:
        """Return the limit of a start in seconds: it falls some time after another fold has begun."""
        if another_has_begun and self._another_began_s is None:
            self._another_began_s = now_s
        if self._another_began_s is not None and now_s - self._another_began_s > _LATER_START_LIMIT_S:
            return _LATER_START_LIMIT_S
        return max(self._limits.hang_s, _START_LIMIT_S)

    def _describe_hang(self, problem: str, idle_s: Sequence[float], beats: Sequence[Beat | None]) -> str:
        ranks = ", ".join(
            f"rank {rank} {time_s:.1f} s since {format_progress(beat)}{_format_process_status(beat)}"
            for rank, (time_s, beat) in enumerate(zip(idle_s, beats, strict=True))
        )
        stacks = ", ".join(map(str, self._consoles))
        return f"{problem} on {socket.gethostname()}: {ranks}; stacks -> {stacks}"


def _format_process_status(beat: Beat | None) -> str:
    """Return the status of a suspended process, to tell it from siblings that only wait for it in a collective."""
    if beat is not None and beat.host == socket.gethostname():
        with suppress(psutil.Error):
            status = psutil.Process(beat.pid).status()
            if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP):
                return f" ({status})"
    return ""


def find_log_name(console: str) -> Path | None:
    """Return the path of the last log that was started by a process with this console output; None if none was."""
    started = [line for line in console.splitlines() if line.startswith(_LOG_STARTED)]
    return Path(started[-1].removeprefix(_LOG_STARTED)) if started else None


def format_exit_code(code: int) -> str:
    """Describe an exit code, which is minus the signal's number if a signal killed the process."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _list_saves(checkpoints: Sequence[Path]) -> set[tuple[Path, int]]:
    """Return the existing checkpoints with their modification times in nanoseconds."""
    saves = set()
    for path in checkpoints:
        with suppress(OSError):
            saves.add((path, path.stat().st_mtime_ns))
    return saves


def _measure_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
