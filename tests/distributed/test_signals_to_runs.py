"""A signal to a run: the marked end of the log, the signal's exit code, nothing left behind, wherever it struck."""

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
from tiny_runs import RICH, Run, Trainer

from doccls.run.heartbeat import read_beat
from tests.unit.test_signals import WRITES, count_writes

START_S = 100
END_S = 60
LONG = (*RICH, "train.epochs=500", "train.log_interval=1")
STOPS = int(os.environ.get("DOCCLS_TEST_STOPS", "10"))


def await_event(happened: Callable[[], bool], within_s: float, what: str, folder: Path) -> None:
    """Until it happened; else fail with all that the processes said."""
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            said = {
                str(file): file.read_text()[-3000:] for file in folder.rglob("*") if file.suffix in (".log", ".err")
            }
            pytest.fail(f"not within {within_s} s: {what}\n{said}")
        time.sleep(0.02)


def trains(folder: Path) -> bool:
    logs = list(folder.glob("logs/*"))
    return bool(logs) and "[EPOCH 2]" in logs[0].read_text()


def has_begun_steps(folder: Path) -> bool:
    logs = list(folder.glob("logs/*"))
    return bool(logs) and "[STEP 1/" in logs[0].read_text()


def assert_ended_well(folder: Path, code: int, killed: str = "no rank") -> None:
    """`killed`, such as `rank1`, may have been killed while it wrote its heartbeat."""
    (log,) = folder.glob("logs/*")
    lines = log.read_text().splitlines()
    assert lines[-2:] == [f"[EXIT] TRAINING ERROR code={code}", ">> Stopping logger and restoring stdio"], lines[-5:]
    assert sum(line.startswith("[EXIT]") for line in lines) == 1
    assert "Traceback" not in log.read_text()
    assert [file for file in folder.rglob("*.tmp") if f"_{killed}.json." not in file.name] == []
    assert not list(folder.glob("experiments/*/*/oof/parts/*"))


def last_words(number: signal.Signals) -> list[str]:
    return [f"[EXIT][ERROR] training failed: {number.name} received"]


def select_last_words(text: str) -> list[str]:
    assert "Traceback" not in text and "Exception" not in text, text
    return [line for line in text.splitlines() if line.startswith("[EXIT]")]


@contextmanager
def running(
    trainer: Trainer, program: str, sets: tuple[str, ...], world_size: int = 1
) -> Iterator[tuple[Path, list[ForkServerProcess]]]:
    """Ranks on their way in a folder of their own; what of them is left at the end of the block is killed."""
    folder = trainer.new_folder()
    told = {"DOCCLS_TEST_FOLDER": str(folder)}
    ranks = start_ranks(program, trainer.arguments(sets, folder), folder / "console", world_size, told)
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
def test_a_signal_ends_a_run_in_good_order(trainer: Trainer, number: signal.Signals, to_group: bool) -> None:
    """SIGTERM as `kill` sends it, SIGINT as a terminal does (to the workers too), SIGTERM as Slurm does.

    And no process of the run has forked while it had more than one thread.
    """
    with with_workers(trainer) as (folder, process, workers):
        assert process.pid is not None
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert join([process], folder) == [128 + number]
        _, left = psutil.wait_procs(workers, timeout=10)
        assert left == []
    assert_ended_well(folder, 128 + number)
    assert Run([], folder).read_metrics()[-1]["fold"] == 0
    assert select_last_words((folder / "console" / "rank0.err").read_text()) == last_words(number)
    forks = [line.split() for line in (folder / FORKS).read_text().splitlines()]
    assert len(forks) >= 2, "the workers' forks were seen"
    assert {threads for _, threads in forks} == {"1"}


def test_workers_end_with_a_run_that_is_killed(trainer: Trainer) -> None:
    with with_workers(trainer) as (folder, process, workers):
        process.kill()
        assert join([process], folder) == [-signal.SIGKILL]
        _, left = psutil.wait_procs(workers, timeout=30)
        assert left == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_stay_until_the_state_is_saved(trainer: Trainer, world_size: int) -> None:
    """However long the write takes; its limit is that of the stop."""
    sets = (*LONG, "train.stop_timeout_s=600")
    with running(trainer, "signal_programs:hold_a_save", sets, world_size) as (folder, ranks):
        await_event(lambda: has_begun_steps(folder), START_S, "a step", folder)
        ranks[-1].terminate()
        await_event(lambda: (folder / HELD).exists(), START_S, "the write", folder)
        (live,) = folder.glob("experiments/*/*/live")
        beats = [live / f"all_rank{rank}.json" for rank in range(world_size)]
        stopping = lambda: all((beat := read_beat(path)) and beat.phase == "stopping" for path in beats)  # noqa: E731
        await_event(stopping, START_S, "the stop of all ranks", folder)
        assert all(rank.is_alive() for rank in ranks)
        (folder / GO).touch()
        assert join(ranks, folder) == [143] * world_size
    assert_ended_well(folder, 143)
    assert len(list(folder.glob("experiments/*/*/ckpt/last_fold0_*.safetensors"))) == 1


