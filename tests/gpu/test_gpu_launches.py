"""`doccls-launch` on GPUs as the driver lists them: plans, folds in parallel, and a full GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml
from gpu_programs import FITTING
from launches import Launch, ask, assert_same_bytes, finish, kill_started, start_command
from tiny_runs import PLAIN, Trainer


@pytest.fixture(autouse=True)
def _kill_launches() -> Iterator[None]:
    yield
    kill_started()


def launch(trainer: Trainer, sets: tuple[str, ...], *options: str, program: str = "doccls.train:main") -> Launch:
    folder = trainer.new_folder()
    command = ["launcher", "run", *trainer.arguments(sets, folder), "--run-id", "tiny", *options]
    return finish(start_command(folder, program, *command, **trainer.environment), folder)


def test_plan_assigns_folds_to_gpus(trainer: Trainer, device: str) -> None:
    folder = trainer.new_folder()
    folder.mkdir()
    sets = trainer.arguments(PLAIN, folder)
    options = () if device == "cuda" else ("--slots", "1")
    plan = json.loads(ask(folder, "plan", "--json", *sets, *options, **trainer.environment))
    devices = [fold["slot"]["devices"][0] for wave in plan["waves"] for fold in wave]
    assert len(devices) == 3 and all(bool(gpu["uuid"]) == (device == "cuda") for gpu in devices)


def test_two_folds_on_one_gpu_give_the_bytes_of_one_process(trainer: Trainer, device: str) -> None:
    alone = trainer.train(*PLAIN)
    options = ("--gpus", "0", "--folds-per-gpu", "2") if device == "cuda" else ("--slots", "2")
    launched = launch(trainer, PLAIN, *options)
    assert launched.code == 0, launched.out + launched.err
    assert_same_bytes(alone, launched.run)
    provenance = yaml.safe_load((launched.run.root / "config.yaml").read_text())["provenance"]
    assert (provenance["device"] == ["cpu"]) == (device == "cpu")


def test_full_gpu_halves_the_micro_batch(trainer: Trainer, device: str) -> None:
    sets = (*PLAIN, "model.name=resnet18", "train.img_size=128", "data.valid_fold=1")
    options = ("--gpus", "0") if device == "cuda" else ("--slots", "1")
    launched = launch(trainer, sets, *options, program="gpu_programs:with_little_memory")
    assert launched.code == 0, launched.out + launched.err
    attempts = json.loads((launched.run.root / "launch.json").read_text())["attempts"]
    outcomes = [(attempt["micro_batch_size"], attempt["outcome"]) for attempt in attempts]
    assert outcomes == [(11, "out of memory"), (FITTING, "done")]
