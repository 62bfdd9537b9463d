"""Faults during a launch: no process is left, and the run ends with the bytes of the undisturbed run."""

import json
import os
import re
import shutil
import signal
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fault_train import FAULT_MARKER, STEP_MARKER
from launches import CONSOLE, ask, assert_none_left, await_event, finish, launch, start, trains
from tiny_runs import PLAIN, Run, Trainer

from doccls.run.paths import RunPaths
from doccls.system.lock import hold_lock

RECIPE = (*PLAIN, "data.valid_fold=1")  # one fold with three steps an epoch: the fault is in the second epoch
PAIR = (*RECIPE, "train.num_processes=2")
WORKER = "data.num_workers=1"  # for faults that hit loader workers too


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    """The run of the fold in one process."""
    return trainer.train(*RECIPE)


@pytest.fixture(scope="module")
def undisturbed_pair(trainer: Trainer) -> Run:
    """The run of the fold in two ranks."""
    return trainer.train(*RECIPE, world_size=2)


def assert_same(run: Run, expected: Run) -> None:
    predictions = "oof/parts/fold1.safetensors"
    assert (run.root / predictions).read_bytes() == (expected.root / predictions).read_bytes()
    assert run.read_weights(1) == expected.read_weights(1)


def read_attempts(run: Run) -> list[dict[str, Any]]:
    attempts: list[dict[str, Any]] = json.loads((run.root / "launch.json").read_text())["attempts"]
    return attempts


def list_outcomes(run: Run) -> list[str]:
    return [attempt["outcome"] for attempt in read_attempts(run)]


def print_times(run: Run) -> None:
    """Print the times from the fault to the end of all ranks and to the next step, for pytest -s."""
    fault_s, step_s = ((run.folder / marker).stat().st_mtime for marker in (FAULT_MARKER, STEP_MARKER))
    ended_s = datetime.fromisoformat(read_attempts(run)[0]["ended"]).timestamp()
    print(f"\nfrom the fault: all ranks gone in {ended_s - fault_s:.1f} s, next step in {step_s - fault_s:.1f} s")


@pytest.mark.parametrize(
    ("ranks", "sets", "fault", "reported"),
    [(1, RECIPE, "SIGKILL", "0"), (2, PAIR, "SIGKILL of rank 1", "1"), (2, (*PAIR, WORKER), "whole fold", "[01]")],
)
def test_killed_fold_is_restarted(
    trainer: Trainer,
    undisturbed: Run,
    undisturbed_pair: Run,
    ranks: int,
    sets: tuple[str, ...],
    fault: str,
    reported: str,
) -> None:
    launched = launch(trainer, sets, "--slots", str(ranks), fault=fault)
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["crashed", "done"]
    print_times(launched.run)
    log = "\n".join(launched.log)
    assert re.search(f": failed: rank {reported} was killed by SIGKILL, last seen in ", log)
    assert "; its last lines:\n  | " in log and "\n  log: " in log
    assert "[LAUNCH] fold 1: restarts in 1 s, restart 1 of 2" in launched.log
    assert_same(launched.run, undisturbed if ranks == 1 else undisturbed_pair)


@pytest.mark.parametrize(("ranks", "fault"), [(1, "SIGTERM"), (2, "SIGINT of rank 1"), (2, "slow save")])
def test_preempted_fold_resumes_without_counting_restart(
    trainer: Trainer, undisturbed: Run, undisturbed_pair: Run, ranks: int, fault: str
) -> None:
    sets, slots = (RECIPE, "1") if ranks == 1 else (PAIR, "2")
    launched = launch(trainer, sets, "--slots", slots, "--max-restarts", "0", fault=fault)
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["preempted", "done"]
    preempted = [line for line in launched.log if re.search(": preempted after .*; will resume: ", line)]
    number = "SIGTERM" if fault == "slow save" else fault.partition(" ")[0]
    assert len(preempted) == 1 and preempted[0].endswith(f"{number} received"), launched.log
    logs = "".join(log.read_text() for log in sorted(launched.run.folder.glob("logs/*_fold1.log")))
    assert re.findall(r"^\[RESUME\] fold=1 from step (\d+) .*, repeating \d+ s of work$", logs, re.MULTILINE) == ["4"]
    assert_same(launched.run, undisturbed if ranks == 1 else undisturbed_pair)


