"""`doccls verify-resume`: check that a fold killed at a random moment resumes to the bytes of an undisturbed one."""

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
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from doccls.config.arguments import add_config_arguments, load_arguments
from doccls.config.files import check_files
from doccls.config.load import parse_override
from doccls.config.schema import Config
from doccls.data.prepare import prepare_data
from doccls.data.store import choose_store
from doccls.errors import UserError
from doccls.reporting.progress import ConsoleReporter, Reporter
from doccls.run.heartbeat import Beat, format_progress, has_begun, read_beat
from doccls.run.paths import RunPaths, locate_run
from doccls.system.temporary import temporary_folder
from launcher.arguments import list_config_args
from launcher.attempt import format_exit_code
from launcher.forking import serve_ranks
from launcher.local import KILL_LIMIT_S, Backend, LocalBackend, Processes, kill_folds_and_wait
from launcher.parser import add_device_arguments, count
from launcher.placement import choose_slots
from launcher.plan import Assignment, Workload

_EPOCHS = 2
_INTERVAL_S = 1.0
_TICK_S = 0.01
_TAIL_LINES = 15
_MAX_TRIES = 10
_RUN_ID, _BASELINE = "verify", "undisturbed"
_ROW = "{:>4}  {:<28}  {:<14}  {:>11}  {}"
_STEPS = re.compile(r"^\[SCHED\] .* steps=(\d+) epochs=(\d+) ", re.MULTILINE)
_RESUMED = re.compile(r"^\[RESUME\] fold=\d+ from step (\d+) ", re.MULTILINE)
_KEPT = re.compile(r"^\[FOLD \d+\] finished before: kept ", re.MULTILINE)
_VARYING_METRICS = ("time_s", "mem_MiB", "images_per_s", "resumed_step")  # they differ from run to run


@dataclass(frozen=True)
class Trial:
    """One run that was killed and resumed."""

    killed: Beat  # its last heartbeat, at most a second before the kill
    resume_step: int | None  # the step that it resumed from; None if it had already finished
    differing: tuple[str, ...]  # its files that differ from those of the undisturbed run


@dataclass(frozen=True)
class _Baseline:
    """The undisturbed run."""

    steps: int
    time_s: float  # from its first step to its predictions
    digests: dict[str, str]
    scan_cache: Path  # where no store holds the scan of the images, the other runs reuse this one


@dataclass(frozen=True)
class _StartResult:
    """The result of one start of the fold's processes."""

    time_s: float  # from the first step to the predictions, or to an earlier end
    killed: Beat | None  # its last heartbeat, if it was killed before its end
    output: str  # of rank 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls verify-resume`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--kills", type=count, default=5, metavar="N", help="number of runs to kill, once each (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random kill times (default: 0)")
    add_device_arguments(parser)


def verify(arguments: argparse.Namespace) -> int:
    """Train one fold of the config undisturbed, then kill and resume it `--kills` times; return the exit code.

    Raises:
        UserError: config or devices can't be used, or the run fails by itself.
    """
    settings, reporter = _shorten(arguments), ConsoleReporter()
    config = load_arguments(arguments)
    slot = choose_slots(arguments, config).slots[0]
    fold = 0 if config.data.valid_fold == "all" else config.data.valid_fold
    folder = config.output.exp_dir / f"verify-resume-{secrets.token_hex(3)}"
    paths = {
        "output.exp_dir": folder / "experiments",
        "output.logs_dir": folder / "logs",
        "data.store": _fill_store(config, reporter) or "off",
    }
    report = reporter.line
    words = [*list_config_args(arguments), *(f"--set={key}={json.dumps(str(path))}" for key, path in paths.items())]
    assignment = Workload(sys.executable, (*words, "--run-id", _RUN_ID), config.train.cpu_threads).assign(fold, slot)
    report(
        f"[VERIFY] fold {fold} on {slot.name}, trained {1 + 2 * arguments.kills} times, with {' '.join(settings)}; "
        f"files: {folder}"
    )
    with temporary_folder("doccls-verify-") as meetings, serve_ranks(assignment, report) as server:
        if server is not None:
            server.await_ready()
        runs = _Runs(folder, assignment, LocalBackend(meetings, len(slot.devices), server))
        baseline = runs.train_undisturbed()
        report(f"[VERIFY] undisturbed: {baseline.steps} steps in {baseline.time_s:.1f} s")
        rng, equal = random.Random(arguments.seed), 0
        report(_ROW.format("kill", "killed in", "resumed from", "steps lost", "bytes"))
        for number in range(1, arguments.kills + 1):
            trial = runs.run_trial(baseline, number, rng)
            equal += not trial.differing
            report(render_trial(number, trial))
    summary = f"[VERIFY] {equal} of {arguments.kills} killed runs match the undisturbed run byte for byte"
    if equal < arguments.kills:
        report(f"{summary}; files of the others: {folder}")
        return 1
    shutil.rmtree(folder)
    report(summary)
    return 0


def _fill_store(config: Config, reporter: Reporter) -> Path | None:
    """Decode the pages before the runs, whose own stores would be in their folders; return None without a store.

    Raises:
        UserError: the data can't be used, or the config names a store that can't be filled.
    """
    choice = choose_store(config)
    if choice is None:
        return None
    check_files(config)
    return choice.folder if prepare_data(config, None, choice, reporter).stored is not None else None


def render_trial(number: int, trial: Trial) -> str:
    """Render a trial's row of the table."""
    step = trial.resume_step
    origin = "the end" if step is None else f"step {step}" if step else "the start"
    lost_steps = 0 if step is None else max(0, trial.killed.step - step)
    result = f"differ: {', '.join(trial.differing)}" if trial.differing else "the same"
    return _ROW.format(number, format_progress(trial.killed), origin, lost_steps, result)


