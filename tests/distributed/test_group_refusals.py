"""Errors with several processes: reported once, and every rank exits with code 1; none hangs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from rank_launcher import REPOSITORY, clean_environment, launch_ranks, start_ranks
from tiny_runs import PLAIN, Run, Trainer

from doccls.run.heartbeat import Cause, read_beat
from doccls.run.paths import locate_run
from doccls.system.lifeline import LAUNCHED

TIMEOUT_S = 180


def _list_errors(run: Run) -> list[str]:
    """Return the error lines from the consoles of all ranks."""
    return [line for rank in run.ranks for line in rank.stderr.splitlines() if line.startswith("[EXIT][ERROR]")]


@pytest.mark.parametrize("attempt", range(4))
def test_each_rank_rejects_an_unexpected_number_of_processes(trainer: Trainer, attempt: int) -> None:
    """Repeated, since ranks race: one that exits early must not make another fail or wait."""
    run = trainer.run(*PLAIN, "train.num_processes=2", world_size=3)
    assert run.codes == [1, 1, 1]
    assert _list_errors(run) == [
        "[EXIT][ERROR] training failed: train.num_processes = 2, but 3 were started (see accelerate_configs/)"
    ]


def test_single_process_is_rejected_where_two_are_expected(trainer: Trainer) -> None:
    run = trainer.run(*PLAIN, "train.num_processes=2")
    assert run.codes == [1]
    assert "train.num_processes = 2, but 1 were started" in run.stderr
    assert not list(run.folder.glob("logs/*"))


def test_process_with_assigned_gpu_does_not_train_on_cpu(trainer: Trainer) -> None:
    """NVML lists a GPU that torch can't use: built without CUDA, an old driver, a missing MIG instance."""
    folder = trainer.new_folder()
    variables = {"DOCCLS_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "GPU-1234"}
    arguments = trainer.arguments(PLAIN, folder)
    (rank,) = launch_ranks("doccls.train:main", arguments, folder / "console", environment=variables)
    assert rank.code == 1
    assert "given a GPU (CUDA_VISIBLE_DEVICES=GPU-1234) that PyTorch can't use: " in rank.stderr
    assert "--slots N" in rank.stderr and not list(folder.glob("experiments/*"))


def test_more_processes_than_samples_per_batch_are_rejected(trainer: Trainer) -> None:
    run = trainer.run(*PLAIN, "train.batch_size=2", world_size=3)
    assert run.codes == [1, 1, 1]
    (line,) = _list_errors(run)
    assert "train.batch_size = 2" in line


def test_per_rank_batch_too_small_for_batch_norm_is_rejected_before_training(trainer: Trainer) -> None:
    """The second process gets one of three images; its last feature maps have one pixel."""
    sets = ("model.name=test_resnet", "train.img_size=32", "train.batch_size=3")
    run = trainer.run(*PLAIN, *sets, world_size=2)
    assert run.codes == [1, 1]
    (line,) = _list_errors(run)
    assert "BatchNorm needs more than one image at a time" in line and "train.batch_size (now 3" in line
    assert not any(line.startswith("[STEP") for line in run.lines)


@pytest.mark.parametrize("world_size", [1, 2])
def test_image_size_that_the_model_does_not_support_is_reported_once(trainer: Trainer, world_size: int) -> None:
    run = trainer.run(*PLAIN, "model.name=test_vit", "train.img_size=100", world_size=world_size)
    assert run.codes == [1] * world_size
    (line,) = _list_errors(run)
    assert "train.img_size = 100: test_vit does not support it" in line


def test_mixup_with_single_images_per_process_is_rejected_before_training(trainer: Trainer) -> None:
    run = trainer.run(*PLAIN, "train.mixup_alpha=0.4", "train.batch_size=2", world_size=2)
    assert run.codes == [1, 1]
    (line,) = _list_errors(run)
    assert "one by one" in line and "now 2 for 2 processes" in line
    assert not any(line.startswith("[STEP") for line in run.lines)


def test_images_that_mixup_leaves_out_are_counted_over_all_processes(trainer: Trainer) -> None:
    run = trainer.run(*PLAIN, "train.mixup_alpha=0.4", "train.batch_size=6", "data.valid_fold=1", world_size=2)
    assert run.codes == [0, 0]
    (line,) = [line for line in run.lines if "[WARNING]" in line and "unmixed" in line]
    assert "2 of the 6 images of each batch" in line


def test_second_precision_in_one_run_is_rejected(trainer: Trainer) -> None:
    """Fold 0 is trained in bf16, as set by `accelerate launch`; fold 1 of the same run without it is rejected."""
    folder, bf16 = trainer.new_folder(), {"ACCELERATE_MIXED_PRECISION": "bf16"}
    arguments = [trainer.arguments((*PLAIN, f"data.valid_fold={fold}"), folder, "mixed") for fold in range(2)]
    ranks = launch_ranks("doccls.train:main", arguments[0], folder / "first", 2, environment=bf16)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr
    run = Run(ranks, folder)
    assert run.predictions(0).info.precision == "bf16" and (run.root / "precision.txt").read_text() == "bf16\n"
    ranks = launch_ranks("doccls.train:main", arguments[1], folder / "second", 2)
    assert [rank.code for rank in ranks] == [1, 1]
    (error,) = _list_errors(Run(ranks, folder))
    assert "run mixed is trained in precision 'bf16'" in error and "Set train.amp to bf16" in error
    ranks = launch_ranks("doccls.train:main", arguments[1], folder / "third", 2, environment=bf16)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr


@pytest.mark.parametrize("interface", ["", "127.0.0.1"])
def test_port_in_use_is_reported_to_the_launcher(trainer: Trainer, interface: str) -> None:
    """Rank 0, which listens there, reports it; the other rank waits until the launcher kills it."""
    folder = trainer.new_folder()
    paths = locate_run(folder / "experiments", "taken", datetime.now())
    paths.live.mkdir(parents=True)
    arguments = trainer.arguments((*PLAIN, "data.valid_fold=0"), folder, "taken")
    with socket.create_server((interface, 0)) as listener:
        port = listener.getsockname()[1]
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LAUNCHED: "a launch"}
        ranks = start_ranks("rank_programs:rendezvous_at_port", arguments, folder / "console", 2, variables)
        try:
            ranks[0].join(TIMEOUT_S)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join(10)
    assert ranks[0].exitcode == 1
    beat = read_beat(paths.heartbeat(0, 0))
    assert beat is not None and beat.cause is Cause.PORT_TAKEN
    (line,) = (folder / "console" / "rank0.err").read_text().splitlines()[-1:]
    assert f"MASTER_PORT={port} on {socket.gethostname()}" in line and "--main_process_port" in line


