"""An array task's share of a study."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from doccls.errors import UserError
from launcher.array import ArrayTask
from launcher.parser import build_parser
from launcher.study_command import NumberedRun, load_numbered_runs
from launcher.study_task import divide


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., list[NumberedRun]]:
    """Load a study of a short config of two folds and a long one of three."""
    for name, folds, epochs in (("short", 2, 1), ("long", 3, 9)):
        data = {"train_csv": "gone.csv", "image_dir_train": "gone", "folds": folds}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": data, "train": {"epochs": epochs}}))

    def load_them(*words: str) -> list[NumberedRun]:
        configs = [word for name in ("short", "long") for word in ("--config", str(tmp_path / f"{name}.yaml"))]
        argv = ["task", *configs, *words]
        return load_numbered_runs(build_parser().parse_args(argv, argparse.Namespace(argv=argv)), "s")

    return load_them


def test_folds_are_numbered_through_all_runs_the_longest_first(load: Callable[..., list[NumberedRun]]) -> None:
    runs = load("--seeds", "1,2")
    assert [(run.run_id, run.offset) for run in runs] == [
        ("s-long-s1", 0), ("s-long-s2", 3), ("s-short-s1", 6), ("s-short-s2", 8),
    ]  # fmt: skip
    assert runs[1].config.project.seed == 2 and runs[1].arguments.config.name == "long.yaml"
    assert runs[0].resume_command.startswith("doccls-launch task ") and runs[0].resume_command.endswith("--study s")


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 10, 12])
def test_tasks_share_all_folds_of_all_runs(tasks: int, load: Callable[..., list[NumberedRun]]) -> None:
    runs = load("--seeds", "1,2")
    shares = [divide(ArrayTask(f"9_{index}", "9", index, 0, tasks), runs) for index in range(tasks)]
    trained = [(part.run.run_id, fold) for share in shares for part in share for fold in part.folds]
    assert sorted(trained) == sorted((run.run_id, fold) for run in runs for fold in range(run.config.data.folds))
    sizes = [sum(len(part.folds) for part in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_index_is_the_number_of_a_fold_of_a_run(load: Callable[..., list[NumberedRun]]) -> None:
    runs = load()
    (part,) = divide(ArrayTask("9_4", "9", 4), runs)
    assert (part.run.run_id, part.folds) == ("s-short", (1,))
    with pytest.raises(UserError, match=r"0 to 4 \(all folds of the study\)"):
        divide(ArrayTask("9_5", "9", 5), runs)
    runs = load("--set", "data.valid_fold=1")
    parts = [divide(ArrayTask(f"9_{index}", "9", index), runs) for index in range(5)]
    assert [(part.run.run_id, part.folds) for part in itertools.chain(*parts)] == [("s-long", (1,)), ("s-short", (1,))]


def test_run_id_is_refused(load: Callable[..., list[NumberedRun]]) -> None:
    with pytest.raises(UserError, match="--run-id: the runs of a study are named by"):
        load("--run-id", "x")
