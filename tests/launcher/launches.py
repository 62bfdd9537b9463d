"""Whole launches from the command line, each in a folder of its own, and what they leave."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from rank_launcher import clean_environment
from tiny_runs import Run, Trainer

LAUNCH_S = 100
LAST = ">> Stopping logger and restoring stdio"


@dataclass(frozen=True)
class Launch:
    """An ended launch."""

    code: int
    out: str
    err: str
    run: Run

    @property
    def log(self) -> list[str]:
        """The launcher's own, of its last command."""
        log = max(self.run.folder.glob("logs/*_tiny.log"))  # named by the minute
        start = ">> Logger started"
        return (start + log.read_text().rpartition(start)[2]).splitlines()


def start(
    trainer: Trainer, sets: tuple[str, ...], folder: Path, *words: str, fault: str | None = None
) -> "subprocess.Popen[bytes]":
    """`doccls-launch run` on its way; with a fault, its workers meet that (`fault_train`)."""
    folder.mkdir(parents=True, exist_ok=True)
    module = "launcher" if fault is None else "fault_launcher"
    command = [sys.executable, "-m", module, "run", *trainer.arguments(sets, folder), "--run-id", "tiny", *words]
    environment = clean_environment()
    if fault is not None:
        environment |= {"DOCCLS_TEST_FAULT": fault, "DOCCLS_TEST_FOLDER": str(folder)}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment["PYTHONPATH"]])
    with (folder / "launch.out").open("wb") as out, (folder / "launch.err").open("wb") as err:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True)


def finish(process: "subprocess.Popen[bytes]", folder: Path) -> Launch:
    try:
        code = process.wait(LAUNCH_S)
    except subprocess.TimeoutExpired:
        consoles = "\n".join(file.read_text()[-2000:] for file in folder.rglob("console/*"))
        pytest.fail(f"the launch hangs\n{(folder / 'launch.out').read_text()[-3000:]}\n{consoles}")
    finally:
        if process.poll() is None:
            process.kill()
            for child in folder_processes(folder):
                child.kill()
            process.wait()
    return Launch(code, (folder / "launch.out").read_text(), (folder / "launch.err").read_text(), Run([], folder))


def launch(
    trainer: Trainer, sets: tuple[str, ...], *words: str, folder: Path | None = None, fault: str | None = None
) -> Launch:
    """One from its start to its end."""
    folder = folder or trainer.new_folder()
    return finish(start(trainer, sets, folder, *words, fault=fault), folder)


def ask(*words: str, **told: str) -> str:
    """What another command of `doccls-launch` says, with `told` in its environment."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        env=clean_environment() | told, capture_output=True, text=True, timeout=LAUNCH_S, check=True,
    ).stdout  # fmt: skip


def folder_processes(folder: Path) -> list[psutil.Process]:
    """Whatever runs on behalf of the folder's launch: told so by its command, or by the folder that it works in."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.cwd() == str(folder) or any(str(folder) in word for word in process.cmdline())
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_none_left(folder: Path) -> None:
    """A moment is given: the kernel strikes at once, but a large process takes time to go."""
    await_event(lambda: not folder_processes(folder), "the end of all processes", folder)


def await_event(happened: Callable[[], bool], what: str, folder: Path) -> None:
    deadline = time.monotonic() + LAUNCH_S
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {LAUNCH_S} s: {what}\n{(folder / 'launch.out').read_text()}")
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
    return any("[EPOCH 2]" in file.read_text() for file in folder.glob("logs/*_fold*.log"))