def test_config_error_is_reported_once(trainer: Trainer) -> None:
    run = trainer.run(*PLAIN, "train.epoch=3", world_size=2)
    assert run.codes == [1, 1]
    assert run.stderr.count("did you mean train.epochs?") == 1


def test_missing_image_is_reported_once_before_training(trainer: Trainer) -> None:
    (trainer.config.parent / "lost.csv").write_text(
        (trainer.config.parent / "folds.csv").read_text() + "absent_page.jpg,form,1\n"
    )
    run = trainer.run(*PLAIN, "data.train_csv=lost.csv", world_size=2)
    assert run.codes == [1, 1]
    assert run.stderr.count("ID 'absent_page.jpg': tried") == 1
    assert run.ranks[1].stderr == ""
    assert run.lines[-2:] == ["[EXIT] TRAINING ERROR code=1", ">> Stopping logger and restoring stdio"]
    assert any("ID 'absent_page.jpg': tried" in line for line in run.lines)
    assert not list(run.folder.glob("experiments/*/*"))


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_image_that_becomes_unreadable_is_named(trainer: Trainer, failing_rank: int, tmp_path: Path) -> None:
    """Only rank `failing_rank` reads the image: the user must see its error, not only the other rank's broken pipe."""
    pages = _copy_pages(trainer, tmp_path)
    rows = _list_validated(trainer, fold=0)  # rank r reads rows[r::2]
    name = f"page_{rows[failing_rank]:03d}.jpg"
    folder = trainer.new_folder()
    sets = [*PLAIN, "data.valid_fold=0", f"data.image_dir_train={pages}", "data.store=off"]
    variables = {"DOCCLS_TEST_LOSE": name}
    ranks = launch_ranks(
        "rank_programs:delete_images", trainer.arguments(sets, folder), folder / "console", 2, environment=variables
    )
    run = Run(ranks, folder)
    assert run.codes == [1, 1]
    assert f"image of ID '{name}' can no longer be read" in run.stderr
    rank_error = (
        f"[RANK 1] on {socket.gethostname()} failed: RankLocalError: image of ID '{name}' can no longer be read"
    )
    assert any(line.startswith(rank_error) for line in run.lines) == (failing_rank == 1)
    assert f"[EXIT][ERROR] rank 1 on {socket.gethostname()} failed: image" in run.ranks[1].stderr or failing_rank == 0
    assert run.lines[-2:] == ["[EXIT] TRAINING ERROR code=1", ">> Stopping logger and restoring stdio"]