def test_a_closed_terminal_stops_a_run_with_its_state_saved(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    ours, theirs = os.openpty()
    variables = {"DOCCLS_TEST_TERMINAL": os.ttyname(theirs)}
    program = "signal_programs:train_on_a_terminal"
    (process,) = start_ranks(program, trainer.arguments(LONG, folder), folder / "console", environment=variables)
    try:
        await_event(lambda: not process.is_alive() or has_begun_steps(folder), START_S, "a step", folder)
        os.close(theirs)
        os.close(ours)
        assert join([process], folder) == [128 + signal.SIGHUP]
    finally:
        process.kill()
        process.join(10)
    assert_ended_well(folder, 128 + signal.SIGHUP)
    assert len(list(folder.glob("experiments/*/*/ckpt/last_fold0_*.safetensors"))) == 1


def test_a_fold_that_is_trained_is_refused_to_a_second_process_and_goes_on(trainer: Trainer) -> None:
    """Two terminals, or a job that was requeued while its first still lives."""
    folder, sets = trainer.new_folder(), (*LONG, "data.valid_fold=1")
    words = trainer.arguments(sets, folder, run_id="tiny")
    first, second = folder / "console", folder / "second"
    (owner,) = start_ranks("doccls.train:main", words, first)
    try:
        await_event(lambda: not owner.is_alive() or trains(folder), START_S, "an epoch", folder)
        for sets in ((*LONG, "data.valid_fold=1"), LONG):  # the fold alone, and all of them
            (refused,) = launch_ranks("doccls.train:main", trainer.arguments(sets, folder, run_id="tiny"), second)
            assert refused.code == 1
            assert f"fold 1 of run tiny is being trained by process {owner.pid} on " in refused.stderr
        assert owner.is_alive()
        owner.terminate()
        assert join([owner], folder) == [143]
    finally:
        owner.kill()
        owner.join(10)
    assert len(list(folder.glob("experiments/*/tiny/ckpt/last_fold1_*.safetensors"))) >= 1


@contextmanager
def with_workers(trainer: Trainer) -> Iterator[tuple[Path, ForkServerProcess, list[psutil.Process]]]:
    """A run with two loader workers, in its second epoch and in a process group of its own, and all processes under it.

    Each of them writes its forks into the file FORKS.
    """
    with running(trainer, "signal_programs:note_forks", (*LONG, "data.num_workers=2")) as (folder, (process,)):
        await_event(lambda: not process.is_alive() or trains(folder), START_S, "an epoch", folder)
        assert process.is_alive(), (folder / "console" / "rank0.err").read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3, "two workers and their server"
        yield folder, process, children


@pytest.mark.parametrize("struck", [(0, 1), (1,), (0,)])
def test_all_ranks_leave_together_whichever_was_asked(trainer: Trainer, struck: tuple[int, ...]) -> None:
    """As torchrun and Slurm end a job: SIGTERM to each; or to one, and the others leave at its step."""
    with running(trainer, "doccls.train:main", LONG, 2) as (folder, ranks):
        await_event(lambda: trains(folder), START_S, "an epoch", folder)
        for number in struck:
            ranks[number].terminate()
        assert join(ranks, folder) == [143, 143], (folder / "console" / "rank1.err").read_text()
    assert_ended_well(folder, 143)
    assert select_last_words((folder / "console" / "rank0.err").read_text()) == last_words(signal.SIGTERM)
    assert (folder / "console" / "rank1.err").read_text() == ""


def test_ranks_with_slow_steps_stop_between_two_log_lines(trainer: Trainer) -> None:
    """A hundred steps of ten seconds between two lines must not keep a stop from its checkpoint."""
    sets = (*RICH, "train.log_interval=1000", "train.batch_size=2", "train.epochs=500")
    with running(trainer, "signal_programs:slow_steps", sets, 2) as (folder, ranks):
        find = lambda: [read_beat(path) for path in folder.glob("experiments/*/*/live/all_rank*.json")]  # noqa: E731
        steps = lambda: [beat.step for beat in find() if beat is not None]  # noqa: E731
        await_event(lambda: max(steps(), default=0) >= 2, START_S, "two steps", folder)
        ranks[1].terminate()
        assert join(ranks, folder) == [143] * 2
        assert len(set(steps())) == 1 and steps()[0] < 16, "at one step, long before the epoch's end"
    assert_ended_well(folder, 143)
    assert len(list(folder.glob("experiments/*/*/ckpt/last_fold0_*.safetensors"))) == 1


def test_accelerate_launch_with_workers_is_stopped_in_the_midst_of_long_steps(trainer: Trainer) -> None:
    """The whole group is signalled, the workers too, and the launcher forwards it, while the ranks stand in C."""
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
        await_event(lambda: process.poll() is not None or has_begun_steps(folder), START_S, "a step", folder)
        assert process.poll() is None, (folder / "run.err").read_text()
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(END_S)
        _, left = psutil.wait_procs(family, timeout=30)
        assert left == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    assert_ended_well(folder, 143)
    assert (folder / "run.err").read_text().count("[EXIT]") == 1
    assert "rank 1 on " not in (folder / "run.err").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_also_in_a_c_call(trainer: Trainer, number: signal.Signals) -> None:
    with running(trainer, "signal_programs:hold_a_step", LONG) as (folder, ranks):
        (rank,) = ranks
        assert rank.pid is not None
        _await_hold(folder, rank)
        os.kill(rank.pid, number)
        told = folder / "console" / "rank0.err"
        await_event(lambda: "a second signal exits" in told.read_text(), END_S, "the word of the first", folder)

        def kill_again() -> bool:
            with suppress(ProcessLookupError):  # it may end between the look and the signal
                if rank.is_alive():
                    os.kill(rank.pid, number)  # within a second it is taken for an echo
            return not rank.is_alive()

        await_event(kill_again, END_S, "the end", folder)
        assert join(ranks, folder) == [128 + number]
    assert_ended_well(folder, 128 + number)
    assert select_last_words(told.read_text()) == last_words(number)


@pytest.mark.parametrize("place", ["the_look_at_the_data", "the_model"])
def test_before_training_and_in_waits_for_others_the_first_signal_ends_at_once(trainer: Trainer, place: str) -> None:
    with running(trainer, f"signal_programs:hold_{place}", LONG) as (folder, ranks):
        _await_hold(folder, ranks[0])
        ranks[0].terminate()
        assert join(ranks, folder) == [143]
    assert_ended_well(folder, 143)
    assert select_last_words((folder / "console" / "rank0.err").read_text()) == last_words(signal.SIGTERM)
    assert (folder / "experiments").exists() == (place != "the_look_at_the_data")


@pytest.mark.parametrize("kind", WRITES)
def test_an_end_at_once_in_any_write_call_leaves_the_old_file_whole(
    trainer: Trainer, tmp_path: Path, kind: str
) -> None:
    calls = range(count_writes(kind, tmp_path / "file"))
    for first in calls[::8]:
        _end_in_write_calls(trainer, kind, calls[first : first + 8])


def _end_in_write_calls(trainer: Trainer, kind: str, calls: range) -> None:
    """Side by side, each a process that stands in one of the calls when the signal comes."""
    folders = [trainer.new_folder() for _ in calls]
    ranks = []
    for folder, call in zip(folders, calls, strict=True):
        path = folder / "target" / "file"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"old")
        argv, told = [kind, str(call), str(path)], {"DOCCLS_TEST_FOLDER": str(folder)}
        ranks += start_ranks("signal_programs:hold_a_write", argv, folder / "console", environment=told)
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
    await_event(lambda: (folder / HELD).exists() or not rank.is_alive(), START_S, "the held place", folder)


@pytest.mark.parametrize("seed", range(-(-STOPS // 5)))
def test_stops_at_random_moments_over_short_epochs_with_a_checkpoint_each(trainer: Trainer, seed: int) -> None:
    """Five, one after the other; each strikes somewhere in a step, a save or a validation.

    Every third has loader workers, which must be gone too.
    """
    draw = random.Random(seed)
    for count in range(5):
        number, workers = draw.choice([signal.SIGINT, signal.SIGTERM]), 0 if count % 3 else 2
        sets = (*LONG, f"data.num_workers={workers}")
        with running(trainer, "signal_programs:best_each_epoch", sets) as (folder, ranks):
            await_event(lambda folder=folder: trains(folder), START_S, "an epoch", folder)  # type: ignore[misc]
            time.sleep(draw.uniform(0, 0.3))  # the moment is what is drawn here: nothing is waited for
            assert ranks[0].pid is not None
            family = psutil.Process(ranks[0].pid).children(recursive=True)
            assert len(family) >= workers
            os.kill(ranks[0].pid, number)
            assert join(ranks, folder) == [128 + number], f"stop {count}"
            assert psutil.wait_procs(family, timeout=30)[1] == [], f"stop {count}"
        assert_ended_well(folder, 128 + number)
