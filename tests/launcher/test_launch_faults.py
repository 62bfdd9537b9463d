"""Whatever is killed, stopped or full: no process stays, and the run ends with the undisturbed run's bytes."""

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
from fault_train import STEPPED, STRUCK
from launches import CONSOLE, ask, assert_none_left, await_event, finish, launch, start, trains
from tiny_runs import PLAIN, Run, Trainer

from doccls.run.paths import RunPaths
from doccls.system.lock import hold_lock

RECIPE = (*PLAIN, "data.valid_fold=1")
"""One fold of three steps an epoch: the fault is in the second."""
PAIR = (*RECIPE, "train.num_processes=2")
WORKER = "data.num_workers=1"
"""For a fault that strikes loader workers too."""


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    """The fold of one process."""
    return trainer.train(*RECIPE)


@pytest.fixture(scope="module")
def undisturbed_pair(trainer: Trainer) -> Run:
    """The fold of two ranks."""
    return trainer.train(*RECIPE, world_size=2)


def assert_same(run: Run, expected: Run) -> None:
    part = "oof/parts/fold1.safetensors"
    assert (run.root / part).read_bytes() == (expected.root / part).read_bytes()
    assert run.read_weights(1) == expected.read_weights(1)


def read_attempts(run: Run) -> list[dict[str, Any]]:
    attempts: list[dict[str, Any]] = json.loads((run.root / "launch.json").read_text())["attempts"]
    return attempts


def list_outcomes(run: Run) -> list[str]:
    return [attempt["outcome"] for attempt in read_attempts(run)]


def tell_times(run: Run) -> None:
    """What the siblings' end and the next step took, for whoever runs pytest with -s; nothing depends on it."""
    struck_s, stepped_s = ((run.folder / mark).stat().st_mtime for mark in (STRUCK, STEPPED))
    ended_s = datetime.fromisoformat(read_attempts(run)[0]["ended"]).timestamp()
    print(f"\nfrom the fault: all ranks gone in {ended_s - struck_s:.1f} s, next step in {stepped_s - struck_s:.1f} s")


@pytest.mark.parametrize(
    ("ranks", "sets", "fault", "told_of"),
    [(1, RECIPE, "SIGKILL", "0"), (2, PAIR, "SIGKILL of rank 1", "1"), (2, (*PAIR, WORKER), "whole fold", "[01]")],
)
def test_a_fold_that_is_killed_is_started_again(
    trainer: Trainer,
    undisturbed: Run,
    undisturbed_pair: Run,
    ranks: int,
    sets: tuple[str, ...],
    fault: str,
    told_of: str,
) -> None:
    launched = launch(trainer, sets, "--slots", str(ranks), fault=fault)
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["crashed", "done"]
    tell_times(launched.run)
    told = "\n".join(launched.log)
    assert re.search(f": failed: rank {told_of} was killed by SIGKILL, last seen in ", told)
    assert "; its last lines:\n  | " in told and "\n  log: " in told
    assert "[LAUNCH] fold 1: starts again in 1 s, restart 1 of 2" in launched.log
    assert_same(launched.run, undisturbed if ranks == 1 else undisturbed_pair)


@pytest.mark.parametrize(("ranks", "fault"), [(1, "SIGTERM"), (2, "SIGINT of rank 1"), (2, "slow save")])
def test_a_fold_that_somebody_else_stops_goes_on_and_no_restart_is_counted(
    trainer: Trainer, undisturbed: Run, undisturbed_pair: Run, ranks: int, fault: str
) -> None:
    sets, slots = (RECIPE, "1") if ranks == 1 else (PAIR, "2")
    launched = launch(trainer, sets, "--slots", slots, "--max-restarts", "0", fault=fault)
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["left", "done"]
    left = [line for line in launched.log if ", asked by another; it goes on from where it was: " in line]
    number = "SIGTERM" if fault == "slow save" else fault.partition(" ")[0]
    assert len(left) == 1 and left[0].endswith(f"{number} received"), launched.log
    logs = "".join(log.read_text() for log in sorted(launched.run.folder.glob("logs/*_fold1.log")))
    assert re.findall(r"^\[RESUME\] fold=1 from step (\d+) .* s of work done again$", logs, re.MULTILINE) == ["4"]
    assert_same(launched.run, undisturbed if ranks == 1 else undisturbed_pair)


