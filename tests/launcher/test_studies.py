"""Studies: several configs and seeds in one queue give the bytes of each run alone."""

import json
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import Launch, ask, assert_none_left, assert_same_bytes, await_event, finish, start_command
from tiny_runs import PLAIN, Run, Trainer

_SHORT = (*(override for override in PLAIN if not override.startswith("train.lr=")), "train.epochs=1")


@dataclass(frozen=True)
class Member(Run):
    """A run of the study `s`."""

    run_id: str = ""

    @property
    def root(self) -> Path:
        """Its folder."""
        (root,) = self.folder.glob(f"experiments/2*/{self.run_id}")
        return root


@pytest.fixture
def other_config(trainer: Trainer) -> Path:
    """A second config beside the first, with another learning rate."""
    values = yaml.safe_load(trainer.config.read_text())
    values["train"]["lr"] = 5e-3
    path = trainer.config.with_name("other.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def launch_study(trainer: Trainer, folder: Path, other: Path, *words: str) -> Launch:
    words = (*trainer.arguments(_SHORT, folder), "--config", str(other), "--seeds", "1,2", "--study", "s", *words)
    return finish(start_command(folder, "doccls.train:main", "launcher", "run", *words, "--slots", "2"), folder)


def read_study(folder: Path) -> dict[str, dict[str, Any]]:
    described = json.loads((folder / "experiments" / "studies" / "s" / "study.json").read_text())
    return {run["run_id"]: run for run in described["runs"]}


def test_study_gives_the_bytes_of_each_run_alone_and_continues(trainer: Trainer, other_config: Path) -> None:
    folder = trainer.new_folder()
    launched = launch_study(trainer, folder, other_config, "--blend")
    assert launched.code == 0, launched.out + launched.err
    (blend,) = folder.glob("experiments/2*/blend-*/blend.json")
    assert len(json.loads(blend.read_text())["members"]) == 4 and "[STUDY] blend:\n" in launched.out
    assert launched.out.count("\n[STUDY] run s-other-s2:\n  [OOF] -> ") == 1
    assert "[STUDY] 12 folds of 4 runs to train" in launched.out
    runs = read_study(folder)
    assert sorted(runs) == ["s-other-s1", "s-other-s2", "s-tiny-s1", "s-tiny-s2"]
    assert all(run["finished_folds"] == 3 and run["clean"]["macro_f1"] > 0 for run in runs.values())
    assert runs["s-other-s2"]["settings"] == {"project.seed": "2", "train.lr": "0.005"}
    member = Member([], folder, "s-other-s2")
    assert_same_bytes(trainer.train(*_SHORT, "train.lr=0.005", "project.seed=2"), member)
    kept = {name: Member([], folder, name).list_files() for name in runs if name != "s-other-s2"}
    for name in ("oof/parts/fold1.safetensors", "ckpt/best_fold1.pth", "summary.json"):
        (member.root / name).unlink()
    again = launch_study(trainer, folder, other_config)
    assert again.code == 0 and "[STUDY] 1 folds of 4 runs to train" in again.out
    for name, files in kept.items():
        changed = {file for file, digest in Member([], folder, name).list_files().items() if files.get(file) != digest}
        assert changed <= {"launch.json", "metrics.jsonl"}, "finished runs are left alone"
    assert_same_bytes(trainer.train(*_SHORT, "train.lr=0.005", "project.seed=2"), member)


def test_folds_and_merges_that_fail_leave_the_other_runs_complete(trainer: Trainer, other_config: Path) -> None:
    values = yaml.safe_load(other_config.read_text())
    values["train"]["lr"] = 1e30  # the loss is not finite after a step
    other_config.write_text(yaml.safe_dump(values))
    folder = trainer.new_folder()
    (folder / "experiments" / "20260101" / "s-tiny-s1" / "oof" / "oof_logits.npy").mkdir(parents=True)  # not a file
    launched = launch_study(trainer, folder, other_config)
    assert launched.code == 1 and "6 folds failed" in launched.err
    assert "- s-other-s1 fold 0: " in launched.err and "missing: folds 0, 1, 2 of run s-other-s2" in launched.err
    assert launched.err.count("to train just them: doccls-launch run ") == 1 and "--study s" in launched.err
    runs = read_study(folder)
    assert {name: "clean" in run for name, run in runs.items()} == {
        "s-tiny-s1": False, "s-tiny-s2": True, "s-other-s1": False, "s-other-s2": False,
    }  # fmt: skip
    assert runs["s-tiny-s1"]["finished_folds"] == 3 and "oof_logits.npy" in runs["s-tiny-s1"]["problem"]
    assert "[WARNING] run s-tiny-s1: doccls-launch merge: " in launched.out
    assert [line for line in launched.out.splitlines() if line.startswith("[STUDY]     s-other-s2  0 of 3 folds")]


def test_cancel_stops_one_run_of_a_study_or_all(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    sets = [override for override in _SHORT if override != "train.epochs=1"]
    grid = ("--set-each", "train.epochs=1,500", "--study", "s", "--slots", "2")

    def start() -> ForkServerProcess:
        arguments = trainer.arguments(tuple(sets), folder)
        return start_command(folder, "doccls.train:main", "launcher", "run", *arguments, *grid)

    def trains() -> bool:
        return len(list(folder.glob("experiments/2*/s-tiny-epochs500/metrics/fold*.jsonl"))) == 2

    process = start()
    await_event(lambda: not process.is_alive() or trains(), "epochs of two folds", folder)  # the longest start first
    (root,) = folder.glob("experiments/2*/s-tiny-epochs500")
    assert "[CANCEL] stopped" in ask(folder, "cancel", str(root))
    ended = finish(process, folder)
    assert ended.code == 1 and "- run s-tiny-epochs500 was cancelled (doccls-launch cancel)" in ended.err
    assert not (root / "live" / "cancel.txt").exists()
    assert {name: run["finished_folds"] for name, run in read_study(folder).items()} == {
        "s-tiny-epochs1": 3, "s-tiny-epochs500": 0,
    }  # fmt: skip
    states = json.loads(ask(folder, "status", "--json", str(root)))["folds"]
    assert [fold["state"] for fold in states] == ["stopped", "stopped", "missing"]
    attempts = [len(fold_attempts(root, fold)) for fold in range(3)]
    process = start()
    await_event(lambda: not process.is_alive() or len(fold_attempts(root, 1)) > attempts[1], "fold 1", folder)
    assert "[CANCEL] stopped" in ask(folder, "cancel", str(folder / "experiments" / "studies" / "s"))
    ended = finish(process, folder)
    assert ended.code == 143 and "[STUDY] to continue: doccls-launch run " in ended.out
    assert_none_left(folder)


def fold_attempts(root: Path, fold: int) -> list[dict[str, Any]]:
    attempts = json.loads((root / "launch.json").read_text())["attempts"]
    return [attempt for attempt in attempts if attempt["fold"] == fold]


def test_tasks_share_the_folds_of_a_study(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    words = [*trainer.arguments(_SHORT, folder), "--seeds", "1,2", "--study", "s", "--blend"]
    first, second = (
        finish(start_command(folder, "doccls.train:main", "launcher", "task", *words, "--task", f"{index}/2"), folder)
        for index in range(2)
    )
    assert first.code == 0 and "[EXIT] INCOMPLETE missing=s-tiny-s1:1,s-tiny-s2:0,s-tiny-s2:2 code=0" in first.out
    assert "[LAUNCH] task 1: s-tiny-s1 fold 1; s-tiny-s2 folds 0, 2 (6 folds of 2 runs)" in second.out
    assert second.code == 0 and "[EXIT] TRAINING SUCCESS code=0" in second.out, second.out + second.err
    assert "[STUDY]  1  s-tiny-s" in second.out and "[STUDY] blend:\n" in second.out
    assert all(run["finished_folds"] == 3 and run["clean"] for run in read_study(folder).values())
    for seed in (1, 2):
        alone = trainer.train(*_SHORT, f"project.seed={seed}")
        assert_same_bytes(alone, Member([], folder, f"s-tiny-s{seed}"))


def test_run_whose_folder_is_deleted_leaves_the_others_complete(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    sets = tuple(override for override in _SHORT if override != "train.epochs=1")
    words = (*trainer.arguments(sets, folder), "--set-each", "train.epochs=1,500", "--study", "s", "--slots", "2")
    process = start_command(folder, "doccls.train:main", "launcher", "run", *words)

    def trains() -> bool:
        return len(list(folder.glob("experiments/2*/s-tiny-epochs500/metrics/fold*.jsonl"))) == 2

    await_event(lambda: not process.is_alive() or trains(), "epochs of two folds", folder)
    (root,) = folder.glob("experiments/2*/s-tiny-epochs500")
    root.rename(folder / "moved")
    ended = finish(process, folder)
    assert ended.code == 1 and "- run s-tiny-epochs500 is lost (" in ended.err
    assert "to train just them: doccls-launch run " in ended.err
    assert read_study(folder)["s-tiny-epochs1"]["clean"]
    assert_none_left(folder)
