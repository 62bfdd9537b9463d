"""study.json as other commands read it: the runs are where the study is, whatever their paths were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from doccls.errors import UserError
from launcher.study_file import find_study, read_study


@pytest.mark.parametrize("folder", ["20261129/s-a-s1", "/elsewhere/experiments/20261129/s-a-s1", "exp/20261129/s-a-s1"])
def test_runs_are_beside_the_study(tmp_path: Path, folder: str) -> None:
    file = tmp_path / "moved" / "studies" / "s" / "study.json"
    file.parent.mkdir(parents=True)
    runs = [{"run_id": "s-a-s1", "folder": folder, "config": "a.yaml", "seed": 1, "num_folds": 5}]
    file.write_text(json.dumps({"name": "s", "runs": runs}))
    assert find_study(file) == find_study(file.parent) == file
    study = read_study(file)
    assert (study.name, study.lock) == ("s", file.parent / "study.lock")
    assert [(run.paths.root, run.num_folds) for run in study.runs] == [(tmp_path / "moved/20261129/s-a-s1", 5)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": "s", "runs": [{"folder": "a"}]}', '{"name": "s", "runs": 3}']
)
def test_damaged_study_is_a_user_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "study.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"study\.json: damaged"):
        read_study(file)


def test_a_run_is_no_study(tmp_path: Path) -> None:
    assert find_study(tmp_path) is None and find_study(tmp_path / "study.json") is None
    assert find_study(tmp_path / ("y" * 300)) is None