def test_unwritable_run_folder_ends_every_rank(trainer: Trainer) -> None:
    """Only the main process writes, so it fails alone in the middle of training."""
    first = trainer.train(*PLAIN, "data.valid_fold=1", "train.epochs=1", run_id="full", world_size=2)
    (first.root / "oof" / "parts" / "fold1.safetensors").unlink()
    (first.root / "ckpt" / "best_fold1.pth").unlink()
    (first.root / "ckpt").rmdir()
    (first.root / "ckpt").write_text("in the way")
    run = trainer.run(*PLAIN, "data.valid_fold=1", "train.epochs=1", run_id="full", world_size=2, folder=first.folder)
    assert run.codes == [1, 1]
    assert "ckpt" in run.ranks[0].stderr
    assert run.lines[-2:] == ["[EXIT] TRAINING ERROR code=1", ">> Stopping logger and restoring stdio"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_non_finite_loss_stops_all_ranks_and_names_step_and_samples(trainer: Trainer, world_size: int) -> None:
    run = trainer.run(
        *PLAIN, "data.valid_fold=1", "train.lr=1e30", world_size=world_size, program="rank_programs:record_failure"
    )
    assert run.codes == [1] * world_size
    failures = [json.loads((run.folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    assert failures == [failures[0]] * world_size
    kind, message = failures[0]
    assert kind == "UserError"
    assert re.search(r"fold 1: the loss of step 2 \(epoch 1\) is (nan|inf)", message)
    assert len(set(re.findall(r"page_\d{3}\.jpg", message))) == 11
    assert run.stderr.count("the loss of step 2") == 1
    assert run.lines[-2:] == ["[EXIT] TRAINING ERROR code=1", ">> Stopping logger and restoring stdio"]
    assert not list(run.root.rglob("best_fold*.pth"))
    assert not list(run.root.rglob("*.safetensors"))


# --- accelerate launch on the command line ----------------------------------------------------------------------------


def test_accelerate_launch_that_starts_one_of_two_processes_is_rejected(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    with _accelerate(trainer, folder, "--cpu", "--num_processes", "2") as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "accelerate launch was asked for several processes but started one" in errors
    assert "accelerate_configs/cpu_2.yaml" in errors
    assert not list(folder.glob("logs/*"))


@pytest.mark.parametrize(("name", "world_size"), [("cpu_1.yaml", 1), ("cpu_2.yaml", 2)])
def test_provided_accelerate_config_starts_its_number_of_processes(
    trainer: Trainer, plain_runs: dict[int, Run], name: str, world_size: int
) -> None:
    folder = trainer.new_folder()
    config_file = REPOSITORY / "accelerate_configs" / name
    with _accelerate(trainer, folder, "--config_file", str(config_file)) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    run = Run([], folder)
    assert sum(f"processes={world_size}" in line for line in run.lines) == 1
    assert run.lines[-2:] == ["[EXIT] TRAINING SUCCESS code=0", ">> Stopping logger and restoring stdio"]
    assert output.count("[EXIT] training finished successfully") == 1
    assert run.predictions(1).logits_NC.tobytes() == plain_runs[world_size].predictions(1).logits_NC.tobytes()


@contextmanager
def _accelerate(trainer: Trainer, folder: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `accelerate launch OPTIONS -m doccls.train ...` on fold 1; kill what is still running at the end."""
    folder.mkdir()
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, "-m", "doccls.train"]
    arguments = trainer.arguments([*PLAIN, "data.valid_fold=1"], folder)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*launch, *arguments], cwd=folder, env=clean_environment(), text=True, stdout=pipe, stderr=pipe,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _copy_pages(trainer: Trainer, folder: Path) -> Path:
    pages = folder / "pages"
    pages.mkdir()
    for file in (trainer.config.parent / "train").iterdir():
        (pages / file.name).hardlink_to(file)
    return pages


def _list_validated(trainer: Trainer, fold: int) -> list[int]:
    rows = (trainer.config.parent / "folds.csv").read_text().splitlines()[1:]
    return [row for row, line in enumerate(rows) if line.endswith(f",{fold}")]
