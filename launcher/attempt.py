"""One attempt at a fold while it runs: its processes, their heartbeats, and what their end meant."""

import re
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from doccls.run.heartbeat import Beat, Cause, has_begun, read_beat, tell_place
from doccls.run.paths import RunPaths
from launcher.backend import Backend
from launcher.plan import Assignment
from launcher.supervise import Ending, Outcome, judge

_SIBLING_GRACE_S = 5.0
"""How long the other ranks may outlive one that ended: they may be about to say why."""
_LOOK_S = 0.5
"""Between two looks at heartbeats."""
_START_LIMIT_S = 3600.0
"""How long imports, a look at the data and weights from the hub may take, where nothing beats."""
_TAIL_LINES = 5
_SIGNALLED = 128
"""Exit codes above: this and the number of the signal that was heeded."""
_LOG_STARTED = ">> Logger started: "
_FAILED = re.compile(r"\[EXIT\]\[ERROR\] (?:training failed: |rank \d+ (?:on \S+ )?failed: )?(.*)")


class RunningFold:
    """The processes of one attempt, and what the launcher has seen of them."""

    def __init__(self, assignment: Assignment, paths: RunPaths, backend: Backend) -> None:
        """Starts them.

        Raises:
            StartError: they can't be started.
        """
        fold, self._ranks = assignment.fold, range(len(assignment.ranks))
        self._heartbeats = [paths.heartbeat(fold, rank) for rank in self._ranks]
        self._beats_before = [read_beat(heartbeat) for heartbeat in self._heartbeats]
        """Of an attempt before: the fold tells by them how much of its work is done again."""
        self._states = paths.last_states(fold)
        self._states_before = _find_changes(self._states)
        self._consoles = [paths.console(fold, rank) for rank in self._ranks]
        self._told_before = [_measure(console) for console in self._consoles]
        self.processes = backend.start(assignment, self._consoles)
        self._silence: str | None = None
        self._beat_counts = [0 for _ in self._ranks]
        self._moved_s = [time.monotonic() for _ in self._ranks]
        """When, on this clock, a rank's beat count was seen to change."""
        self._looked_s = time.monotonic()

    def has_ended(self, hang_timeout_s: float) -> bool:
        """Whether all ranks are gone. Those that should be are struck: siblings of one that is gone, silent ones.

        `hang_timeout_s` is how long a rank that has begun to train may be silent; 0 is for ever.
        """
        now_s, codes = time.monotonic(), self.processes.poll()
        if None not in codes:
            return True
        if self._silence is not None:
            self.processes.strike()
        elif self.processes.first_end_s is not None:
            if now_s - self.processes.first_end_s > _SIBLING_GRACE_S:
                self.processes.strike()
        elif hang_timeout_s and now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self._silence = self._find_silence(now_s, hang_timeout_s)
            if self._silence is not None:
                self.processes.dump_stacks()
                self.processes.strike()
        return False

    @property
    def has_advanced(self) -> bool:
        """Whether a state was saved in this attempt, from which the next one goes on."""
        return _find_changes(self._states) - self._states_before != set()

    def conclude(self, done: bool, stopping: bool) -> tuple[Ending, str]:
        """How the attempt ended, and why, in words. `done`: the fold's part is there and valid."""
        codes, beats = self.processes.poll(), self._read_beats()
        causes = [beat.cause if beat else None for beat in beats]
        outcome = judge(codes, causes, done, self._silence is not None, stopping, self.has_advanced)
        if outcome in (Outcome.DONE, Outcome.STOPPED):
            return Ending(outcome), str(outcome)
        if self._silence is not None:
            return Ending(outcome), self._silence
        rank = self._find_culprit(codes, causes)
        beat, code, console = beats[rank], codes[rank], self._read_console(rank)
        assert code is not None
        said = _FAILED.findall(console)
        if code > 0 and beat is not None and beat.cause is not None:
            error = f"{beat.error} after step {beat.step} of fold {beat.fold}"
            return Ending(outcome, error), self._name(rank, said[-1] if said else f"{beat.error}: {beat.message}")
        if code > 0 and said:
            asked_to_leave = code > _SIGNALLED  # by somebody, and perhaps again: no error of its own
            return Ending(outcome, None if asked_to_leave else said[-1]), self._name(rank, said[-1])
        where = f", last seen in {tell_place(beat)}" if beat is not None else ""
        last = (console or self._read_console(0)).splitlines()[-_TAIL_LINES:]  # rank 0 says what all do
        tail = "".join(f"\n  | {line}" for line in [*last, *self.processes.tell().splitlines()[-_TAIL_LINES:]])
        return Ending(outcome), f"rank {rank} {tell_code(code)}{where}; its last lines:{tail or ' none'}"

    def _find_culprit(self, codes: Sequence[int | None], causes: Sequence[Cause | None]) -> int:
        """The rank to be heard: one that says what went wrong, else the first that was seen to fail.

        Ranks that were asked to leave do so together, and the main process says why for all.
        """
        for cause in (Cause.USER_ERROR, Cause.OUT_OF_MEMORY):
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

    def _find_silence(self, now_s: float, limit_s: float) -> str | None:
        """What to say if a rank has made no progress for too long; in a collective its siblings wait for it too."""
        beats = self._read_beats()
        for rank, beat in enumerate(beats):
            count = beat.count if beat else 0
            if self._beat_counts[rank] != count:
                self._beat_counts[rank], self._moved_s[rank] = count, now_s
        silences_s = [now_s - moved_s for moved_s in self._moved_s]
        start_limit_s = max(limit_s, _START_LIMIT_S)
        if any(has_begun(beat) and silent_s > limit_s for beat, silent_s in zip(beats, silences_s, strict=True)):
            what = f"no progress within {limit_s:g} s (--hang-timeout)"
        elif any(silent_s > start_limit_s for silent_s in silences_s):
            what = f"training not begun within {start_limit_s:g} s"
        else:
            return None
        told = ", ".join(
            f"rank {rank} {silence_s:.1f} s since {tell_place(beat)}{_tell_state(beat)}"
            for rank, (silence_s, beat) in enumerate(zip(silences_s, beats, strict=True))
        )
        stacks = ", ".join(map(str, self._consoles))
        return f"{what} on {socket.gethostname()}: {told}; stacks -> {stacks}"


def _tell_state(beat: Beat | None) -> str:
    """Of a process that can't go on by itself: in a collective its siblings wait for it, and look just as silent."""
    if beat is not None and beat.host == socket.gethostname():
        with suppress(psutil.Error):
            state = psutil.Process(beat.pid).status()
            if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP):
                return f" ({state})"
    return ""


def tell_code(code: int) -> str:
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
