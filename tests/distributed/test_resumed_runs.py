"""A run killed at any moment resumes by the same command and ends in the same bytes as an uninterrupted run."""

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
from test_signals_to_runs import START_S, await_event, has_logged_step, join
from tiny_runs import RICH, Run, Trainer

from doccls.run.heartbeat import read_beat

# For each number of processes:
KILLS = int(os.environ.get("DOCCLS_TEST_KILLS", "1"))
STOPS = int(os.environ.get("DOCCLS_TEST_RESUMED_STOPS", "1"))
# RICH with BatchNorm, gradient accumulation, damaged pages, layer decay, a final epoch without Mixup, and a resume
# checkpoint after each step.
EVERYTHING = (
    *RICH, "model.name=test_resnet", "train.optimizer=adamw", "train.micro_batch_size=3", "train.epochs=3",
    "train.checkpoint_interval_s=0.001", "train.log_interval=1", "valid.damage=scan",
    "augment.damage_prob=0.5", "augment.strength=0.8", "train.layer_decay=0.9", "train.unmixed_epochs=1",
)  # fmt: skip


def train_with_kill(
    trainer: Trainer, folder: Path, world_size: int, rank: int, moment: int, run_id: str = "r"
) -> list[Rank]:
    """Train; kill `rank` at moment number `moment`: 0 lists the moments of that rank instead, and -1 does neither."""
    variables = {
        "DOCCLS_TEST_RANK": str(rank), "DOCCLS_TEST_MOMENT": str(moment), "DOCCLS_TEST_MOMENTS": str(folder / "moments")
    }  # fmt: skip
    argv = trainer.arguments(EVERYTHING, folder, run_id)
    return launch_ranks("killed_programs:kill_at_moment", argv, folder / "console", world_size, environment=variables)


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    folder: Path  # best weights hold the config, and with it the folders: runs to compare must use the same one
    results: dict[str, bytes]
    moments: list[str]  # of the main process
    losses: list[float]  # of fold 0's steps


@pytest.fixture(scope="module")
def references(trainer: Trainer) -> dict[int, Reference]:
    """Train the uninterrupted run with 1, 2 and 3 processes."""
    runs = {}
    for world_size in (1, 2, 3):
        folder = trainer.new_folder()
        folder.mkdir(parents=True)
        run = Run(train_with_kill(trainer, folder, world_size, 0, 0), folder)
        assert run.codes == [0] * world_size, run.stderr
        moments = (folder / "moments").read_text().splitlines()
        runs[world_size] = Reference(folder, read_results(run), moments, run.list_step_losses(0))
    return runs


def clear(reference: Reference) -> Path:
    """Delete the run's folder, and return its path."""
    shutil.rmtree(reference.folder)
    return reference.folder


