"""`doccls verify-resume`: a fold that is killed at a random moment and goes on ends in an undisturbed one's bytes."""

import argparse
import hashlib
import json
import math
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from doccls.config.arguments import add_config_arguments, load_arguments
from doccls.config.load import parse_override
from doccls.config.schema import Config
from doccls.data.prepare import prepare_data
from doccls.data.store import choose_store
from doccls.errors import UserError
from doccls.experiment import check_files
from doccls.reporting.progress import ConsoleReporter, Reporter
from doccls.run.heartbeat import Beat, format_progress, has_begun, read_beat
from doccls.run.paths import RunPaths, locate_run
from launcher.arguments import add_device_arguments, count, list_config_args
from launcher.attempt import format_exit_code
from launcher.local import KILL_LIMIT_S, Backend, LocalBackend, Processes, kill_folds_and_wait
from launcher.placement import choose_slots
from launcher.plan import Assignment, Workload

_EPOCHS = 2
_INTERVAL_S = 1.0
_TICK_S = 0.01
_TAIL_LINES = 15
_DRAWS = 10
_RUN_ID, _WHOLE = "verify", "undisturbed"
_ROW = "{:>4}  {:<28}  {:<14}  {:>11}  {}"
_STEPS = re.compile(r"^\[SCHED\] .* steps=(\d+) epochs=(\d+) ", re.MULTILINE)
_RESUMED = re.compile(r"^\[RESUME\] fold=\d+ from step (\d+) ", re.MULTILINE)
_KEPT = re.compile(r"^\[FOLD \d+\] finished before: kept ", re.MULTILINE)
_TIMES = ("time_s", "mem_MiB")
"""Of a row of metrics: no two runs share them."""


@dataclass(frozen=True)
class Trial:
    """One run that was killed and went on."""

    killed: Beat
    """Its last sign: at most a second before."""
    began_at: int | None
    """The step that it went on from; None: it was done, and nothing was left to do."""
    differing: tuple[str, ...]
    """What of it is not the undisturbed run's, byte for byte."""


@dataclass(frozen=True)
class _Whole:
    """The undisturbed run."""

    steps: int
    time_s: float
    """From its first step to its part."""
    digests: dict[str, str]
    looks: Path
    """What it found in the images, where no store holds it, so that the others need not scan them."""