def test_a_fold_that_its_owner_finishes_meanwhile_is_merged(trainer: Trainer) -> None:
    """Fold 0 is refused to the launcher, whose own folds end last."""
    alone = trainer.train(*PLAIN, "data.valid_fold=0")
    folder = trainer.new_folder()
    paths = RunPaths(folder / "experiments" / alone.root.parent.name / "tiny")
    with hold_lock(paths.fold_lock(0), "fold 0 is being trained"):
        process = start(trainer, PLAIN, folder, "--slots", "1", fault="impatient")
        await_event(lambda: not process.is_alive() or has_ended(folder, 0), "the refusal", folder)
        assert not paths.heartbeat(0, 0).exists(), "it is the owner's file"
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


def test_a_ledger_that_cannot_be_written_ends_no_fold(trainer: Trainer, undisturbed: Run) -> None:
    launched = launch(trainer, RECIPE, "--slots", "1", fault="ledger that can't be written")
    assert launched.code == 0, launched.out + launched.err
    warnings = [line for line in launched.log if line.startswith("[WARNING] ") and "launch.json" in line]
    assert len(warnings) == 1 and warnings[0].endswith(": the folds go on, and it is tried again")
    assert list_outcomes(launched.run) == ["crashed", "done"]
    assert_same(launched.run, undisturbed)


def test_a_fold_whose_loader_worker_is_killed_is_started_again(trainer: Trainer, undisturbed: Run) -> None:
    launched = launch(trainer, (*RECIPE, WORKER), "--slots", "1", fault="loader worker")
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["crashed", "done"]
    tell_times(launched.run)
    assert any("was killed by SIGKILL while " in line for line in launched.log)
    assert_same(launched.run, undisturbed)


def test_a_killed_launcher_takes_all_with_it_and_the_same_command_goes_on(trainer: Trainer, undisturbed: Run) -> None:
    folder, sets = trainer.new_folder(), (*RECIPE, WORKER)
    killed = finish(start(trainer, sets, folder, "--slots", "1", fault="launcher"), folder)
    assert killed.code == -signal.SIGKILL
    assert_none_left(folder)
    assert list_outcomes(killed.run) == [None]
    relaunched = launch(trainer, sets, "--slots", "1", folder=folder)
    assert relaunched.code == 0, relaunched.out + relaunched.err
    assert list_outcomes(relaunched.run) == ["lost", "done"]
    assert any("ended with its launcher, which was killed" in line for line in relaunched.log)
    assert_same(relaunched.run, undisturbed)


def test_a_silent_rank_writes_its_stacks_and_its_fold_is_started_again(trainer: Trainer, undisturbed_pair: Run) -> None:
    words = ("--slots", "2", "--hang-timeout", "10s")
    launched = launch(trainer, PAIR, *words, fault="SIGSTOP of rank 1")
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["hung", "done"]
    tell_times(launched.run)
    told = "\n".join(launched.log)
    assert re.search(
        r"no progress within 10 s \(--hang-timeout\) on \S+: rank 0 [0-9.]+ s since (train|validate) step \d, epoch \d",
        told,
    )
    assert re.search(r"rank 1 [0-9.]+ s since (train|validate) step \d, epoch \d \(stopped\)", told)
    for rank in range(2):
        console = (launched.run.root / "console" / f"fold1_rank{rank}.txt").read_text()
        assert "(most recent call first):" in console and "doccls/training/step.py" in console
    assert_same(launched.run, undisturbed_pair)


