"""Complete launches from the command line, each in a folder of its own, and checks of their results."""

import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
from rank_launcher import clean_environment, launch_ranks, start_ranks
from tiny_runs import Run, Trainer

LAUNCH_S = 100
CONSOLE = "launch"  # folder of a launcher's output, in that of the launch
LAST = ">> Stopping logger and restoring stdio"
_started: list[tuple[ForkServerProcess, Path]] = []  # the launches of this test and their folders


@dataclass(frozen=True)
class Launch:
    """The exit code, output and run of an ended launch."""

    code: int
    out: str
    err: str
    run: Run

    @property
    def log(self) -> list[str]:
        """The lines of the launcher's own log of its last command."""
        log = max(self.run.folder.glob("logs/*_tiny.log"))  # named by the minute
        start = ">> Logger started"
        return (start + log.read_text().rpartition(start)[2]).splitlines()


def start(
    trainer: Trainer,
    sets: tuple[str, ...],
    folder: Path,
    *words: str,
    fault: str | None = None,
    refusal: str | None = None,
) -> ForkServerProcess:
    """Start `doccls-launch run`, optionally with a fault in its ranks (`fault_train`) or a `refusal` (`refusals`)."""
    program = "doccls.train:main" if fault is None else "fault_train:train_with_fault"
    variables = {} if fault is None else {"DOCCLS_TEST_FAULT": fault}
    variables |= {} if refusal is None else {"DOCCLS_TEST_REFUSAL": refusal}
    return start_command(
        folder, program, "launcher", "run", *trainer.arguments(sets, folder), "--run-id", "tiny", *words, **variables
    )


def start_command(
    folder: Path, program: str, *words: str, starter: str = "forked_launcher:main", **variables: str
) -> ForkServerProcess:
    """Start `python -m WORDS` in the folder, with additional environment variables; its ranks run `program`.

    `starter` is the function that becomes the command. Processes that still run at the end of the test are killed
    (`kill_started`).
    """
    variables |= {"DOCCLS_TEST_FOLDER": str(folder)}
    (process,) = start_ranks(starter, [program, *words], folder / CONSOLE, environment=variables)
    _started.append((process, folder))
    return process


def start_alone(
    folder: Path, environment: Mapping[str, str], console: str, program: str, *words: str
) -> ForkServerProcess:
    """Start a command like `start_command`, with only this environment; its output is in the folder `console`."""
    variables = json.dumps({**environment, "DOCCLS_TEST_FOLDER": str(folder)})
    (process,) = start_ranks("forked_launcher:main_alone", [variables, program, *words], folder / console)
    _started.append((process, folder))
    return process


def kill_started() -> None:
    """Kill the launchers that a failed test has left, and all their processes."""
    while _started:
        kill_launch(*_started.pop())


def kill_launch(process: ForkServerProcess, folder: Path) -> None:
    """Kill the launcher, if it still runs, and then all processes of its folder."""
    if process.is_alive():
        process.kill()
    for child in folder_processes(folder):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.join()


def finish(process: ForkServerProcess, folder: Path, console: str = CONSOLE) -> Launch:
    """Wait for the launch to end, for at most LAUNCH_S."""
    process.join(LAUNCH_S)
    hangs = process.is_alive()
    if hangs:
        kill_launch(process, folder)
    out, err = ((folder / console / f"rank0.{name}").read_text() for name in ("out", "err"))
    if hangs:
        consoles = "\n".join(file.read_text()[-2000:] for file in folder.rglob("console/*"))
        pytest.fail(f"the launch hangs\n{out[-3000:]}\n{err[-3000:]}\n{consoles}")
    assert process.exitcode is not None
    return Launch(process.exitcode, out, err, Run([], folder))


def launch(
    trainer: Trainer,
    sets: tuple[str, ...],
    *words: str,
    folder: Path | None = None,
    fault: str | None = None,
    refusal: str | None = None,
) -> Launch:
    """Run a launch to its end."""
    folder = folder or trainer.new_folder()
    return finish(start(trainer, sets, folder, *words, fault=fault, refusal=refusal), folder)


def launch_as_user(trainer: Trainer, sets: tuple[str, ...], folder: Path, *words: str) -> Launch:
    """Run `python -m launcher run` to its end, with a fresh interpreter for the launcher and for each rank."""
    command = [sys.executable, "-m", "launcher", "run", *trainer.arguments(sets, folder), "--run-id", "tiny", *words]
    done = subprocess.run(
        command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=LAUNCH_S, check=False
    )
    return Launch(done.returncode, done.stdout, done.stderr, Run([], folder))


def ask(folder: Path, *words: str, **variables: str) -> str:
    """Return the output of another command of `doccls-launch`, with additional environment variables."""
    console = folder / f"asked_{secrets.token_hex(4)}"
    (done,) = launch_ranks("launcher.cli:main", words, console, environment=variables, timeout_s=LAUNCH_S)
    assert done.code == 0, done.stderr
    return done.stdout


def folder_processes(folder: Path) -> list[psutil.Process]:
    """Return the processes of the folder's launch, by their command line or working folder."""
    found, of_folder = [], re.compile(rf"{re.escape(str(folder))}(/|$)")
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.cwd() == str(folder) or any(of_folder.search(word) for word in process.cmdline())
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_none_left(folder: Path) -> None:
    """Wait until no process of the launch is left: a large process takes a moment to end after SIGKILL."""
    await_event(lambda: not folder_processes(folder), "the end of all processes", folder)


def await_event(happened: Callable[[], bool], what: str, folder: Path, console: str = CONSOLE) -> None:
    deadline = time.monotonic() + LAUNCH_S
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {LAUNCH_S} s: {what}\n{(folder / console / 'rank0.out').read_text()}")
        time.sleep(0.05)


def assert_same_bytes(first: Run, second: Run, num_folds: int = 3) -> None:
    names = [
        *("oof/oof_logits.npy", "oof/oof_targets.npy", "oof/oof.csv", "summary.json"),
        *(f"oof/parts/fold{fold}.safetensors" for fold in range(num_folds)),
    ]
    for name in names:
        assert (first.root / name).read_bytes() == (second.root / name).read_bytes(), name
    for fold in range(num_folds):
        assert first.read_weights(fold) == second.read_weights(fold)


def trains(folder: Path) -> bool:
    """Return whether a fold has finished the steps of its second epoch."""
    return any("[EPOCH 2]" in file.read_text() for file in folder.glob("logs/*_fold*.log"))
