"""`doccls-launch run` and `plan` with several configs or seeds: what they accept, and what they make of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher import placement
from launcher.cli import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two configs; their data does not exist."""
    monkeypatch.setattr(placement, "count_cores", lambda: 2)
    paths = tmp_path / "a.yaml", tmp_path / "b.yaml"
    for path, lr in zip(paths, (0.1, 0.2), strict=True):
        data = {"train_csv": "gone.csv", "image_dir_train": "gone", "folds": 3}
        output = {"exp_dir": "exp", "logs_dir": "logs"}
        path.write_text(yaml.safe_dump({"data": data, "output": output, "train": {"lr": lr}}))
    return paths


@pytest.fixture
def call(configs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Call:
    """Call `doccls-launch COMMAND --config a.yaml --config b.yaml --slots 2 WORDS`."""

    def call_it(command: str, *words: str) -> tuple[int, str, str]:
        both = [word for path in configs for word in ("--config", str(path))]
        code = main([command, *both, "--slots", "2", *words])
        return code, *capsys.readouterr()

    return call_it


def test_plan_shows_each_run(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("plan", "--seeds", "1,2", "--study", "s", "--json")
    plan = json.loads(out)
    assert code == 0 and list(plan["runs"]) == ["s-a-s1", "s-a-s2", "s-b-s1", "s-b-s2"]
    assert [(fold["run_id"], fold["assignment"]["fold"]) for wave in plan["waves"] for fold in wave][:4] == [
        ("s-a-s1", 0), ("s-a-s1", 1), ("s-a-s1", 2), ("s-a-s2", 0),
    ]  # fmt: skip
    assert [len(wave) for wave in plan["waves"]] == [2] * 6 and plan["waves"][-1][1]["run_id"] == "s-b-s2"
    argv = plan["waves"][-1][0]["assignment"]["ranks"][0]["argv"]
    assert argv[argv.index("--config") + 1] == str(tmp_path / "b.yaml") and argv[argv.index("--run-id") + 1] == "s-b-s2"
    assert [value for word, value in itertools.pairwise(argv) if word == "--set"] == [
        "project.seed=2", "data.fold_seed=42", "data.valid_fold=1",
    ]  # fmt: skip
    code, out, _ = call("plan")
    assert out.count("[PLAN] run ") == 2 and "[PLAN] study study-NEW: 6 folds of 2 runs" in out
    assert "[PLAN] wave 3: study-NEW-b fold 2 on cpu 1, or in the first free slot" in out
    assert out.count("[WARNING] data.train_csv") == 1  # the data is not on this machine
    code, out, _ = call("plan", "--set-each", "train.epochs=3,9", "--study", "s")
    assert code == 0 and "[PLAN] wave 1: s-a-epochs9 fold 0 on cpu 0\n" in out  # the longest first


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--run-id", "x"), "--run-id: the runs of a study are named by --study"),
        (("--seeds", "1,x"), "--seeds '1,x': must be integers"),
        (("--study", "../x"), "--study '../x': up to 40"),
        (("--set", "project.seed=x"), "project.seed"),
        (("--set-each", "train.lr=1,1"), "--set-each 'train.lr=1,1': a value is there twice"),
        (("--blend", "--set", "data.valid_fold=1"), "--blend: data.valid_fold = 1: only runs with predictions of all"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    command: str, words: tuple[str, ...], message: str, call: Call, tmp_path: Path
) -> None:
    code, _, err = call(command, *words)
    assert code == 1 and message in err
    assert not (tmp_path / "exp").exists() and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_single_run_can_not_be_blended(
    backend: str, configs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--slots", "1"] if backend == "local" else []
    assert main(["plan", "--config", str(configs[0]), "--blend", "--backend", backend, *words]) == 1
    assert "--blend: the study has only one run; state several --config" in capsys.readouterr().err


def test_plan_of_a_submission_is_one_array(configs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", str(configs[0]), "--seeds", "1,2", "--set-each", "train.epochs=3,9", "--study", "s"]
    words += ["--backend", "slurm", "--at-once", "4", "--blend"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["runs"]) == ["s-a-epochs9-s1", "s-a-epochs9-s2", "s-a-epochs3-s1", "s-a-epochs3-s2"]
    assert "--array=0,1,2,3,4,5,6,7,8,9,10,11%4" in plan["command"] and "--comment=doccls:s:TOKEN" in plan["command"]
    assert f"task --config {configs[0]} --set-each train.epochs=3,9 --seeds 1,2 --blend --study s " in plan["script"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "[PLAN] study s: 12 folds to submit" in out and "#SBATCH --job-name=doccls-s\n" in out


def test_runs_that_need_other_resources_are_not_one_array(
    configs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    configs[1].write_text(configs[1].read_text().replace("lr: 0.2", "lr: 0.2\n  num_processes: 2"))
    words = ["plan", "--config", str(configs[0]), "--config", str(configs[1]), "--backend", "slurm"]
    assert main(words) == 1
    assert "b.yaml: a fold needs other resources (1 nodes" in capsys.readouterr().err


def test_runs_that_need_other_slots_are_refused(call: Call, configs: tuple[Path, Path]) -> None:
    text = configs[1].read_text()
    configs[1].write_text(text.replace("lr: 0.2", "lr: 0.2\n  num_processes: 2"))
    code, _, err = call("plan")
    assert code == 1 and "b.yaml: its folds take 2 devices, those of" in err


def test_runs_in_several_folders_are_refused(call: Call, configs: tuple[Path, Path]) -> None:
    configs[1].write_text(configs[1].read_text().replace("exp_dir: exp", "exp_dir: other"))
    code, _, err = call("plan")
    assert code == 1 and "other, that of" in err and "the runs of a study are in the same folder" in err


def test_one_config_without_seeds_is_a_run(configs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(configs[0]), "--slots", "2", "--run-id", "alone"]) == 0
    out = capsys.readouterr().out
    assert "/alone\n" in out and "study" not in out
