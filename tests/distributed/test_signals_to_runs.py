"""A signal in the middle of an epoch: the marked end of the log, the signal's exit code, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rank_launcher import clean_environment, start_ranks
from tiny_runs import RICH, Run, Trainer

START_S = 120
END_S = 60
LONG = (*RICH, "train.epochs=500", "train.log_interval=1")


def _await(happened: Callable[[], bool], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s} s: {what}")
        time.sleep(0.05)


def _trains(folder: Path) -> bool:
    logs = list(folder.glob("logs/*"))
    return bool(logs) and "[EPOCH 2]" in logs[0].read_text()


def _assert_ended_well(folder: Path, code: int) -> None:
    run = Run([], folder)
    assert run.lines[-2:] == [f"[EXIT] TRAINING ERROR code={code}", ">> Stopping logger and restoring stdio"]
    assert not list(folder.rglob("*.tmp"))
    assert not list(run.root.glob("oof/parts/*"))
    assert run.read_metrics()[-1]["fold"] == 0


@pytest.mark.parametrize(
    ("number", "to_group"), [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGTERM, True)]
)
def test_a_signal_ends_a_run_in_good_order(trainer: Trainer, number: signal.Signals, to_group: bool) -> None:
    """SIGTERM as `kill` sends it, SIGINT as a terminal does (to the workers too), SIGTERM as Slurm does."""
    folder = trainer.new_folder()
    folder.mkdir()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "doccls.train", *trainer.arguments([*LONG, "data.num_workers=2"], folder)],
            cwd=folder, env=clean_environment(), stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
    try:
        _await(lambda: process.poll() is not None or _trains(folder), START_S, "an epoch")
        assert process.poll() is None, (folder / "err").read_text()
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        (os.killpg if to_group else os.kill)(process.pid, number)
        code = process.wait(END_S)
        _, left = psutil.wait_procs(workers, timeout=10)
        assert left == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    assert code == 128 + number
    _assert_ended_well(folder, 128 + number)
    told = [line for line in (folder / "err").read_text().splitlines() if line.startswith("[EXIT]")]
    assert told == [f"[EXIT][ERROR] training failed: {number.name} received"]


def test_a_signal_to_a_group_ends_every_rank(trainer: Trainer) -> None:
    """As torchrun and Slurm end a job: SIGTERM to each."""
    folder = trainer.new_folder()
    ranks = start_ranks("doccls.train:main", trainer.arguments(LONG, folder), folder / "console", 2)
    try:
        _await(lambda: _trains(folder), START_S, "an epoch")
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.join(END_S)
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join(10)
    assert codes == [143, 143], (folder / "console" / "rank1.err").read_text()
    _assert_ended_well(folder, 143)