def test_out_of_memory_halves_the_images_at_a_time_and_keeps_the_batch(trainer: Trainer, undisturbed: Run) -> None:
    fault, folder, words, sizes = "out of memory above 3", trainer.new_folder(), ("--slots", "1"), [11, 6, 3]
    launched = launch(trainer, RECIPE, *words, "--max-restarts", "0", fault=fault, folder=folder)
    assert launched.code == 0, launched.out + launched.err
    assert list_outcomes(launched.run) == ["out of memory"] * (len(sizes) - 1) + ["done"]
    assert [attempt["micro_batch_size"] for attempt in read_attempts(launched.run)] == sizes
    for size in sizes[1:]:
        assert any(f"starts again with train.micro_batch_size={size}, the same batch" in one for one in launched.log)
    part, whole = launched.run.predictions(1), undisturbed.predictions(1)
    assert part.info.micro_batch_size == sizes[-1]
    assert part.logits_NC == pytest.approx(whole.logits_NC, abs=1e-4)  # sums of fewer images, in another order
    # A later launch of the run does not find out again, and trains as one that began so.
    file = launched.run.root / "oof" / "parts" / "fold1.safetensors"
    file.unlink()
    relaunched = launch(trainer, RECIPE, *words, fault=fault, folder=folder)
    assert relaunched.code == 0, relaunched.out + relaunched.err
    assert "[LAUNCH] fold 1: train.micro_batch_size=3, since an earlier launch" in "\n".join(relaunched.log)
    assert [attempt["micro_batch_size"] for attempt in read_attempts(relaunched.run)] == [*sizes, 3]
    assert_same(relaunched.run, trainer.train(*RECIPE, f"train.micro_batch_size={sizes[-1]}"))


def test_out_of_memory_of_one_rank_halves_the_images_of_both(trainer: Trainer, undisturbed_pair: Run) -> None:
    launched = launch(trainer, PAIR, "--slots", "2", fault="out of memory above 3 of rank 1")
    assert launched.code == 0, launched.out + launched.err
    assert_none_left(launched.run.folder)
    assert [attempt["micro_batch_size"] for attempt in read_attempts(launched.run)] == [6, 3]
    told = "failed: rank 1: CUDA out of memory on cpu:0: asked for 2.00 GiB. Less is needed with train.micro_batch_size"
    assert any(told in line for line in launched.log)
    assert launched.run.predictions(1).logits_NC == pytest.approx(undisturbed_pair.predictions(1).logits_NC, abs=1e-4)


def test_an_error_that_comes_back_at_the_same_step_is_not_met_a_third_time(trainer: Trainer) -> None:
    launched = launch(trainer, RECIPE, "--slots", "1", "--max-restarts", "9", fault="error")
    assert launched.code == 1
    assert_none_left(launched.run.folder)
    assert list_outcomes(launched.run) == ["crashed", "crashed"]
    assert "1 fold failed\n- fold 1: 'a defect', log: " in launched.err


def test_ctrl_c_twice_ends_all_at_once(trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    process = start(trainer, RECIPE, folder, "--slots", "1", fault="SIGSTOP")  # it can't leave by itself
    await_event(lambda: not process.is_alive() or (folder / STRUCK).exists(), "the stop", folder)
    os.killpg(process.pid, signal.SIGINT)
    await_event(
        lambda: "are asked to leave" in (folder / CONSOLE / "rank0.out").read_text(), "the word of the first", folder
    )

    def kill_again() -> bool:
        with suppress(ProcessLookupError):  # it may end between the look and the signal
            if process.is_alive():
                os.killpg(process.pid, signal.SIGINT)  # within a second it is taken for an echo
        return not process.is_alive()

    await_event(kill_again, "the end", folder)
    ended = finish(process, folder)
    assert ended.code == 130
    assert_none_left(folder)
    relaunched = launch(trainer, RECIPE, "--slots", "1", folder=folder)
    # The launcher may have seen the end of the fold that it killed, before its own.
    assert relaunched.code == 0 and list_outcomes(relaunched.run) in (["lost", "done"], ["crashed", "done"])
    assert_same(relaunched.run, undisturbed)


def test_a_run_that_is_launched_is_refused_to_a_second_launcher_and_can_be_cancelled(trainer: Trainer) -> None:
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
    assert [one["pid"] for one in status["launchers"]] == [process.pid] and status["folds"][1]["state"] == "running"
    assert " epoch " in status["folds"][1]["remark"]
    assert process.is_alive()
    assert "[CANCEL] stopped" in ask(folder, "cancel", str(Run([], folder).root))
    assert finish(process, folder).code == 143
    status = json.loads(ask(folder, "status", "--json", str(Run([], folder).root)))
    assert status["launchers"] == [] and status["folds"][1]["state"] == "stopped"
    assert_none_left(folder)