def _shorten(arguments: argparse.Namespace) -> list[str]:
    """Default to a short run with frequent resume checkpoints; return the settings in force, as `key=value`."""
    config = load_arguments(arguments)
    stated = {parse_override(text).key for text in arguments.overrides}
    epochs = config.train.epochs if "train.epochs" in stated else min(_EPOCHS, config.train.epochs)
    defaults = {
        "train.epochs": epochs,
        "train.warmup_epochs": min(config.train.warmup_epochs, epochs / 2),
        "train.checkpoint_interval_s": _INTERVAL_S,
    }
    if config.train.has_mixing and epochs <= config.train.unmixed_epochs:
        defaults["train.unmixed_epochs"] = epochs - 1  # the mixing of the long run is verified too
    own = [f"{key}={value}" for key, value in defaults.items() if key not in stated]
    arguments.overrides = [*own, *arguments.overrides, "tracking.wandb=false"]
    return [*own, *(text for text in arguments.overrides if parse_override(text).key in defaults and text not in own)]


class _Runs:
    """All runs, one after the other in the same folder: best weights hold the config, and with it the folder."""

    def __init__(self, folder: Path, assignment: Assignment, backend: Backend) -> None:
        self._folder, self._assignment, self._backend = folder, assignment, backend
        self._starts = 0

    @property
    def _paths(self) -> RunPaths:
        return locate_run(self._folder / "experiments", _RUN_ID, datetime.now())

    def train_undisturbed(self) -> _Baseline:
        result, paths = self._start(None), self._paths
        digests, scan_cache = self._compute_digests(), self._folder / _BASELINE / paths.images.name
        paths.root.rename(self._folder / _BASELINE)
        planned = _STEPS.search(result.output)
        assert planned is not None
        return _Baseline(int(planned[1]) * int(planned[2]), result.time_s, digests, scan_cache)

    def run_trial(self, baseline: _Baseline, number: int, rng: random.Random) -> Trial:
        """Kill a run at a random moment between its first step and its end, then resume it.

        Raises:
            UserError: the run fails by itself, or always ends before the kill.
        """
        killed = self._train_and_kill(baseline, rng)
        output, digests = self._start(None).output, self._compute_digests()
        resumed = _RESUMED.search(output)
        resume_step = int(resumed[1]) if resumed else None if _KEPT.search(output) else 0
        differing = tuple(name for name, digest in baseline.digests.items() if digests[name] != digest)
        if differing:
            self._paths.root.rename(self._folder / f"killed{number}")
        else:
            shutil.rmtree(self._paths.root)
        return Trial(killed, resume_step, differing)

    def _train_and_kill(self, baseline: _Baseline, rng: random.Random) -> Beat:
        """Return the last heartbeat of the killed run."""
        max_time_s = baseline.time_s
        for _ in range(_MAX_TRIES):
            images = self._paths.images
            images.parent.mkdir(parents=True)
            if baseline.scan_cache.exists():
                shutil.copyfile(baseline.scan_cache, images)
            result = self._start(rng.uniform(0, max_time_s))
            if result.killed is not None:
                return result.killed
            max_time_s = min(max_time_s, result.time_s)  # the baseline may have run while the machine was slower
            shutil.rmtree(self._paths.root)
        raise UserError(f"the run ended before the kill {_MAX_TRIES} times: make it longer with --set train.epochs=N")

    def _start(self, kill_after_s: float | None) -> _StartResult:
        """Run the fold's processes to their end, or kill them `kill_after_s` after their first step.

        Raises:
            UserError: a process failed by itself.
        """
        self._starts += 1
        consoles = self._list_consoles()
        heartbeat = self._paths.heartbeat(self._assignment.fold, 0)
        previous = last = read_beat(heartbeat)
        begun_s = done_s = None
        predictions = self._paths.predictions(self._assignment.fold)
        limit_s = math.inf if kill_after_s is None else kill_after_s
        processes = self._backend.start(self._assignment, consoles)
        try:
            while None in processes.poll():
                last = read_beat(heartbeat) or last
                if begun_s is None and last != previous and has_begun(last):
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

    def _conclude(self, processes: Processes, console: Path, time_s: float, last: Beat | None) -> _StartResult:
        """Return how the processes ended; `last` is their last heartbeat if they were to be killed.

        Raises:
            UserError: a process failed by itself, or could not be killed.
        """
        output, codes = console.read_text(encoding="utf-8", errors="replace"), set(processes.poll())
        if codes == {0}:
            return _StartResult(time_s, None, output)
        if last is not None and -signal.SIGKILL in codes:
            return _StartResult(time_s, last, output)
        if None in codes:
            raise UserError(f"a rank could not be killed within {KILL_LIMIT_S:g} s; files: {self._folder}")
        rank, code = next((rank, code) for rank, code in enumerate(processes.poll()) if code)
        tail = "".join(f"\n  | {line}" for line in output.splitlines()[-_TAIL_LINES:])
        raise UserError(f"rank {rank} unexpectedly {format_exit_code(code)}; files: {self._folder}; last lines:{tail}")

    def _compute_digests(self) -> dict[str, str]:
        """Return SHA-256 digests, by file name, of everything that must match."""
        paths, fold = self._paths, self._assignment.fold
        rows = [json.loads(line) for line in paths.fold_metrics(fold).read_text(encoding="utf-8").splitlines()]
        metrics = [{key: value for key, value in row.items() if key not in _VARYING_METRICS} for row in rows]
        contents = {path.name: path.read_bytes() for path in (paths.predictions(fold), paths.best_checkpoint(fold))}
        contents["metrics.jsonl"] = json.dumps(metrics).encode()
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