def read_results(run: Run) -> dict[str, bytes]:
    """Read all results that must be the same: all but the times in metrics.jsonl."""
    files = [*run.root.glob("oof/**/*.*"), *run.root.glob("ckpt/*"), run.root / "summary.json"]
    keys = ("fold", "epoch", "train_loss", "valid_loss", "macro_f1", "macro_f1_damaged", "lr")
    rows = [{key: row[key] for key in keys} for row in run.read_metrics()]
    contents = {str(file.relative_to(run.root)): file.read_bytes() for file in files if file.is_file()}
    return contents | {"metrics": json.dumps(rows).encode()}


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_run_killed_at_random_moments_ends_in_the_same_bytes(
    trainer: Trainer, references: dict[int, Reference], world_size: int, seed: int
) -> None:
    reference, rng = references[world_size], random.Random(seed * 10 + world_size)
    folder, kills = clear(reference), []
    for _ in range(2):  # killed, and killed once more after it has resumed
        rank = rng.randrange(world_size)
        moments = reference.moments
        if rank != 0:  # the other ranks write no files
            moments = [moment for moment in moments if moment.endswith((" train", " validate"))]
        number = rng.randint(1, len(moments) * 2 // 3)
        ranks = train_with_kill(trainer, folder, world_size, rank, number)
        kills.append((rank, number, [peer.code for peer in ranks]))
    assert -signal.SIGKILL in kills[0][2], kills
    ranks = train_with_kill(trainer, folder, world_size, 0, -1)
    run = Run(ranks, folder)
    assert run.codes == [0] * world_size, (kills, run.stderr)
    results = read_results(run)
    assert results.keys() == reference.results.keys(), kills
    assert [name for name in results if results[name] != reference.results[name]] == [], kills


@pytest.mark.parametrize("seed", range(STOPS))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_run_stopped_at_a_random_moment_resumes_at_the_step_it_had_reached(
    trainer: Trainer, references: dict[int, Reference], world_size: int, seed: int
) -> None:
    """And ends in the same bytes, however slowly resume checkpoints are written."""
    reference, rng = references[world_size], random.Random(seed * 10 + world_size)
    folder, number = clear(reference), rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    argv, variables = trainer.arguments(EVERYTHING, folder, "r"), {"DOCCLS_TEST_SEED": str(seed)}
    ranks = start_ranks("signal_programs:slow_saves", argv, folder / "console", world_size, variables)
    try:
        await_event(lambda: has_logged_step(folder), START_S, "a step", folder)
        time.sleep(rng.uniform(0, 3))  # until a random moment; there is no event to wait for
        with suppress(ProcessLookupError):  # the run may be over
            os.kill(ranks[rng.randrange(world_size)].pid or 0, number)
        codes = join(ranks, folder)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(10)
    assert codes in ([128 + number] * world_size, [0] * world_size)
    (live,) = folder.glob("experiments/*/r/live")
    beat = read_beat(live / "all_rank0.json")
    done = beat is not None and (live.parent / "oof" / "parts" / f"fold{beat.fold}.safetensors").exists()
    run = Run(train_with_kill(trainer, folder, world_size, 0, -1), folder)
    assert run.codes == [0] * world_size, (codes, run.stderr)
    resumed = [line.split()[1:5] for line in run.lines if line.startswith("[RESUME] ")]
    if beat is not None and beat.step and not done:
        assert resumed == [[f"fold={beat.fold}", "from", "step", str(beat.step)]]
    results = read_results(run)
    assert results.keys() == reference.results.keys()
    assert [name for name in results if results[name] != reference.results[name]] == [], (number, beat)


@pytest.mark.parametrize("world_size", [1, 3])
def test_run_stopped_in_validation_resumes_at_the_epochs_end(
    trainer: Trainer, references: dict[int, Reference], world_size: int
) -> None:
    """Whatever the checkpoint interval is."""
    reference = references[world_size]
    folder = clear(reference)
    argv = trainer.arguments((*EVERYTHING, "train.checkpoint_interval_s=300"), folder, "r")
    stopped = launch_ranks("signal_programs:stop_in_validation", argv, folder / "console", world_size)
    assert [rank.code for rank in stopped] == [143] * world_size, stopped[0].stderr
    assert len(list(folder.glob("experiments/*/r/ckpt/last_fold0_*"))) == 1
    run = Run(launch_ranks("doccls.train:main", argv, folder / "console", world_size), folder)
    assert run.codes == [0] * world_size, run.stderr
    (line,) = [line for line in run.lines if line.startswith("[RESUME]")]
    assert " (epoch 1), saved " in line and run.list_step_losses(0) == reference.losses[len(reference.losses) // 3 :]
    results = read_results(run)
    differing = [name for name in results if results[name] != reference.results[name]]
    assert all("best_fold" in name for name in differing), "best weights hold the config, and so the interval"


def test_reference_runs_have_all_kinds_of_moments(references: dict[int, Reference]) -> None:
    for reference in references.values():
        kinds = {moment.split(" ", 1)[1].partition(" to ")[0] for moment in reference.moments}
        names = {moment.rpartition(" ")[2] for moment in reference.moments if " to " in moment}
        assert kinds == {"train", "validate", "sync", "rename"}
        assert {"last_fold0_0.safetensors", "best_fold1.pth", "fold2.safetensors", "metrics.jsonl"} <= names


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resuming_replays_no_step_and_logs_where_it_begins(
    trainer: Trainer, references: dict[int, Reference], world_size: int
) -> None:
    reference = references[world_size]
    fifth_step = [number for number, moment in enumerate(reference.moments, 1) if moment.endswith(" train")][4]
    folder = clear(reference)
    train_with_kill(trainer, folder, world_size, 0, fifth_step)
    run = Run(train_with_kill(trainer, folder, world_size, 0, -1), folder)
    (line,) = [line for line in run.lines if line.startswith("[RESUME]")]
    step = int(line.partition("from step ")[2].partition(" ")[0])
    assert step >= 1 and line.startswith(f"[RESUME] fold=0 from step {step} (epoch ") and " s of work" in line
    assert run.list_step_losses(0) == reference.losses[step:]
    assert [row["resumed_step"] for row in run.read_metrics() if "resumed_step" in row] == [step]


def test_killed_run_decodes_each_page_once(trainer: Trainer, references: dict[int, Reference]) -> None:
    folder, decoded = clear(references[1]), []
    for run_id, moment in (("r", len(references[1].moments) // 2), ("r", -1), ("another", -1)):
        train_with_kill(trainer, folder, 1, 0, moment, run_id)
        (line,) = [line for line in Run([], folder).lines if line.startswith("[DATA] decoded pages: ")]
        decoded.append(line.partition(" holds ")[2])
    message = "48, of which {} were decoded now"
    assert decoded == [message.format(48), message.format(0), message.format(0)]
    assert len(list(folder.glob("experiments/*/*/summary.json"))) == 2


def test_different_number_of_processes_is_rejected_unless_allowed(
    trainer: Trainer, references: dict[int, Reference]
) -> None:
    folder = clear(references[2])
    train_with_kill(trainer, folder, 2, 0, len(references[2].moments) // 4)
    rejected = Run(train_with_kill(trainer, folder, 1, 0, -1), folder)
    message = "by 2 processes, but 1 are running now. Start 2 processes; or pass --allow-world-size-change"
    assert rejected.codes == [1] and message in rejected.stderr
    argv = [*trainer.arguments(EVERYTHING, folder, "r"), "--allow-world-size-change"]
    run = Run(launch_ranks("doccls.train:main", argv, folder / "console"), folder)
    assert run.codes == [0] and any(line.startswith("[RESUME] fold=0") for line in run.lines)
    assert len(list(run.root.glob("oof/parts/*"))) == 3 and not list(run.root.glob("ckpt/last*"))
