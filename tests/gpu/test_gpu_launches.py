"""`doccls-launch` on GPUs as the driver shows them: what it plans, runs side by side, and does about a full one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml
from gpu_programs import FITTING
from launches import Launch, ask, assert_same_bytes, finish, kill_started, start_command
from tiny_runs import PLAIN, Trainer


@pytest.fixture(autouse=True)
def _no_launch_is_left() -> Iterator[None]:
    yield
    kill_started()


def launch(trainer: Trainer, sets: tuple[str, ...], *words: str, program: str = "doccls.train:main") -> Launch:
    folder = trainer.new_folder()
    command = ["launcher", "run", *trainer.arguments(sets, folder), "--run-id", "tiny", *words]
    return finish(start_command(folder, program, *command, **trainer.environment), folder)


def test_the_plan_places_folds_on_gpus(trainer: Trainer, device: str) -> None:
    folder = trainer.new_folder()
    folder.mkdir()
    sets = trainer.arguments(PLAIN, folder)
    words = () if device == "cuda" else ("--slots", "1")
    plan = json.loads(ask(folder, "plan", "--json", *sets, *words, **trainer.environment))
    devices = [one["slot"]["devices"][0] for wave in plan["waves"] for one in wave]
    assert len(devices) == 3 and all(bool(one["uuid"]) == (device == "cuda") for one in devices)


def test_two_folds_share_a_gpu_and_give_the_bytes_of_one_process(trainer: Trainer, device: str) -> None:
    alone = trainer.train(*PLAIN)
    words = ("--gpus", "0", "--folds-per-gpu", "2") if device == "cuda" else ("--slots", "2")
    launched = launch(trainer, PLAIN, *words)
    assert launched.code == 0, launched.out + launched.err
    assert_same_bytes(alone, launched.run)
    provenance = yaml.safe_load((launched.run.root / "config.yaml").read_text())["provenance"]
    assert (provenance["device"] == ["cpu"]) == (device == "cpu")


def test_a_full_gpu_halves_the_images_at_a_time(trainer: Trainer, device: str) -> None:
    sets = (*PLAIN, "model.name=resnet18", "train.img_size=128", "data.valid_fold=1")
    words = ("--gpus", "0") if device == "cuda" else ("--slots", "1")
    launched = launch(trainer, sets, *words, program="gpu_programs:with_little_memory")
    assert launched.code == 0, launched.out + launched.err
    attempts = json.loads((launched.run.root / "launch.json").read_text())["attempts"]
    assert [(one["micro_batch_size"], one["outcome"]) for one in attempts] == [(11, "out of memory"), (FITTING, "done")]
