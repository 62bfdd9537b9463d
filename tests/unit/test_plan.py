"""Plans: each fold once, in the right slot, with its shell command; rendered for people and as JSON."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from doccls.config import Config, load_config
from doccls.config.arguments import load_arguments
from doccls.errors import UserError
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, write_predictions
from doccls.run.fingerprint import derive_fingerprint
from doccls.run.paths import RunPaths
from launcher import cli, placement
from launcher.arguments import make_plan
from launcher.devices import Device, list_cpus
from launcher.parser import build_parser
from launcher.placement import choose_slots
from launcher.plan import (
    LaunchPlan,
    Workload,
    describe_plan,
    make_slots,
    plan_waves,
    render_fold_command,
    render_plan,
    warn_of_threads,
)

GPUS = [Device(f"gpu {index}", f"GPU-{index:04d}", "NVIDIA H100") for index in range(64)]
HOSTILE = ("a b.yaml", 'it\'s "quoted"', "new\nline", "$(exit 3) `x` $HOME", "-", "*", "back\\slash", "ü;&|<>#!~", "")
BARE = Workload("python", (), 1)
PLAN = LaunchPlan(
    run_folder="/exp/20260102/v001-abc",
    finished=(0, 3),
    waves=plan_waves([1, 2, 4], make_slots(GPUS[:4], 2), Workload("python", ("--config", "a b.yaml"), 2)),
    files=("oof/oof_logits.npy", "summary.json"),
    warnings=("too many threads",),
    batch_size=32,
    images_at_a_time=16,
)


def render_start(fold: int, gpus: str) -> str:
    return (
        f"           env OMP_NUM_THREADS=2 DOCCLS_DEVICE=cuda CUDA_VISIBLE_DEVICES={gpus} "
        "python -m accelerate.commands.launch "
        "--multi_gpu --num_processes 2 --main_process_port 0 -m doccls.train --config 'a b.yaml' "
        f"--set data.valid_fold={fold}"
    )


# --- waves -----------------------------------------------------------------------------------------------------------


def test_each_of_thousand_folds_on_64_gpus_is_planned_once() -> None:
    started = time.perf_counter()
    slots = make_slots(GPUS, 1)
    waves = plan_waves(range(1000), slots, Workload("python", ("--config", "c.yaml", "--run-id", "v001-abc"), 2))
    plan = replace(PLAN, waves=waves)
    text, described = render_plan(plan), json.dumps(describe_plan(plan))
    print(f"1000 folds on 64 GPUs planned and rendered in {time.perf_counter() - started:.3f} s")
    assert [assignment.fold for wave in waves for assignment in wave] == list(range(1000))
    assert [len(wave) for wave in waves] == [64] * 15 + [40]
    for wave in waves:
        assert [assignment.slot for assignment in wave] == list(slots[: len(wave)])
    for assignment in (assignment for wave in waves for assignment in wave):
        words, fold = shlex.split(render_fold_command(assignment)), assignment.fold
        assert f"CUDA_VISIBLE_DEVICES=GPU-{fold % 64:04d}" in words and f"data.valid_fold={fold}" in words
    assert text.count("wave 16: fold ") == 40 and len(json.loads(described)["waves"]) == 16


@pytest.mark.parametrize(("folds", "sizes"), [([], []), ([7], [1]), ([5, 1, 3], [3]), ([4, 2, 9, 0], [3, 1])])
def test_folds_keep_their_order(folds: list[int], sizes: list[int]) -> None:
    waves = plan_waves(folds, make_slots(list_cpus(3), 1), BARE)
    assert [assignment.fold for wave in waves for assignment in wave] == folds
    assert [len(wave) for wave in waves] == sizes


def test_folds_share_gpu_only_when_all_are_in_use() -> None:
    (first, second) = plan_waves(range(6), make_slots(GPUS[:2], 1, 2), BARE)
    assert [assignment.slot.name for assignment in first] == ["gpu 0", "gpu 1", "gpu 0", "gpu 1"]
    assert [assignment.slot.name for assignment in second] == ["gpu 0", "gpu 1"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "environment", "program"),
    [
        (list_cpus(1), ["OMP_NUM_THREADS=3", "CUDA_VISIBLE_DEVICES=", "ACCELERATE_USE_CPU=true"], ["python"]),
        (GPUS[5:6], ["OMP_NUM_THREADS=3", "DOCCLS_DEVICE=cuda", "CUDA_VISIBLE_DEVICES=GPU-0005"], ["python"]),
        (
            GPUS[2:5],
            ["OMP_NUM_THREADS=3", "DOCCLS_DEVICE=cuda", "CUDA_VISIBLE_DEVICES=GPU-0002,GPU-0003,GPU-0004"],
            [
                *("python", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "3"),
                *("--main_process_port", "0"),
            ],
        ),
    ],
)
def test_command_names_devices_threads_ranks_and_fold(
    devices: list[Device], environment: list[str], program: list[str]
) -> None:
    (slot,) = make_slots(devices, len(devices))
    words = shlex.split(render_fold_command(Workload("python", ("--config", "c.yaml"), 3).assign(12, slot)))
    shared = ["-m", "doccls.train", "--config", "c.yaml", "--set", "data.valid_fold=12"]
    assert words == ["env", *environment, *program, *shared]


def test_command_with_special_characters_is_quoted_for_shell(tmp_path: Path) -> None:
    """A stub of `python` prints its environment and arguments."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "$CUDA_VISIBLE_DEVICES" "$OMP_NUM_THREADS" "$@"\n')
    stub.chmod(0o755)
    (slot,) = make_slots(GPUS[:1], 1)
    command = render_fold_command(Workload("python", HOSTILE, 2).assign(4, slot))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split("\0")[:-1] == [
        "GPU-0000",
        "2",
        "-m",
        "doccls.train",
        *HOSTILE,
        "--set",
        "data.valid_fold=4",
    ]