@dataclass(frozen=True)
class _Ran:
    """One start of the fold's processes."""

    time_s: float
    """From the first step to the part, or to the end before it."""
    killed: Beat | None
    """Its last sign, if it was killed before its end."""
    said: str
    """By its main process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `doccls verify-resume`."""
    add_config_arguments(parser)
    parser.add_argument("--kills", type=count, default=5, metavar="N", help="runs to kill, once each (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    add_device_arguments(parser)


def verify(arguments: argparse.Namespace) -> int:
    """Train one fold of the config undisturbed, then kill and resume it `--kills` times; the exit code.

    Raises:
        UserError: config or devices stand in the way, or the run fails by itself.
    """
    chosen, reporter = _shorten(arguments), ConsoleReporter()
    config = load_arguments(arguments)
    slot = choose_slots(arguments, config).slots[0]
    fold = 0 if config.data.valid_fold == "all" else config.data.valid_fold
    folder = config.output.exp_dir / f"verify-resume-{secrets.token_hex(3)}"
    places = {
        "output.exp_dir": folder / "experiments",
        "output.logs_dir": folder / "logs",
        "data.store": _fill_store(config, reporter) or "off",
    }
    say = reporter.line
    words = [*list_config_args(arguments), *(f"--set={key}={json.dumps(str(path))}" for key, path in places.items())]
    assignment = Workload(sys.executable, (*words, "--run-id", _RUN_ID), config.train.cpu_threads).assign(fold, slot)
    say(
        f"[VERIFY] fold {fold} on {slot.name}, trained {1 + 2 * arguments.kills} times, with {' '.join(chosen)}; "
        f"files: {folder}"
    )
    with tempfile.TemporaryDirectory(prefix="doccls-verify-") as meetings:
        runs = _Runs(folder, assignment, LocalBackend(Path(meetings), len(slot.devices)))
        whole = runs.train_undisturbed()
        say(f"[VERIFY] undisturbed: {whole.steps} steps in {whole.time_s:.1f} s")
        draw, equal = random.Random(arguments.seed), 0
        say(_ROW.format("kill", "killed in", "went on from", "steps again", "bytes"))
        for number in range(1, arguments.kills + 1):
            trial = runs.try_kill(whole, number, draw)
            equal += not trial.differing
            say(render_trial(number, trial))
    told = f"[VERIFY] {equal} of {arguments.kills} runs that were killed ended in the undisturbed run's bytes"
    if equal < arguments.kills:
        say(f"{told}; the files of the others: {folder}")
        return 1
    shutil.rmtree(folder)
    say(told)
    return 0


def _fill_store(config: Config, reporter: Reporter) -> Path | None:
    """Decode the pages before the runs, whose own store would lie in their folder; None if there is, or can be, none.

    Raises:
        UserError: the data can't be used, or the store was named and can't be filled.
    """
    choice = choose_store(config)
    if choice is None:
        return None
    check_files(config)
    return choice.folder if prepare_data(config, None, choice, reporter).stored is not None else None


def render_trial(number: int, trial: Trial) -> str:
    """Its row of the table."""
    place, began_at = format_progress(trial.killed), trial.began_at
    came_from = "its end" if began_at is None else f"step {began_at}" if began_at else "its beginning"
    repeated_steps = 0 if began_at is None else max(0, trial.killed.step - began_at)
    same = f"differ: {', '.join(trial.differing)}" if trial.differing else "the same"
    return _ROW.format(number, place, came_from, repeated_steps, same)


def _shorten(arguments: argparse.Namespace) -> list[str]:
    """Make the run short, and its states frequent, where the arguments do not say otherwise; what is in force then."""
    config = load_arguments(arguments)
    stated = {parse_override(text).key for text in arguments.overrides}
    epochs = config.train.epochs if "train.epochs" in stated else min(_EPOCHS, config.train.epochs)
    chosen = {
        "train.epochs": epochs,
        "train.warmup_epochs": min(config.train.warmup_epochs, epochs / 2),
        "train.checkpoint_interval_s": _INTERVAL_S,
    }
    own = [f"{key}={value}" for key, value in chosen.items() if key not in stated]
    arguments.overrides = [*own, *arguments.overrides, "tracking.wandb=false"]
    return [*own, *(text for text in arguments.overrides if parse_override(text).key in chosen and text not in own)]


class _Runs:
    """The runs, one after the other in the same folder: best weights hold the config, and with it the folders."""

    def __init__(self, folder: Path, assignment: Assignment, backend: Backend) -> None:
        self._folder, self._assignment, self._backend = folder, assignment, backend
        self._starts = 0

    @property
    def _paths(self) -> RunPaths:
        return locate_run(self._folder / "experiments", _RUN_ID, datetime.now())

    def train_undisturbed(self) -> _Whole:
        ran, paths = self._start(None), self._paths
        digests, looks = self._digest(), self._folder / _WHOLE / paths.images.name
        paths.root.rename(self._folder / _WHOLE)
        planned = _STEPS.search(ran.said)
        assert planned is not None
        return _Whole(int(planned[1]) * int(planned[2]), ran.time_s, digests, looks)

    def try_kill(self, whole: _Whole, number: int, draw: random.Random) -> Trial:
        """Kill at a random moment from the first step to the end, then go on.

        Raises:
            UserError: the run fails by itself, or is always over before it can be killed.
        """
        killed = self._kill(whole, draw)
        said, found = self._start(None).said, self._digest()
        resumed = _RESUMED.search(said)
        began_at = int(resumed[1]) if resumed else None if _KEPT.search(said) else 0
        differing = tuple(name for name, digest in whole.digests.items() if found[name] != digest)
        if differing:
            self._paths.root.rename(self._folder / f"killed{number}")
        else:
            shutil.rmtree(self._paths.root)
        return Trial(killed, began_at, differing)

    def _kill(self, whole: _Whole, draw: random.Random) -> Beat:
        longest_s = whole.time_s
        for _ in range(_DRAWS):
            images = self._paths.images
            images.parent.mkdir(parents=True)
            if whole.looks.exists():
                shutil.copyfile(whole.looks, images)
            ran = self._start(draw.uniform(0, longest_s))
            if ran.killed is not None:
                return ran.killed
            longest_s = min(longest_s, ran.time_s)  # this machine is not always as slow as at first
            shutil.rmtree(self._paths.root)
        raise UserError(f"the run was over {_DRAWS} times before it was killed: make it longer, --set train.epochs=N")

    def _start(self, kill_after_s: float | None) -> _Ran:
        """Start the fold's processes; let them end, or kill them so long after their first step.

        Raises:
            UserError: they failed by themselves.
        """
        self._starts += 1
        consoles = self._list_consoles()
        heartbeat = self._paths.heartbeat(self._assignment.fold, 0)
        before = last = read_beat(heartbeat)
        begun_s = done_s = None
        predictions = self._paths.predictions(self._assignment.fold)
        limit_s = math.inf if kill_after_s is None else kill_after_s
        processes = self._backend.start(self._assignment, consoles)
        try:
            while None in processes.poll():
                last = read_beat(heartbeat) or last
                if begun_s is None and last != before and has_begun(last):
                    begun_s = time.monotonic()
                if done_s is None and predictions.exists():
                    done_s = time.monotonic()
                if begun_s is not None and time.monotonic() - begun_s >= limit_s:
                    break
                time.sleep(_TICK_S)
        finally:
            kill_folds_and_wait([processes])
        time_s = 0.0 if begun_s is None else (done_s or time.monotonic()) - begun_s
        is_killed = begun_s is not None and kill_after_s is not None
        return self._conclude(processes, consoles[0], time_s, last if is_killed else None)

    def _list_consoles(self) -> list[Path]:
        ranks = range(len(self._assignment.ranks))
        return [self._folder / "console" / f"start{self._starts}_rank{rank}.txt" for rank in ranks]

    def _conclude(self, processes: Processes, console: Path, time_s: float, last: Beat | None) -> _Ran:
        """How the processes ended; `last` is their last sign where they were to be killed.

        Raises:
            UserError: they failed by themselves, or could not be killed.
        """
        said, codes = console.read_text(encoding="utf-8", errors="replace"), set(processes.poll())
        if codes == {0}:
            return _Ran(time_s, None, said)
        if last is not None and -signal.SIGKILL in codes:
            return _Ran(time_s, last, said)
        if None in codes:
            raise UserError(f"a rank could not be killed within {KILL_LIMIT_S:g} s; files: {self._folder}")
        rank, code = next((rank, code) for rank, code in enumerate(processes.poll()) if code)
        tail = "".join(f"\n  | {line}" for line in said.splitlines()[-_TAIL_LINES:])
        raise UserError(f"rank {rank} {format_exit_code(code)} by itself; files: {self._folder}; the last lines:{tail}")

    def _digest(self) -> dict[str, str]:
        """Of what must be the same."""
        paths, fold = self._paths, self._assignment.fold
        rows = [json.loads(line) for line in paths.fold_metrics(fold).read_text(encoding="utf-8").splitlines()]
        told = [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]
        contents = {path.name: path.read_bytes() for path in (paths.predictions(fold), paths.best_checkpoint(fold))}
        contents["metrics.jsonl"] = json.dumps(told).encode()
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
