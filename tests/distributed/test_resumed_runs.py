"""A run that is killed with SIGKILL at any moment goes on with the same command, to the bytes of one undisturbed."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from rank_launcher import Rank, launch_ranks, start_ranks
from test_signals_to_runs import START_S, await_event, has_begun_steps, join
from tiny_runs import RICH, Run, Trainer

from doccls.run.heartbeat import read_beat

KILLS = int(os.environ.get("DOCCLS_TEST_KILLS", "3"))
"""For each number of processes."""
STOPS = int(os.environ.get("DOCCLS_TEST_RESUMED_STOPS", "1"))
"""The same."""
EVERYTHING = (
    *RICH, "model.name=test_resnet", "train.optimizer=adamw", "train.micro_batch_size=3", "train.epochs=3",
    "train.checkpoint_interval_s=0.001", "train.log_interval=1",
)  # fmt: skip
"""Also BatchNorm and gradient accumulation, and a state after every step."""


def start(trainer: Trainer, folder: Path, world_size: int, rank: int, moment: int, run_id: str = "r") -> list[Rank]:
    told = {
        "DOCCLS_TEST_RANK": str(rank), "DOCCLS_TEST_MOMENT": str(moment), "DOCCLS_TEST_MOMENTS": str(folder / "moments")
    }  # fmt: skip
    argv = trainer.arguments(EVERYTHING, folder, run_id)
    return launch_ranks("killed_programs:die_at_a_moment", argv, folder / "console", world_size, environment=told)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run."""

    folder: Path
    """Where it was: best weights hold the config, and with it the folders, so that others must be made there too."""
    results: dict[str, bytes]
    moments: list[str]
    """Of its main process."""
    losses: list[float]
    """Of fold 0's steps."""


@pytest.fixture(scope="module")
def wholes(trainer: Trainer) -> dict[int, Whole]:
    """By number of processes."""
    found = {}
    for world_size in (1, 2, 3):
        folder = trainer.new_folder()
        folder.mkdir(parents=True)
        run = Run(start(trainer, folder, world_size, 0, 0), folder)
        assert run.codes == [0] * world_size, run.stderr
        moments = (folder / "moments").read_text().splitlines()
        found[world_size] = Whole(folder, list_results(run), moments, run.list_step_losses(0))
    return found


def clear(whole: Whole) -> Path:
    """Its folder, as if nothing had been there."""
    shutil.rmtree(whole.folder)
    return whole.folder


