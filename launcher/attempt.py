"""One attempt at a fold while it runs: its processes, their heartbeats, and what their end meant."""

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
from launcher.supervise import STOP_CODES, Ending, Outcome, judge

_SIBLING_GRACE_S = 5.0
"""How long the other ranks may outlive one that ended: they may be about to say why."""
_STOP_MARGIN_S = 10.0
"""By which the launcher waits longer for a stop than the ranks themselves, which say why they end."""
_LOOK_S = 0.5
"""Between two looks at heartbeats."""
_START_LIMIT_S = 3600.0
"""How long imports, a scan of the data and weights from the hub may take, where nothing beats."""
_LATER_START_LIMIT_S = 600.0
"""The same once another fold of the launch has begun: the data is scanned then, and the weights are here."""
_TAIL_LINES = 5
_SIGNALLED = 128
"""Exit codes above: this and the number of the signal that was heeded."""
_LOG_STARTED = ">> Logger started: "
_FAILED = re.compile(r"\[EXIT\]\[ERROR\] (?:training failed: |rank \d+ (?:on \S+ )?failed: )?(.*)")


@dataclass(frozen=True)
class Limits:
    """How long the ranks of a fold may take, in seconds."""

    hang_s: float
    """Without progress, once they train (--hang-timeout); 0 is for ever."""
    stop_s: float
    """From a request to stop to their end (train.stop_timeout_s)."""


