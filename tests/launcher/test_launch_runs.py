"""`doccls-launch run`: folds side by side give the bytes of one process; failures and signals are told and end well."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from rank_launcher import clean_environment
from tiny_runs import PLAIN, RICH, Run, Trainer

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


def start(trainer: Trainer, sets: tuple[str, ...], folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "launcher", "run", *trainer.arguments(sets, folder), "--run-id", "tiny", *words]
    with (folder / "launch.out").open("wb") as out, (folder / "launch.err").open("wb") as err:
        return subprocess.Popen(
            command, cwd=folder, env=clean_environment(), stdout=out, stderr=err, start_new_session=True
        )


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


def launch(trainer: Trainer, sets: tuple[str, ...], *words: str, folder: Path | None = None) -> Launch:
    folder = folder or trainer.new_folder()
    return finish(start(trainer, sets, folder, *words), folder)


def folder_processes(folder: Path) -> list[psutil.Process]:
    """Whatever runs on behalf of the folder's launch."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


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


def test_folds_side_by_side_give_the_bytes_of_one_process(trainer: Trainer) -> None:
    folder, moved = trainer.new_folder(), trainer.new_folder()
    trainer.train(*RICH, folder=folder, run_id="alone")  # with the same paths in its config
    (root,) = folder.glob("experiments/*/alone")
    (moved / "experiments" / "day").mkdir(parents=True)
    root.rename(moved / "experiments" / "day" / "alone")
    alone = Run([], moved)
    launched = launch(trainer, RICH, "--slots", "2", folder=folder)
    assert launched.code == 0, launched.out + launched.err
    assert_same_bytes(alone, launched.run)
    for fold in range(3):
        name = f"ckpt/best_fold{fold}.pth"
        assert (alone.root / name).read_bytes() == (launched.run.root / name).read_bytes()
    # The log, its markers, and each fold's own beside it.
    assert launched.log[-2:] == ["[EXIT] TRAINING SUCCESS code=0", LAST]
    assert sum("started" in line and line.startswith("[LAUNCH]") for line in launched.log) == 3
    assert sum(" done macro_f1=" in line for line in launched.log) == 3
    assert sorted(file.name[-9:] for file in launched.run.folder.glob("logs/*_fold*.log")) == [
        "fold0.log", "fold1.log", "fold2.log"
    ]  # fmt: skip
    assert launched.out.endswith("[EXIT] training finished successfully (see logs/* for details)\n")
    # One folder, made by the launcher: the snapshot is that of the whole run.
    snapshot = yaml.safe_load((launched.run.root / "config.yaml").read_text())
    assert snapshot["data"]["valid_fold"] == "all" and "launcher" in snapshot["provenance"]["command"]
    assert snapshot["provenance"]["device"] == ["cpu 0", "cpu 1"]
    # By hand the same bytes again.
    before = {name: digest for name, digest in launched.run.list_files().items() if name.startswith(("oof", "summary"))}
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "merge", str(launched.run.root)],
        env=clean_environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "[OOF] all folds macro_f1=" in done.stdout
    assert before.items() <= launched.run.list_files().items()


def test_two_ranks_a_fold_give_the_bytes_of_two_ranks(trainer: Trainer) -> None:
    both = trainer.train(*PLAIN, world_size=2)
    launched = launch(trainer, (*PLAIN, "train.num_processes=2"), "--slots", "2")
    assert launched.code == 0, launched.out + launched.err
    assert_same_bytes(both, launched.run)


def test_a_fold_that_fails_leaves_the_others_and_the_run_id_trains_just_it(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    day = time.strftime("%Y%m%d")
    block = folder / "experiments" / day / "tiny" / "ckpt" / "best_fold1.pth"
    block.mkdir(parents=True)  # what is to be a file is a folder
    failed = launch(trainer, PLAIN, "--slots", "2", folder=folder)
    assert failed.code == 1
    told = failed.err
    assert "1 folds failed" in told and "- fold 1: " in told and "best_fold1.pth" in told and "_fold1.log" in told
    assert "missing: folds 1; to train just them: doccls-launch run --config" in told and "--run-id tiny" in told
    assert failed.log[-2:] == ["[EXIT] TRAINING ERROR code=1", LAST]
    assert any(line.startswith("[LAUNCH] fold 1 on cpu ") and "failed: " in line for line in failed.log)
    block.rmdir()
    again = launch(trainer, PLAIN, "--slots", "2", folder=folder)
    assert again.code == 0, again.out + again.err
    assert [line.split()[2] for line in again.log if line.startswith("[LAUNCH]") and "started" in line] == ["1"]
    assert_same_bytes(trainer.train(*PLAIN), again.run)


def test_fail_fast_asks_the_others_to_leave_and_starts_none(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    block = folder / "experiments" / time.strftime("%Y%m%d") / "tiny" / "ckpt" / "best_fold1.pth"
    block.mkdir(parents=True)
    slow = "train.epochs=500"  # fold 0 would take minutes
    failed = launch(trainer, (*PLAIN, slow), "--slots", "2", "--fail-fast", folder=folder)
    assert failed.code == 1
    assert "1 folds failed" in failed.err and "- fold 1: " in failed.err and "missing: folds 0, 1, 2;" in failed.err
    events = [line.split(" on cpu ")[0] for line in failed.log if line.startswith("[LAUNCH] fold ")]
    assert events.count("[LAUNCH] fold 2") == 0 and events.count("[LAUNCH] fold 0") == 2
    assert "[LAUNCH] stopping: folds 0 are asked to leave" in failed.log
    assert any(line.startswith("[LAUNCH] fold 0 on cpu 0: stopped after ") for line in failed.log)


def test_a_fold_that_is_killed_is_told_with_its_signal(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    sets = (*PLAIN, "data.valid_fold=2", "train.epochs=500")
    process = start(trainer, sets, folder, "--slots", "1")
    await_event(lambda: process.poll() is not None or trains(folder), "an epoch", folder)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    ended = finish(process, folder)
    assert ended.code == 1 and "rank 0 was killed by SIGKILL" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_folds_and_leaves_none(trainer: Trainer, number: signal.Signals) -> None:
    folder = trainer.new_folder()
    process = start(trainer, (*PLAIN, "train.epochs=500", "data.num_workers=1"), folder, "--slots", "2")
    await_event(lambda: process.poll() is not None or trains(folder), "an epoch", folder)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.killpg(process.pid, number)
    ended = finish(process, folder)
    assert ended.code == 128 + number, ended.out + ended.err
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
    assert ended.log[-2:] == [f"[EXIT] TRAINING ERROR code={128 + number}", LAST]
    assert not list(folder.rglob("*.tmp"))
    for log in folder.glob("logs/*_fold*.log"):
        assert log.read_text().splitlines()[-1] == LAST


def test_more_than_there_is_is_refused_before_anything_starts(trainer: Trainer) -> None:
    refused = launch(trainer, PLAIN, "--gpus", "0")
    assert refused.code == 1 and "no such GPU" in refused.err and refused.out.startswith("[EXIT] TRAINING ERROR code=1")
    assert not list(refused.run.folder.glob("experiments/*")) and not list(refused.run.folder.glob("logs/*"))


def trains(folder: Path) -> bool:
    return any("[EPOCH 2]" in file.read_text() for file in folder.glob("logs/*_fold*.log"))
