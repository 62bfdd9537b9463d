"""`doccls-launch run`: parallel folds give the bytes of one process; failures and signals are reported and handled."""

import json
import os
import signal
import time

import psutil
import pytest
import yaml
from launches import LAST, ask, assert_same_bytes, await_event, finish, launch, launch_as_user, start, trains
from tiny_runs import PLAIN, RICH, Run, Trainer


def test_parallel_folds_give_bytes_of_one_process(trainer: Trainer) -> None:
    folder, moved = trainer.new_folder(), trainer.new_folder()
    trainer.train(*RICH, folder=folder, run_id="alone")  # with the same paths in its config
    (root,) = folder.glob("experiments/*/alone")
    (moved / "experiments" / "day").mkdir(parents=True)
    root.rename(moved / "experiments" / "day" / "alone")
    alone = Run([], moved)
    launched = launch_as_user(trainer, RICH, folder, "--slots", "2")
    assert launched.code == 0, launched.out + launched.err
    assert_same_bytes(alone, launched.run)
    for fold in range(3):
        name = f"ckpt/best_fold{fold}.pth"
        assert (alone.root / name).read_bytes() == (launched.run.root / name).read_bytes()
    # The launcher's log with its markers, and the log of each fold.
    assert launched.log[-2:] == ["[EXIT] TRAINING SUCCESS code=0", LAST]
    assert sum("started" in line and line.startswith("[LAUNCH]") for line in launched.log) == 3
    assert sum(" done macro_f1=" in line for line in launched.log) == 3
    assert sorted(file.name[-9:] for file in launched.run.folder.glob("logs/*_fold*.log")) == [
        "fold0.log", "fold1.log", "fold2.log"
    ]  # fmt: skip
    assert launched.out.endswith("[EXIT] training finished successfully (see logs/* for details)\n")
    # The launcher makes the only folder: its snapshot is that of all folds.
    snapshot = yaml.safe_load((launched.run.root / "config.yaml").read_text())
    assert snapshot["data"]["valid_fold"] == "all" and "launcher" in snapshot["provenance"]["command"]
    assert snapshot["provenance"]["device"] == ["cpu"], "as reported by the rank of a fold"
    # A merge by hand gives the same bytes.
    before = {name: digest for name, digest in launched.run.list_files().items() if name.startswith(("oof", "summary"))}
    assert "[OOF] all folds macro_f1=" in ask(folder, "merge", str(launched.run.root))
    assert before.items() <= launched.run.list_files().items()


def test_launched_folds_of_two_ranks_give_bytes_of_two_ranks(trainer: Trainer) -> None:
    both = trainer.train(*PLAIN, world_size=2)
    launched = launch(trainer, (*PLAIN, "train.num_processes=2", "output.report=true"), "--slots", "2")
    reports = [line for line in launched.out.splitlines() if line.startswith("[REPORT]")]
    assert reports == [f"[REPORT] {launched.run.root / 'report.html'}"], "the folds leave it to the launcher"
    consoles = [file.read_text() for file in launched.run.root.glob("console/*")]
    assert consoles and not any("[REPORT]" in text for text in consoles)
    assert launched.code == 0, launched.out + launched.err
    assert_same_bytes(both, launched.run)
    provenance = yaml.safe_load((launched.run.root / "config.yaml").read_text())["provenance"]
    assert (provenance["world_size"], provenance["device"], provenance["precision"]) == (2, ["cpu", "cpu"], "no")


def test_other_folds_survive_a_failure_and_relaunch_trains_only_failed_fold(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    day = time.strftime("%Y%m%d")
    block = folder / "experiments" / day / "tiny" / "ckpt" / "best_fold1.pth"
    block.mkdir(parents=True)  # a folder in place of the file
    failed = launch(trainer, PLAIN, "--slots", "2", "--max-restarts", "0", folder=folder)
    assert failed.code == 1
    for message in ("1 fold failed", "- fold 1: ", "best_fold1.pth", "_fold1.log", "--run-id tiny"):
        assert message in failed.err
    assert "missing: folds 1; to train just them: doccls-launch run --config" in failed.err
    assert failed.log[-2:] == ["[EXIT] TRAINING ERROR code=1", LAST]
    assert any(line.startswith("[LAUNCH] fold 1 on cpu ") and "failed: " in line for line in failed.log)
    block.rmdir()
    relaunched = launch(trainer, PLAIN, "--slots", "2", folder=folder)
    assert relaunched.code == 0, relaunched.out + relaunched.err
    assert [line.split()[2] for line in relaunched.log if line.startswith("[LAUNCH]") and "started" in line] == ["1"]
    assert_same_bytes(trainer.train(*PLAIN), relaunched.run)


def test_fail_fast_stops_other_folds_and_starts_none(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    block = folder / "experiments" / time.strftime("%Y%m%d") / "tiny" / "ckpt" / "best_fold1.pth"
    block.mkdir(parents=True)
    slow = "train.epochs=500"  # fold 0 would take minutes
    failed = launch(trainer, (*PLAIN, slow), "--slots", "2", "--fail-fast", "--max-restarts", "0", folder=folder)
    assert failed.code == 1
    assert "1 fold failed" in failed.err and "- fold 1: " in failed.err and "missing: folds 0, 1, 2;" in failed.err
    events = [line.split(" on cpu ")[0] for line in failed.log if line.startswith("[LAUNCH] fold ")]
    assert events.count("[LAUNCH] fold 2") == 0 and events.count("[LAUNCH] fold 0") == 2
    assert "[LAUNCH] stopping fold 0" in failed.log
    assert any(line.startswith("[LAUNCH] fold 0 on cpu 0: stopped after ") for line in failed.log)


def test_signal_of_killed_fold_is_reported(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    sets = (*PLAIN, "data.valid_fold=2", "train.epochs=500")
    process = start(trainer, sets, folder, "--slots", "1", "--max-restarts", "0")
    await_event(lambda: not process.is_alive() or trains(folder), "an epoch", folder)
    (attempt,) = json.loads((Run([], folder).root / "launch.json").read_text())["attempts"]
    (rank,) = attempt["pids"]
    os.kill(rank, signal.SIGKILL)
    ended = finish(process, folder)
    assert ended.code == 1 and "rank 0 was killed by SIGKILL" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_all_folds_and_leaves_no_process(trainer: Trainer, number: signal.Signals) -> None:
    folder = trainer.new_folder()
    process = start(trainer, (*PLAIN, "train.epochs=500", "data.num_workers=1"), folder, "--slots", "2")
    await_event(lambda: not process.is_alive() or trains(folder), "an epoch", folder)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = psutil.Process(process.pid).children()
    assert any(server.children() for rank in ranks for server in rank.children()), "no loader worker found"
    os.killpg(process.pid, number)
    ended = finish(process, folder)
    assert ended.code == 128 + number, ended.out + ended.err
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
    assert ended.log[-2:] == [f"[EXIT] TRAINING ERROR code={128 + number}", LAST]
    assert not list(folder.rglob("*.tmp"))
    for log in folder.glob("logs/*_fold*.log"):
        assert log.read_text().splitlines()[-1] == LAST


def test_missing_gpus_are_rejected_before_anything_starts(trainer: Trainer) -> None:
    refused = launch(trainer, PLAIN, "--gpus", "0")
    assert refused.code == 1 and "no such GPU" in refused.err and refused.out.startswith("[EXIT] TRAINING ERROR code=1")
    assert not list(refused.run.folder.glob("experiments/*")) and not list(refused.run.folder.glob("logs/*"))