class RunningFold:
    """The processes of one attempt, and what the launcher has seen of them."""

    def __init__(self, assignment: Assignment, paths: RunPaths, backend: Backend, limits: Limits) -> None:
        """Starts them.

        Raises:
            StartError: they can't be started.
        """
        fold, self._ranks = assignment.fold, range(len(assignment.ranks))
        self._limits, self._asked_s = limits, float("inf")
        self._clock = RunningClock()
        self._first_end_s: float | None = None
        self._struck_s: float | None = None
        """When its processes were first sent SIGKILL."""
        self._heartbeats = [paths.heartbeat(fold, rank) for rank in self._ranks]
        self._beats_before = [read_beat(heartbeat) for heartbeat in self._heartbeats]
        """Of an attempt before: the fold tells by them how much of its work is done again."""
        self._lock = paths.fold_lock(fold)
        self._states = paths.resume_checkpoints(fold)
        self._states_before = _find_changes(self._states)
        self._consoles = [paths.console(fold, rank) for rank in self._ranks]
        self._told_before = [_measure(console) for console in self._consoles]
        self.processes = backend.start(assignment, self._consoles)
        self._silence: str | None = None
        self._beat_counts = [0 for _ in self._ranks]
        self._moved_s = [self._clock.read() for _ in self._ranks]
        """When, on this clock, a rank's beat count was seen to change."""
        self._looked_s = self._clock.read()
        self._another_began_s: float | None = None
        self.has_begun = False
        """Whether a rank was seen to train."""

    def ask_to_leave(self) -> None:
        """Ask each rank to leave at its next safe point; `has_ended` kills those that take too long."""
        self._asked_s = min(self._asked_s, self._clock.read())
        self.processes.terminate()

    def has_ended(self, another_has_begun: bool = False) -> bool:
        """Whether all ranks are gone, or can't be killed; call often, since it kills those that should be gone:
        siblings of one that is, and silent ones.

        `another_has_begun` says that another fold of the launch has begun to train.
        """
        now_s, codes = self._clock.read(), self.processes.poll()
        if None not in codes:
            return True
        if self._first_end_s is None and self.processes.ended:
            self._first_end_s = now_s
        if self._silence is not None:
            self._kill_ranks(now_s)
        elif self._first_end_s is not None:
            leaving = not STOP_CODES.isdisjoint(codes)  # the main process may still write the state
            since_s = min(self._asked_s, self._first_end_s) if leaving else self._first_end_s
            if now_s - since_s > (self._stop_limit_s if leaving else _SIBLING_GRACE_S):
                self._kill_ranks(now_s)
        elif now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self._silence = self._find_silence(now_s, another_has_begun)
            if self._silence is not None:
                self.processes.dump_stacks()
                self._kill_ranks(now_s)
        return self._struck_s is not None and now_s - self._struck_s > KILL_LIMIT_S

    def _kill_ranks(self, now_s: float) -> None:
        self.processes.kill()
        if self._struck_s is None:
            self._struck_s = now_s

    @property
    def _stop_limit_s(self) -> float:
        return self._limits.stop_s + _STOP_MARGIN_S

    @property
    def has_advanced(self) -> bool:
        """Whether a state was saved in this attempt, from which the next one goes on."""
        return _find_changes(self._states) - self._states_before != set()

    def conclude(self, done: bool, stopping: bool) -> tuple[Ending, str]:
        """How the attempt ended, and why, in words. `done`: the fold's part is there and valid."""
        codes, beats = self.processes.poll(), self._read_beats()
        causes = [beat.cause if beat else None for beat in beats]
        if None in codes:
            return Ending(Outcome.DONE if done else Outcome.UNKILLABLE, stays=True), self._format_living(codes)
        outcome = judge(codes, causes, done, self._silence is not None, stopping, self.has_advanced)
        if outcome in (Outcome.DONE, Outcome.STOPPED):
            return Ending(outcome), str(outcome)
        if self._silence is not None:
            return Ending(outcome), self._silence
        with suppress(LockError):  # a file server that does not answer
            owner = find_holder(self._lock)
            if owner is not None and owner.launch != LAUNCH:  # these may be its heartbeats
                return Ending(Outcome.USER_ERROR), str(owner)
        rank = self._find_culprit(codes, causes)
        return self._describe_failure(outcome, rank, codes[rank], beats[rank])

    def _describe_failure(self, outcome: Outcome, rank: int, code: int | None, beat: Beat | None) -> tuple[Ending, str]:
        """What the rank that is to be heard said, or how it ended."""
        console = self._read_console(rank)
        assert code is not None
        said = _FAILED.findall(console)
        if code > 0 and beat is not None and beat.cause is not None:
            comes_back = beat.cause is not Cause.DOWNLOAD_FAILED
            error = f"{beat.error} after step {beat.step} of fold {beat.fold}" if comes_back else None
            return Ending(outcome, error), self._name(rank, said[-1] if said else f"{beat.error}: {beat.message}")
        if code > 0 and said:
            asked_to_leave = code > _SIGNALLED  # by somebody, and perhaps again: no error of its own
            return Ending(outcome, None if asked_to_leave else said[-1]), self._name(rank, said[-1])
        where = f", last seen in {format_progress(beat)}" if beat is not None else ""
        last = (console or self._read_console(0)).splitlines()[-_TAIL_LINES:]  # rank 0 says what all do
        tail = "".join(f"\n  | {line}" for line in [*last, *self.processes.tell().splitlines()[-_TAIL_LINES:]])
        return Ending(outcome), f"rank {rank} {format_exit_code(code)}{where}; its last lines:{tail or ' none'}"

    def _format_living(self, codes: Sequence[int | None]) -> str:
        ranks = ", ".join(f"rank {rank}" for rank, code in enumerate(codes) if code is None)
        pids = " ".join(map(str, self.processes.pids))
        why = f" ({self._silence})" if self._silence is not None else ""
        return (
            f"{ranks} could not be killed within {KILL_LIMIT_S:g} s{why}: the driver of its GPU or a file server does "
            f"not answer (see: ps -o pid,stat,wchan -p {pids.replace(' ', ',')}; dmesg)"
        )

    def _find_culprit(self, codes: Sequence[int | None], causes: Sequence[Cause | None]) -> int:
        """The rank to be heard: one that says what went wrong, else the first that was seen to fail.

        Ranks that were asked to leave do so together, and the main process says why for all.
        """
        for cause in (Cause.USER_ERROR, Cause.PORT_TAKEN, Cause.OUT_OF_MEMORY, Cause.MEMORY_TAKEN):
            if cause in causes:
                return causes.index(cause)
        first = next((rank for rank in self.processes.ended if codes[rank]), 0)
        code = codes[first]
        left_together = code is not None and code > _SIGNALLED and codes[0] == code
        return 0 if left_together else first

    def find_log(self) -> Path:
        """The fold's log, or what the process printed if it did not come so far."""
        started = [line for line in self._read_console(0).splitlines() if line.startswith(_LOG_STARTED)]
        return Path(started[-1].removeprefix(_LOG_STARTED)) if started else self._consoles[0]

    def _name(self, rank: int, word: str) -> str:
        return f"rank {rank}: {word}" if len(self._ranks) > 1 else word

    def _read_beats(self) -> list[Beat | None]:
        beats = [read_beat(heartbeat) for heartbeat in self._heartbeats]
        return [None if beat == old else beat for beat, old in zip(beats, self._beats_before, strict=True)]

    def _read_console(self, rank: int) -> str:
        """What the rank printed in this attempt."""
        try:
            with self._consoles[rank].open("rb") as file:
                file.seek(self._told_before[rank])
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _note_beats(self, now_s: float) -> list[Beat | None]:
        """Each rank's last beat; when it moved on is noted."""
        beats = self._read_beats()
        for rank, beat in enumerate(beats):
            count = beat.count if beat else 0
            if self._beat_counts[rank] != count:
                self._beat_counts[rank], self._moved_s[rank] = count, now_s
        self.has_begun |= any(has_begun(beat) for beat in beats)
        return beats

    def _find_silence(self, now_s: float, another_has_begun: bool) -> str | None:
        """What to say if a rank has made no progress for too long; in a collective its siblings wait for it too.

        For a fold that was asked to stop, only the limit of the stop counts.
        """
        beats = self._note_beats(now_s)
        silences_s = [now_s - moved_s for moved_s in self._moved_s]
        hang_s, start_s, stop_s = self._limits.hang_s, self._limit_start(now_s, another_has_begun), self._stop_limit_s
        limits_s = {"start": start_s, "stopping": stop_s}
        phases = ["start" if beat is None else beat.phase for beat in beats]
        over = {
            phase for phase, silent_s in zip(phases, silences_s, strict=True) if silent_s > limits_s.get(phase, hang_s)
        }
        if now_s - self._asked_s > stop_s or "stopping" in over:
            what = (
                f"asked to stop, and not gone after {stop_s:g} s (train.stop_timeout_s and {_STOP_MARGIN_S:g} s more)"
            )
        elif self._asked_s < now_s or not hang_s or not over:
            return None
        elif over == {"start"}:
            what = f"training not begun within {start_s:g} s"
        else:
            what = f"no progress within {hang_s:g} s (--hang-timeout)"
        return self._describe_silence(what, silences_s, beats)

    def _limit_start(self, now_s: float, another_has_begun: bool) -> float:
        """Seconds that a start may take: fewer some time after another fold has begun."""
        if another_has_begun and self._another_began_s is None:
            self._another_began_s = now_s
        if self._another_began_s is not None and now_s - self._another_began_s > _LATER_START_LIMIT_S:
            return _LATER_START_LIMIT_S
        return max(self._limits.hang_s, _START_LIMIT_S)

    def _describe_silence(self, what: str, silences_s: Sequence[float], beats: Sequence[Beat | None]) -> str:
        ranks = ", ".join(
            f"rank {rank} {silence_s:.1f} s since {format_progress(beat)}{_format_state(beat)}"
            for rank, (silence_s, beat) in enumerate(zip(silences_s, beats, strict=True))
        )
        stacks = ", ".join(map(str, self._consoles))
        return f"{what} on {socket.gethostname()}: {ranks}; stacks -> {stacks}"


def _format_state(beat: Beat | None) -> str:
    """Of a process that can't go on by itself: in a collective its siblings wait for it, and look just as silent."""
    if beat is not None and beat.host == socket.gethostname():
        with suppress(psutil.Error):
            state = psutil.Process(beat.pid).status()
            if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP):
                return f" ({state})"
    return ""


def format_exit_code(code: int) -> str:
    """How a process ended, by its exit code, which is minus a signal's number where one killed it."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _find_changes(states: Sequence[Path]) -> set[tuple[Path, int]]:
    """Of those that are there: when they were written."""
    found = set()
    for path in states:
        with suppress(OSError):
            found.add((path, path.stat().st_mtime_ns))
    return found


def _measure(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