@pytest.mark.parametrize(
    ("slots", "ranks", "folds", "threads", "cores", "processes"),
    [
        (4, 1, 9, 2, 8, None), (4, 1, 9, 2, 7, 4), (4, 1, 3, 2, 6, None), (4, 1, 3, 2, 5, 3), (4, 2, 9, 1, 3, 4),
        (4, 2, 1, 1, 1, 2), (4, 1, 0, 99, 1, None),
    ],
)  # fmt: skip
def test_more_threads_than_cores_give_warning(
    slots: int, ranks: int, folds: int, threads: int, cores: int, processes: int | None
) -> None:
    warnings = warn_of_threads(make_slots(list_cpus(slots), ranks), folds, threads, cores)
    if processes is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith(f"{processes} processes x {threads} threads (train.cpu_threads) on {cores} cores")


def test_threads_of_gpu_processes_give_no_warning() -> None:
    assert warn_of_threads(make_slots(GPUS, 1), 64, 8, 1) == []


# --- rendering -------------------------------------------------------------------------------------------------------


def test_rendered_plan() -> None:
    assert render_plan(PLAN).splitlines() == [
        "[PLAN] run /exp/20260102/v001-abc",
        "[PLAN] finished before: folds 0, 3",
        "[WARNING] too many threads",
        "[PLAN] wave 1: fold 1 on gpu 0,1 ranks=2",
        render_start(1, "GPU-0000,GPU-0001"),
        "[PLAN] wave 1: fold 2 on gpu 2,3 ranks=2",
        render_start(2, "GPU-0002,GPU-0003"),
        "[PLAN] wave 2: fold 4 on gpu 0,1 ranks=2, or in the first free slot",
        render_start(4, "GPU-0000,GPU-0001"),
        "[PLAN] a step takes 32 images on 2 processes, 16 at a time on each",
        "[PLAN] will write: oof/oof_logits.npy",
        "[PLAN] will write: summary.json",
    ]
    assert "will write" not in render_plan(PLAN, commands=False) and "env " not in render_plan(PLAN, commands=False)


def test_json_plan_has_command_and_environment_of_each_rank() -> None:
    described = json.loads(json.dumps(describe_plan(PLAN)))
    assert described["finished"] == [0, 3] and described["warnings"] == ["too many threads"]
    assert [[assignment["fold"] for assignment in wave] for wave in described["waves"]] == [[1, 2], [4]]
    (last,) = described["waves"][1]
    assert last["slot"]["devices"][1] == {
        "name": "gpu 1",
        "uuid": "GPU-0001",
        "model": "NVIDIA H100",
        "given": False,
        "fault": "",
        "used_mib": 0,
        "total_mib": 0,
        "exclusive": False,
        "lacks_p2p": False,
    }
    first, second = last["ranks"]
    assert first["argv"] == second["argv"] == [
        "python", "-m", "doccls.train", "--config", "a b.yaml", "--set", "data.valid_fold=4"
    ]  # fmt: skip
    assert (first["environment"]["RANK"], second["environment"]["RANK"]) == ("0", "1")
    assert second["environment"]["CUDA_VISIBLE_DEVICES"] == "GPU-0000,GPU-0001"


# --- plans of a run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def write_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write_config(train={"lr": 0.1})` writes a config with five folds in tmp_path; its data does not exist."""
    monkeypatch.setattr(placement, "count_cores", lambda: 2)

    def write(**sections: dict[str, object]) -> Path:
        data = {"train_csv": "gone.csv", "image_dir_train": "gone", "folds": 5} | sections.pop("data", {})
        output = {"exp_dir": "exp", "logs_dir": "logs"}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": data, "output": output, **sections}))
        return tmp_path / "c.yaml"

    return write


def plan_run(config: Path, *words: str) -> LaunchPlan:
    """Return the plan of `doccls-launch plan --config <config> --slots 2 --run-id v001-abc <words>`."""
    arguments = build_parser().parse_args(["plan", "--config", str(config), "--slots", "2", *words])
    loaded = load_arguments(arguments)
    return make_plan(arguments, loaded, "v001-abc", choose_slots(arguments, loaded).slots, loaded.data.list_wanted(), 2)