def test_fold_finished_by_another_owner_meanwhile_is_merged(trainer: Trainer) -> None:
    """The launcher can't have fold 0, and its own folds end last."""
    alone = trainer.train(*PLAIN, "data.valid_fold=0")
    folder = trainer.new_folder()
    paths = RunPaths(folder / "experiments" / alone.root.parent.name / "tiny")
    with hold_lock(paths.fold_lock(0), "fold 0 is being trained"):
        process = start(trainer, PLAIN, folder, "--slots", "1", fault="impatient")
        await_event(lambda: not process.is_alive() or has_ended(folder, 0), "the rejection", folder)
        assert not paths.heartbeat(0, 0).exists(), "the file belongs to the owner"
        paths.predictions_dir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RunPaths(alone.root).predictions(0), paths.predictions(0))
    launched = finish(process, folder)
    assert launched.code == 0, launched.out + launched.err
    assert "fold 0 is being trained by process" in launched.out
    assert list_outcomes(launched.run) == ["user error", "done", "done"] and paths.oof_logits.exists()


def has_ended(folder: Path, fold: int) -> bool:
    with suppress(ValueError, FileNotFoundError):
        attempts = read_attempts(Run([], folder))
        return any(attempt["fold"] == fold and attempt["ended"] for attempt in attempts)
    return False


def test_unwritable_ledger_stops_no_fold(trainer: Trainer, undisturbed: Run) -> None:
    launched = launch(trainer, RECIPE, "--slots", "1", fault="ledger that can't be written")
    assert launched.code == 0, launched.out + launched.err
    warnings = [line for line in launched.log if line.startswith("[WARNING] ") and "launch.json" in line]
    assert len(warnings) == 1 and warnings[0].endswith(": the folds continue; the write will be retried")
    assert list_outcomes(launched.run) == ["crashed", "done"]
    assert_same(launched.run, undisturbed)


def test_fold_with_killed_loader_worker_is_restarted(trainer: Trainer, undisturbed: Run) -> None:
    launched = launch(trainer, (*RECIPE, WORKER), "--slots", "1", fault="loader worker")
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["crashed", "done"]
    print_times(launched.run)
    assert any("was killed by SIGKILL while " in line for line in launched.log)
    assert_same(launched.run, undisturbed)


def test_processes_end_with_killed_launcher_and_same_command_resumes(trainer: Trainer, undisturbed: Run) -> None:
    folder, sets = trainer.new_folder(), (*RECIPE, WORKER)
    killed = finish(start(trainer, sets, folder, "--slots", "1", fault="launcher"), folder)
    assert killed.code == -signal.SIGKILL
    assert_none_left(folder)
    assert list_outcomes(killed.run) == [None]
    relaunched = launch(trainer, sets, "--slots", "1", folder=folder)
    assert relaunched.code == 0, relaunched.out + relaunched.err
    assert list_outcomes(relaunched.run) == ["lost", "done"]
    assert any("ended when its launcher was killed" in line for line in relaunched.log)
    assert_same(relaunched.run, undisturbed)


def test_hung_rank_dumps_stacks_and_fold_is_restarted(trainer: Trainer, undisturbed_pair: Run) -> None:
    words = ("--slots", "2", "--hang-timeout", "10s")
    launched = launch(trainer, PAIR, *words, fault="SIGSTOP of rank 1")
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["hung", "done"]
    print_times(launched.run)
    log = "\n".join(launched.log)
    assert re.search(
        r"no progress within 10 s \(--hang-timeout\) on \S+: rank 0 [0-9.]+ s since (train|validate) step \d, epoch \d",
        log,
    )
    assert re.search(r"rank 1 [0-9.]+ s since (train|validate) step \d, epoch \d \(stopped\)", log)
    for rank in range(2):
        console = (launched.run.root / "console" / f"fold1_rank{rank}.txt").read_text()
        assert "(most recent call first):" in console and "doccls/training/step.py" in console
    assert_same(launched.run, undisturbed_pair)


