"""Studies: several configs and seeds in one queue give the bytes of each run alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import Launch, assert_same_bytes, finish, start_command
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


def launch_study(trainer: Trainer, folder: Path, other: Path, *sets: str) -> Launch:
    words = [*trainer.arguments((*_SHORT, *sets), folder), "--config", str(other), "--seeds", "1,2", "--study", "s"]
    return finish(start_command(folder, "doccls.train:main", "launcher", "run", *words, "--slots", "2"), folder)


def read_study(folder: Path) -> dict[str, dict[str, Any]]:
    described = json.loads((folder / "experiments" / "studies" / "s" / "study.json").read_text())
    return {run["run_id"]: run for run in described["runs"]}


def test_study_gives_the_bytes_of_each_run_alone_and_continues(trainer: Trainer, other_config: Path) -> None:
    folder = trainer.new_folder()
    launched = launch_study(trainer, folder, other_config)
    assert launched.code == 0, launched.out + launched.err
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


def test_folds_that_fail_leave_the_other_runs_complete(trainer: Trainer, other_config: Path) -> None:
    values = yaml.safe_load(other_config.read_text())
    values["train"]["lr"] = 1e30  # the loss is not finite after a step
    other_config.write_text(yaml.safe_dump(values))
    folder = trainer.new_folder()
    launched = launch_study(trainer, folder, other_config)
    assert launched.code == 1 and "6 folds failed" in launched.err
    assert launched.err.count("; to train just them: doccls-launch run ") == 2 and "--study s" in launched.err
    runs = read_study(folder)
    assert {name: "clean" in run for name, run in runs.items()} == {
        "s-tiny-s1": True, "s-tiny-s2": True, "s-other-s1": False, "s-other-s2": False,
    }  # fmt: skip
    assert [line for line in launched.out.splitlines() if line.startswith("[STUDY]  4  s-other-s2")]


def test_run_that_cannot_be_merged_and_lost_leaderboard_leave_the_other_runs_complete(
    trainer: Trainer, other_config: Path
) -> None:
    """Folders are where files have to be written."""
    folder = trainer.new_folder()
    experiments = folder / "experiments"
    (experiments / "20260101" / "s-tiny-s1" / "oof" / "oof_logits.npy").mkdir(parents=True)
    (experiments / "studies" / "s" / "study.json").mkdir(parents=True)
    launched = launch_study(trainer, folder, other_config)
    assert launched.code == 1, launched.out
    (reason,) = (line for line in launched.err.splitlines() if "run s-tiny-s1: " in line)
    assert reason.endswith("oof_logits.npy: Is a directory (errno 21)")
    warnings = [line for line in launched.out.splitlines() if line.startswith("[WARNING] ")]
    assert [line.partition(": ")[0] for line in warnings] == ["[WARNING] run s-tiny-s1", "[WARNING] study s"]
    assert "study.json: Is a directory" in warnings[1]
    roots = {root.name: root for root in experiments.glob("2*/s-*")}
    assert all(len(list(root.glob("oof/parts/*.safetensors"))) == 3 for root in roots.values())
    assert sorted(name for name, root in roots.items() if (root / "summary.json").exists()) == [
        "s-other-s1", "s-other-s2", "s-tiny-s2",
    ]  # fmt: skip
