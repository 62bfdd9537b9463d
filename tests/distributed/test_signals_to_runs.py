"""A signal to a run at any point: an end marker in the log, the signal's exit code, and nothing left behind."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
from rank_launcher import REPOSITORY, clean_environment, find_free_port, launch_ranks, start_ranks
from signal_programs import FORKS, GO, HELD
from tiny_runs import PLAIN, RICH, Run, Trainer

from doccls.run.heartbeat import read_beat
from tests.unit.test_signals import WRITES, count_writes

START_S = 100
END_S = 60
LONG = (*RICH, "train.epochs=500", "train.log_interval=1")
STOPS = int(os.environ.get("DOCCLS_TEST_STOPS", "4"))


def await_event(happened: Callable[[], bool], within_s: float, what: str, folder: Path) -> None:
    """Wait until it has happened; otherwise fail with the ends of all logs and consoles."""
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            outputs = {
                str(file): file.read_text()[-3000:] for file in folder.rglob("*") if file.suffix in (".log", ".err")
            }
            pytest.fail(f"timed out after {within_s} s: {what}\n{outputs}")
        time.sleep(0.02)


def has_logged_epoch_2(folder: Path) -> bool:
    logs = list(folder.glob("logs/*"))
    return bool(logs) and "[EPOCH 2]" in logs[0].read_text()


def has_logged_step(folder: Path) -> bool:
    logs = list(folder.glob("logs/*"))
    return bool(logs) and "[STEP 1/" in logs[0].read_text()


def assert_ended_cleanly(folder: Path, code: int, killed: str = "no rank") -> None:
    """Check log and files; the rank `killed` (such as `rank1`) may have died while it wrote its heartbeat."""
    (log,) = folder.glob("logs/*")
    lines = log.read_text().splitlines()
    assert lines[-2:] == [f"[EXIT] TRAINING ERROR code={code}", ">> Stopping logger and restoring stdio"], lines[-5:]
    assert sum(line.startswith("[EXIT]") for line in lines) == 1
    assert "Traceback" not in log.read_text()
    assert [file for file in folder.rglob("*.tmp") if f"_{killed}.json." not in file.name] == []
    assert not list(folder.glob("experiments/*/*/oof/parts/*"))


def expected_exit_lines(number: signal.Signals) -> list[str]:
    return [f"[EXIT][ERROR] training failed: {number.name} received"]


def select_exit_lines(text: str) -> list[str]:
    assert "Traceback" not in text and "Exception" not in text, text
    return [line for line in text.splitlines() if line.startswith("[EXIT]")]


@contextmanager
def running(
    trainer: Trainer, program: str, sets: tuple[str, ...], world_size: int = 1
) -> Iterator[tuple[Path, list[ForkServerProcess]]]:
    """Start ranks in a new folder; kill those still running at the end of the block."""
    folder = trainer.new_folder()
    variables = {"DOCCLS_TEST_FOLDER": str(folder)}
    ranks = start_ranks(program, trainer.arguments(sets, folder), folder / "console", world_size, variables)
    try:
        yield folder, ranks
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
            rank.join(10)


def join(ranks: list[ForkServerProcess], folder: Path) -> list[int | None]:
    await_event(lambda: not any(rank.is_alive() for rank in ranks), END_S, "the ranks' end", folder)
    return [rank.exitcode for rank in ranks]


@pytest.mark.parametrize(
    ("number", "to_group"), [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGTERM, True)]
)
def test_signal_ends_a_run_cleanly(trainer: Trainer, number: signal.Signals, to_group: bool) -> None:
    """Send SIGTERM as `kill` does, SIGINT as a terminal does (to the workers too), SIGTERM as Slurm does.

    Also, no process of the run forks while it has more than one thread.
    """
    with running_with_workers(trainer) as (folder, process, workers):
        assert process.pid is not None
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert join([process], folder) == [128 + number]
        _, left = psutil.wait_procs(workers, timeout=10)
        assert left == []
    assert_ended_cleanly(folder, 128 + number)
    assert Run([], folder).read_metrics()[-1]["fold"] == 0
    assert select_exit_lines((folder / "console" / "rank0.err").read_text()) == expected_exit_lines(number)
    forks = [line.split() for line in (folder / FORKS).read_text().splitlines()]
    assert len(forks) >= 2, "the workers' forks were not recorded"
    assert {threads for _, threads in forks} == {"1"}


def test_workers_end_with_a_killed_run(trainer: Trainer) -> None:
    with running_with_workers(trainer) as (folder, process, workers):
        process.kill()
        assert join([process], folder) == [-signal.SIGKILL]
        _, left = psutil.wait_procs(workers, timeout=30)
        assert left == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_wait_until_the_resume_checkpoint_is_saved(trainer: Trainer, world_size: int) -> None:
    """The write may take up to `train.stop_timeout_s`."""
    sets = (*LONG, "train.stop_timeout_s=600")
    with running(trainer, "signal_programs:hold_save", sets, world_size) as (folder, ranks):
        await_event(lambda: has_logged_step(folder), START_S, "a step", folder)
        ranks[-1].terminate()
        await_event(lambda: (folder / HELD).exists(), START_S, "the write", folder)
        (live,) = folder.glob("experiments/*/*/live")
        beats = [live / f"all_rank{rank}.json" for rank in range(world_size)]
        stopping = lambda: all((beat := read_beat(path)) and beat.phase == "stopping" for path in beats)  # noqa: E731
        await_event(stopping, START_S, "the stop of all ranks", folder)
        assert all(rank.is_alive() for rank in ranks)
        (folder / GO).touch()
        assert join(ranks, folder) == [143] * world_size
    assert_ended_cleanly(folder, 143)
    assert len(list(folder.glob("experiments/*/*/ckpt/last_fold0_*.safetensors"))) == 1


def test_closed_terminal_stops_a_run_with_a_resume_checkpoint(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    master, slave = os.openpty()
    variables = {"DOCCLS_TEST_TERMINAL": os.ttyname(slave)}
    program = "signal_programs:train_on_terminal"
    (process,) = start_ranks(program, trainer.arguments(LONG, folder), folder / "console", environment=variables)
    try:
        await_event(lambda: not process.is_alive() or has_logged_step(folder), START_S, "a step", folder)
        os.close(slave)
        os.close(master)
        assert join([process], folder) == [128 + signal.SIGHUP]
    finally:
        process.kill()
        process.join(10)
    assert_ended_cleanly(folder, 128 + signal.SIGHUP)
    assert len(list(folder.glob("experiments/*/*/ckpt/last_fold0_*.safetensors"))) == 1


def test_second_process_is_rejected_while_a_fold_is_trained(trainer: Trainer) -> None:
    """Two terminals, or a job that was requeued while its first start still runs."""
    folder, sets = trainer.new_folder(), (*LONG, "data.valid_fold=1")
    arguments = trainer.arguments(sets, folder, run_id="tiny")
    first, second = folder / "console", folder / "second"
    (owner,) = start_ranks("doccls.train:main", arguments, first)
    try:
        await_event(lambda: not owner.is_alive() or has_logged_epoch_2(folder), START_S, "an epoch", folder)
        for sets in ((*LONG, "data.valid_fold=1"), LONG):  # the fold alone, and all of them
            (rejected,) = launch_ranks("doccls.train:main", trainer.arguments(sets, folder, run_id="tiny"), second)
            assert rejected.code == 1
            assert f"fold 1 of run tiny is being trained by process {owner.pid} on " in rejected.stderr
        assert owner.is_alive()
        owner.terminate()
        assert join([owner], folder) == [143]
    finally:
        owner.kill()
        owner.join(10)
    assert len(list(folder.glob("experiments/*/tiny/ckpt/last_fold1_*.safetensors"))) >= 1


@contextmanager
def running_with_workers(trainer: Trainer) -> Iterator[tuple[Path, ForkServerProcess, list[psutil.Process]]]:
    """Start a run with two loader workers in its own process group; yield it after two epochs with all descendants.

    Each process records its forks in the file FORKS.
    """
    with running(trainer, "signal_programs:record_forks", (*LONG, "data.num_workers=2")) as (folder, (process,)):
        await_event(lambda: not process.is_alive() or has_logged_epoch_2(folder), START_S, "an epoch", folder)
        assert process.is_alive(), (folder / "console" / "rank0.err").read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3, "two workers and their server"
        yield folder, process, children


@pytest.mark.parametrize("signalled", [(0, 1), (1,), (0,)])
def test_all_ranks_stop_together_whichever_was_signalled(trainer: Trainer, signalled: tuple[int, ...]) -> None:
    """Send SIGTERM to each rank, as torchrun and Slurm do, or to one; the others stop at the same step."""
    with running(trainer, "doccls.train:main", LONG, 2) as (folder, ranks):
        await_event(lambda: has_logged_epoch_2(folder), START_S, "an epoch", folder)
        for number in signalled:
            ranks[number].terminate()
        assert join(ranks, folder) == [143, 143], (folder / "console" / "rank1.err").read_text()
    assert_ended_cleanly(folder, 143)
    assert select_exit_lines((folder / "console" / "rank0.err").read_text()) == expected_exit_lines(signal.SIGTERM)
    assert (folder / "console" / "rank1.err").read_text() == ""


@pytest.mark.parametrize("world_size", [1, 2])
def test_stop_during_merge_lets_the_run_finish(trainer: Trainer, world_size: int) -> None:
    """Nothing else is left to do; other ranks wait for the merge, and would fail if the main process exited."""
    folder = trainer.new_folder()
    argv = trainer.arguments((*PLAIN, "train.epochs=1"), folder, "r")
    ranks = launch_ranks("signal_programs:stop_in_merge", argv, folder / "console", world_size)
    assert [rank.code for rank in ranks] == [0] * world_size, ranks[0].stderr
    (log,) = folder.glob("logs/*.log")
    assert "[EXIT] TRAINING SUCCESS code=0" in log.read_text() and list(folder.glob("experiments/*/r/summary.json"))


def test_stop_between_the_last_fold_and_the_merge_lets_the_run_finish(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    argv = trainer.arguments((*PLAIN, "train.epochs=1"), folder, "r")
    ranks = launch_ranks("signal_programs:stop_before_merge", argv, folder / "console", 2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[1].stderr
    (log,) = folder.glob("logs/*.log")
    assert "[EXIT] TRAINING SUCCESS code=0" in log.read_text() and list(folder.glob("experiments/*/r/summary.json"))


def test_stop_between_folds_ends_all_ranks_alike(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    argv = trainer.arguments((*PLAIN, "train.epochs=1"), folder, "r")
    ranks = launch_ranks("signal_programs:stop_between_folds", argv, folder / "console", 2)
    assert [rank.code for rank in ranks] == [143, 143], ranks[1].stderr
    assert [file.name for file in folder.glob("experiments/*/r/oof/parts/*")] == ["fold0.safetensors"]


def test_ranks_with_slow_steps_stop_between_log_lines(trainer: Trainer) -> None:
    """A stop must not wait for the next log line, which may be a hundred steps of ten seconds away."""
    sets = (*RICH, "train.log_interval=1000", "train.batch_size=2", "train.mix_prob=0", "train.epochs=500")
    with running(trainer, "signal_programs:slow_steps", sets, 2) as (folder, ranks):
        beats = lambda: [read_beat(path) for path in folder.glob("experiments/*/*/live/all_rank*.json")]  # noqa: E731
        steps = lambda: [beat.step for beat in beats() if beat is not None]  # noqa: E731
        await_event(lambda: max(steps(), default=0) >= 2, START_S, "two steps", folder)
        ranks[1].terminate()
        assert join(ranks, folder) == [143] * 2
        assert len(set(steps())) == 1 and steps()[0] < 16, "not at one step, or too late in the epoch"
    assert_ended_cleanly(folder, 143)
    assert len(list(folder.glob("experiments/*/*/ckpt/last_fold0_*.safetensors"))) == 1


def test_accelerate_launch_with_workers_stops_in_long_steps(trainer: Trainer) -> None:
    """The launcher and all workers are signalled, the launcher forwards the signal, and ranks block in C calls."""
    folder = trainer.new_folder()
    sets = (*LONG, "data.num_workers=2", "train.batch_size=12")
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file"),
        *(REPOSITORY / "accelerate_configs" / "cpu_2.yaml", "--main_process_port", str(find_free_port())),
        *("-m", "tests.distributed.signal_programs", *trainer.arguments(sets, folder)),
    ]
    here = Path(__file__).parent
    environment = clean_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(here), environment["PYTHONPATH"]])
    folder.mkdir()
    with (folder / "run.out").open("w") as out, (folder / "run.err").open("w") as err:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True
        )  # fmt: skip
    try:
        await_event(lambda: process.poll() is not None or has_logged_step(folder), START_S, "a step", folder)
        assert process.poll() is None, (folder / "run.err").read_text()
        descendants = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(END_S)
        _, left = psutil.wait_procs(descendants, timeout=30)
        assert left == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    assert_ended_cleanly(folder, 143)
    assert (folder / "run.err").read_text().count("[EXIT]") == 1
    assert "rank 1 on " not in (folder / "run.err").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_at_once_even_in_a_c_call(trainer: Trainer, number: signal.Signals) -> None:
    with running(trainer, "signal_programs:hold_step", LONG) as (folder, ranks):
        (rank,) = ranks
        assert rank.pid is not None
        _await_hold(folder, rank)
        os.kill(rank.pid, number)
        console = folder / "console" / "rank0.err"
        await_event(lambda: "a second signal exits" in console.read_text(), END_S, "the message of the first", folder)

        def signal_again() -> bool:
            with suppress(ProcessLookupError):  # it may end between the check and the signal
                if rank.is_alive():
                    os.kill(rank.pid, number)  # within a second of the first it counts as the same signal
            return not rank.is_alive()

        await_event(signal_again, END_S, "the end", folder)
        assert join(ranks, folder) == [128 + number]
    assert_ended_cleanly(folder, 128 + number)
    assert select_exit_lines(console.read_text()) == expected_exit_lines(number)


@pytest.mark.parametrize("phase", ["scan", "model"])
def test_first_signal_ends_at_once_before_training(trainer: Trainer, phase: str) -> None:
    with running(trainer, f"signal_programs:hold_{phase}", (*LONG, "model.pretrained=true")) as (folder, ranks):
        _await_hold(folder, ranks[0])
        ranks[0].terminate()
        assert join(ranks, folder) == [143]
    assert_ended_cleanly(folder, 143)
    assert select_exit_lines((folder / "console" / "rank0.err").read_text()) == expected_exit_lines(signal.SIGTERM)
    assert (folder / "experiments").exists() == (phase != "scan")


@pytest.mark.parametrize("kind", WRITES)
def test_immediate_end_in_any_write_call_keeps_the_old_file_complete(
    trainer: Trainer, tmp_path: Path, kind: str
) -> None:
    calls = range(count_writes(kind, tmp_path / "file"))
    for first in calls[::8]:
        _end_in_write_calls(trainer, kind, calls[first : first + 8])


def _end_in_write_calls(trainer: Trainer, kind: str, calls: range) -> None:
    """Signal one process per call, in parallel, each blocked in its write call."""
    folders = [trainer.new_folder() for _ in calls]
    ranks = []
    for folder, call in zip(folders, calls, strict=True):
        path = folder / "target" / "file"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"old")
        argv, variables = [kind, str(call), str(path)], {"DOCCLS_TEST_FOLDER": str(folder)}
        ranks += start_ranks("signal_programs:hold_write", argv, folder / "console", environment=variables)
    try:
        for folder, rank in zip(folders, ranks, strict=True):
            _await_hold(folder, rank)
            rank.terminate()
            assert join([rank], folder) == [143], (folder / "console" / "rank0.err").read_text()
            assert (folder / "target" / "file").read_bytes() == b"old"
            assert [file.name for file in (folder / "target").iterdir()] == ["file"]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(10)


def _await_hold(folder: Path, rank: ForkServerProcess) -> None:
    await_event(lambda: (folder / HELD).exists() or not rank.is_alive(), START_S, "the block", folder)


@pytest.mark.parametrize("seed", range(-(-STOPS // 5)))
def test_stops_at_random_moments_of_short_epochs_with_checkpoints(trainer: Trainer, seed: int) -> None:
    """Stop five runs, each somewhere in a step, a save or a validation.

    Every third run has loader workers, which must end too.
    """
    rng = random.Random(seed)
    for count in range(5):
        number, workers = rng.choice([signal.SIGINT, signal.SIGTERM]), 0 if count % 3 else 2
        sets = (*LONG, f"data.num_workers={workers}")
        with running(trainer, "signal_programs:improve_each_epoch", sets) as (folder, ranks):
            await_event(lambda folder=folder: has_logged_epoch_2(folder), START_S, "an epoch", folder)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 0.3))  # until a random moment; there is no event to wait for
            assert ranks[0].pid is not None
            descendants = psutil.Process(ranks[0].pid).children(recursive=True)
            assert len(descendants) >= workers
            os.kill(ranks[0].pid, number)
            assert join(ranks, folder) == [128 + number], f"stop {count}"
            assert psutil.wait_procs(descendants, timeout=30)[1] == [], f"stop {count}"
        assert_ended_cleanly(folder, 128 + number)