def test_out_of_memory_halves_micro_batch_and_keeps_batch(trainer: Trainer, undisturbed: Run) -> None:
    fault, folder, words, sizes = "out of memory above 3", trainer.new_folder(), ("--slots", "1"), [11, 6, 3]
    launched = launch(trainer, RECIPE, *words, "--max-restarts", "0", fault=fault, folder=folder)
    assert launched.code == 0, launched.out + launched.err
    assert list_outcomes(launched.run) == ["out of memory"] * (len(sizes) - 1) + ["done"]
    assert [attempt["micro_batch_size"] for attempt in read_attempts(launched.run)] == sizes
    for size in sizes[1:]:
        assert any(f"restarts with train.micro_batch_size={size}, the same batch" in line for line in launched.log)
    predictions, expected = launched.run.predictions(1), undisturbed.predictions(1)
    assert predictions.info.micro_batch_size == sizes[-1]
    assert predictions.logits_NC == pytest.approx(expected.logits_NC, abs=1e-4)  # other order of summation
    # A later launch of the run starts with the reduced size, and trains like a run with that size in its config.
    (launched.run.root / "oof" / "parts" / "fold1.safetensors").unlink()
    relaunched = launch(trainer, RECIPE, *words, fault=fault, folder=folder)
    assert relaunched.code == 0, relaunched.out + relaunched.err
    assert "[LAUNCH] fold 1: train.micro_batch_size=3, since an earlier launch" in "\n".join(relaunched.log)
    assert [attempt["micro_batch_size"] for attempt in read_attempts(relaunched.run)] == [*sizes, 3]
    assert_same(relaunched.run, trainer.train(*RECIPE, f"train.micro_batch_size={sizes[-1]}"))


def test_out_of_memory_of_one_rank_halves_micro_batch_of_both(trainer: Trainer, undisturbed_pair: Run) -> None:
    launched = launch(trainer, PAIR, "--slots", "2", fault="out of memory above 3 of rank 1")
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert [attempt["micro_batch_size"] for attempt in read_attempts(launched.run)] == [6, 3]
    cause = "failed: rank 1: CUDA out of memory on cpu:0: requested 2.00 GiB. To use less memory, set train.micro_batch"
    assert any(cause in line for line in launched.log)
    assert launched.run.predictions(1).logits_NC == pytest.approx(undisturbed_pair.predictions(1).logits_NC, abs=1e-4)


def test_error_repeated_at_same_step_fails_fold(trainer: Trainer) -> None:
    launched = launch(trainer, RECIPE, "--slots", "1", "--max-restarts", "9", fault="error")
    assert launched.code == 1
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["crashed", "crashed"]
    assert "1 fold failed\n- fold 1: 'a defect', log: " in launched.err


def test_second_ctrl_c_kills_all_at_once(trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    process = start(trainer, RECIPE, folder, "--slots", "1", fault="SIGSTOP")  # it can't stop by itself
    await_event(lambda: not process.is_alive() or (folder / FAULT_MARKER).exists(), "the fault", folder)
    os.killpg(process.pid, signal.SIGINT)
    await_event(lambda: "[LAUNCH] stopping fold" in (folder / CONSOLE / "rank0.out").read_text(), "the stop", folder)

    def kill_again() -> bool:
        with suppress(ProcessLookupError):  # it may end between the check and the signal
            if process.is_alive():
                os.killpg(process.pid, signal.SIGINT)  # within a second it counts as an echo of the first
        return not process.is_alive()

    await_event(kill_again, "the end", folder)
    ended = finish(process, folder)
    assert ended.code == 130
    assert_none_left(folder)
    relaunched = launch(trainer, RECIPE, "--slots", "1", folder=folder)
    # The launcher may have seen the end of the fold that it killed before its own end.
    assert relaunched.code == 0 and list_outcomes(relaunched.run) in (["lost", "done"], ["crashed", "done"])
    assert_same(relaunched.run, undisturbed)


def test_second_launcher_of_run_is_rejected_and_run_can_be_cancelled(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    sets = (*RECIPE, "train.epochs=500")
    process = start(trainer, sets, folder, "--slots", "1")
    await_event(lambda: not process.is_alive() or trains(folder), "an epoch", folder)
    other = trainer.new_folder()
    other.mkdir()
    (other / "experiments").symlink_to(folder / "experiments")
    second = launch(trainer, sets, "--slots", "1", folder=other)
    assert second.code == 1
    assert f"run tiny is being launched by process {process.pid} on " in second.err
    status = json.loads(ask(folder, "status", "--json", str(Run([], folder).root)))
    assert [holder["pid"] for holder in status["launchers"]] == [process.pid]
    assert status["folds"][1]["state"] == "running" and " epoch " in status["folds"][1]["remark"]
    assert process.is_alive()
    assert "[CANCEL] stopped" in ask(folder, "cancel", str(Run([], folder).root))
    assert finish(process, folder).code == 143
    status = json.loads(ask(folder, "status", "--json", str(Run([], folder).root)))
    assert status["launchers"] == [] and status["folds"][1]["state"] == "stopped"
    assert_none_left(folder)