def finish(config: Config, paths: RunPaths, *folds: int) -> None:
    """Create the run of this config, if necessary, and finish the folds."""
    fingerprint = derive_fingerprint(config, "d", "f", None)
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.snapshot.write_text(f"provenance: {{fingerprint: {fingerprint}, data_digest: d, folds_digest: f}}\n")
    for fold in folds:
        info = PredictionsInfo(fingerprint, fold, 5, 5, ("x", "y"), ("i",), (), 1, 0.5)
        write_predictions(
            paths.predictions(fold),
            FoldPredictions(info, np.array([fold]), np.zeros((1, 2), np.float32), np.array([0])),
        )


def test_new_run_is_planned_without_reading_data(write_config: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_run(write_config())
    assert [[assignment.fold for assignment in wave] for wave in plan.waves] == [[0, 1], [2, 3], [4]]
    assert plan.finished == ()
    assert plan.run_folder.startswith(str(tmp_path / "exp")) and plan.run_folder.endswith("/v001-abc")
    assert {"oof/oof_logits.npy", "ckpt/best_fold4.pth", "oof/parts/fold0.safetensors"} <= set(plan.files)
    assert "oof/oof_logits_damaged.npy" not in plan.files
    assert "oof/oof_logits_damaged.npy" in plan_run(write_config(valid={"damage": "light"})).files
    assert plan.warnings == ("2 processes x 2 threads (train.cpu_threads) on 2 cores: they will wait for each other",)
    assert [file.name for file in tmp_path.iterdir()] == ["c.yaml"], "a plan writes nothing"


def test_finished_folds_are_not_planned(write_config: Callable[..., Path], tmp_path: Path) -> None:
    path, paths = write_config(), RunPaths(tmp_path / "exp" / "20260101" / "v001-abc")
    finish(load_config(path), paths, 1, 3, 4)
    plan = plan_run(path)
    assert plan.run_folder == str(paths.root), "the folder of an earlier day"
    assert plan.finished == (1, 3, 4) and [[assignment.fold for assignment in wave] for wave in plan.waves] == [[0, 2]]
    paths.predictions(3).write_bytes(b"torn")
    assert plan_run(path).finished == (1, 4)


def test_only_merge_is_planned_for_finished_run(write_config: Callable[..., Path], tmp_path: Path) -> None:
    path, paths = write_config(), RunPaths(tmp_path / "exp" / "20260101" / "v001-abc")
    finish(load_config(path), paths, *range(5))
    plan = plan_run(path)
    assert plan.waves == () and plan.finished == (0, 1, 2, 3, 4) and plan.warnings == ()
    assert "oof/oof_logits.npy" in plan.files and "wave" not in render_plan(plan)


@pytest.mark.parametrize(("done", "waves", "finished"), [([], [[3]], ()), ([3, 1], [], (3,)), ([1], [[3]], ())])
def test_single_fold_is_planned_without_merge(
    write_config: Callable[..., Path], tmp_path: Path, done: list[int], waves: list[list[int]], finished: tuple[int]
) -> None:
    path = write_config(data={"valid_fold": 3})
    finish(load_config(path), RunPaths(tmp_path / "exp" / "20260101" / "v001-abc"), *done)
    plan = plan_run(path)
    assert [[assignment.fold for assignment in wave] for wave in plan.waves] == waves
    assert plan.finished == finished and "oof/oof_logits.npy" not in plan.files


def test_changed_config_is_rejected_for_existing_run(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    finish(load_config(path), RunPaths(tmp_path / "exp" / "20260101" / "v001-abc"), 0)
    assert plan_run(path, "--set", "data.num_workers=0").finished == (0,)  # changes no result
    with pytest.raises(UserError, match="choose another --run-id"):
        plan_run(path, "--set", "train.lr=0.5")
    words = ["plan", "--config", str(write_config(train={"lr": 0.5})), "--slots", "1"]
    assert cli.main([*words, "--run-id", "v001-abc"]) == 1
    assert "choose another --run-id" in capsys.readouterr().err
    assert cli.main([*words, "--run-id", "v001-other"]) == 0


def test_command_line_words_are_in_every_command(write_config: Callable[..., Path]) -> None:
    path = write_config()
    words = ["--mode", "basic", "--set", "project.name=a b", "--set", "train.epochs=3", "--num-workers", "0"]
    words.append("--allow-world-size-change")
    command = shlex.split(render_fold_command(plan_run(path, *words).waves[0][0]))
    last = ["--run-id", "v001-abc", "--set", "data.valid_fold=0"]
    assert command[command.index("doccls.train") + 1 :] == ["--config", str(path), *words, *last]


def test_idle_keys_are_warnings_of_plan(write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(train={"mix_prob": 0.5})
    assert cli.main(["plan", "--config", str(config), "--slots", "1"]) == 0
    assert "[WARNING] train.mix_prob = 0.5 (" in capsys.readouterr().out