def list_results(run: Run) -> dict[str, bytes]:
    """What must be the same: all but the times in metrics.jsonl."""
    files = [*run.root.glob("oof/**/*.*"), *run.root.glob("ckpt/*"), run.root / "summary.json"]
    rows = [{key: row[key] for key in ("fold", "epoch", "train_loss", "valid_loss", "macro_f1", "lr")}
            for row in run.read_metrics()]  # fmt: skip
    told = {str(file.relative_to(run.root)): file.read_bytes() for file in files if file.is_file()}
    return told | {"metrics": json.dumps(rows).encode()}


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_killed_at_any_moments_it_ends_in_the_same_bytes(
    trainer: Trainer, wholes: dict[int, Whole], world_size: int, seed: int
) -> None:
    whole, draw = wholes[world_size], random.Random(seed * 10 + world_size)
    folder, told = clear(whole), []
    for _ in range(2):  # killed, and killed again as it goes on
        rank = draw.randrange(world_size)
        own = whole.moments if rank == 0 else [one for one in whole.moments if one.endswith((" train", " validate"))]
        moment = draw.randint(1, len(own) * 2 // 3)  # the others write no files
        ranks = start(trainer, folder, world_size, rank, moment)
        told.append((rank, moment, [one.code for one in ranks]))
    assert -signal.SIGKILL in told[0][2], told
    ranks = start(trainer, folder, world_size, 0, -1)
    run = Run(ranks, folder)
    assert run.codes == [0] * world_size, (told, run.stderr)
    found = list_results(run)
    assert found.keys() == whole.results.keys(), told
    assert [name for name in found if found[name] != whole.results[name]] == [], told


@pytest.mark.parametrize("seed", range(STOPS))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stopped_at_any_moment_it_goes_on_from_the_step_it_had_reached_to_the_same_bytes(
    trainer: Trainer, wholes: dict[int, Whole], world_size: int, seed: int
) -> None:
    """However slowly states are written."""
    whole, draw = wholes[world_size], random.Random(seed * 10 + world_size)
    folder, number = clear(whole), draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    argv, told = trainer.arguments(EVERYTHING, folder, "r"), {"DOCCLS_TEST_SEED": str(seed)}
    ranks = start_ranks("signal_programs:slow_saves", argv, folder / "console", world_size, told)
    try:
        await_event(lambda: has_begun_steps(folder), START_S, "a step", folder)
        time.sleep(draw.uniform(0, 3))  # the moment is what is drawn here: nothing is waited for
        with suppress(ProcessLookupError):  # the run may be over
            os.kill(ranks[draw.randrange(world_size)].pid or 0, number)
        codes = join(ranks, folder)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(10)
    assert codes in ([128 + number] * world_size, [0] * world_size)
    (live,) = folder.glob("experiments/*/r/live")
    beat = read_beat(live / "all_rank0.json")
    done = beat is not None and (live.parent / "oof" / "parts" / f"fold{beat.fold}.safetensors").exists()
    run = Run(start(trainer, folder, world_size, 0, -1), folder)
    assert run.codes == [0] * world_size, (codes, run.stderr)
    resumed = [line.split()[1:5] for line in run.lines if line.startswith("[RESUME] ")]
    if beat is not None and beat.step and not done:
        assert resumed == [[f"fold={beat.fold}", "from", "step", str(beat.step)]]
    found = list_results(run)
    assert found.keys() == whole.results.keys()
    assert [name for name in found if found[name] != whole.results[name]] == [], (number, beat)


@pytest.mark.parametrize("world_size", [1, 3])
def test_stopped_in_a_validation_it_resumes_at_the_epochs_end_whatever_the_interval(
    trainer: Trainer, wholes: dict[int, Whole], world_size: int
) -> None:
    whole = wholes[world_size]
    folder = clear(whole)
    argv = trainer.arguments((*EVERYTHING, "train.checkpoint_interval_s=300"), folder, "r")
    stopped = launch_ranks("signal_programs:stop_in_validation", argv, folder / "console", world_size)
    assert [rank.code for rank in stopped] == [143] * world_size, stopped[0].stderr
    assert len(list(folder.glob("experiments/*/r/ckpt/last_fold0_*"))) == 1
    run = Run(launch_ranks("doccls.train:main", argv, folder / "console", world_size), folder)
    assert run.codes == [0] * world_size, run.stderr
    (told,) = [line for line in run.lines if line.startswith("[RESUME]")]
    assert " (epoch 1), saved " in told and run.list_step_losses(0) == whole.losses[len(whole.losses) // 3 :]
    found = list_results(run)
    differing = [name for name in found if found[name] != whole.results[name]]
    assert all("best_fold" in name for name in differing), "these hold the config, and with it the interval"


def test_the_moments_are_of_every_kind(wholes: dict[int, Whole]) -> None:
    for whole in wholes.values():
        kinds = {moment.split(" ", 1)[1].partition(" to ")[0] for moment in whole.moments}
        names = {moment.rpartition(" ")[2] for moment in whole.moments if " to " in moment}
        assert kinds == {"train", "validate", "sync", "rename"}
        assert {"last_fold0_0.safetensors", "best_fold1.pth", "fold2.safetensors", "metrics.jsonl"} <= names


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_going_on_replays_no_step_and_says_where_it_begins(
    trainer: Trainer, wholes: dict[int, Whole], world_size: int
) -> None:
    whole = wholes[world_size]
    at = [number for number, moment in enumerate(whole.moments) if moment.endswith(" train")][4]
    folder = clear(whole)
    start(trainer, folder, world_size, 0, at + 1)
    run = Run(start(trainer, folder, world_size, 0, -1), folder)
    (told,) = [line for line in run.lines if line.startswith("[RESUME]")]
    step = int(told.partition("from step ")[2].partition(" ")[0])
    assert step >= 1 and told.startswith(f"[RESUME] fold=0 from step {step} (epoch ") and " s of work" in told
    assert run.list_step_losses(0) == whole.losses[step:]


def test_a_killed_run_decodes_each_page_once_and_the_next_run_none(trainer: Trainer, wholes: dict[int, Whole]) -> None:
    folder, decoded = clear(wholes[1]), []
    for run_id, moment in (("r", len(wholes[1].moments) // 2), ("r", -1), ("another", -1)):
        start(trainer, folder, 1, 0, moment, run_id)
        (told,) = [line for line in Run([], folder).lines if line.startswith("[DATA] decoded pages: ")]
        decoded.append(told.partition(" holds ")[2])
    each = "48, of which {} were decoded now"
    assert decoded == [each.format(48), each.format(0), each.format(0)]
    assert len(list(folder.glob("experiments/*/*/summary.json"))) == 2


def test_another_number_of_processes_is_refused_or_goes_on_with_the_same_batches(
    trainer: Trainer, wholes: dict[int, Whole]
) -> None:
    folder = clear(wholes[2])
    start(trainer, folder, 2, 0, len(wholes[2].moments) // 4)
    refused = Run(start(trainer, folder, 1, 0, -1), folder)
    message = "by 2 processes, but 1 are running now. Start 2 processes; or pass --allow-world-size-change"
    assert refused.codes == [1] and message in refused.stderr
    argv = [*trainer.arguments(EVERYTHING, folder, "r"), "--allow-world-size-change"]
    run = Run(launch_ranks("doccls.train:main", argv, folder / "console"), folder)
    assert run.codes == [0] and any(line.startswith("[RESUME] fold=0") for line in run.lines)
    assert len(list(run.root.glob("oof/parts/*"))) == 3 and not list(run.root.glob("ckpt/last*"))
