"""The examples of docs/batch.md, each run with only the environment that its batch system provides."""

import json
import re
import shlex
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import LAUNCH_S, Launch, assert_same_bytes, await_event, finish, start_alone, trains
from rank_launcher import REPOSITORY
from tiny_runs import Run, Trainer

from doccls.config.schema import TrainConfig

FOLDS = 5
# The environment of every process; the second variable hides GPUs of the tests' machine.
IMAGE = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
MOUNTED_AT = "/work"
TRAIN, TRAIN_WITH_FAULT = "doccls.train:main", "fault_train:train_with_fault"


def read_example(language: str, word: str) -> str:
    """Return the only block of docs/batch.md in that language that contains the word."""
    page = (REPOSITORY / "docs" / "batch.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (example,) = [block for block in blocks if word in block]
    return example


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The indexed Job of Kubernetes."""
    job: dict[str, Any] = yaml.safe_load(read_example("yaml", "kind: Job"))
    return job


@pytest.fixture(scope="module")
def container(job: dict[str, Any]) -> dict[str, Any]:
    """The container of the Job's pods."""
    return find_container(job)


def find_container(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return dict(container)


def make_shared_folder(trainer: Trainer, **train: Any) -> Path:
    """Make a folder with a configs/train.yaml that trains five folds on the trainer's pages."""
    stated = yaml.safe_load(trainer.config.read_text())
    for key in ("train_csv", "sample_csv", "image_dir_train", "image_dir_test"):
        stated["data"][key] = str(trainer.config.parent / stated["data"][key])
    stated["data"] |= {"folds": FOLDS, "num_workers": 0}
    stated["train"] |= train
    stated["output"] = {"logs_dir": "../logs", "exp_dir": "../experiments"}
    folder = trainer.new_folder()
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "train.yaml").write_text(yaml.safe_dump(stated))
    return folder


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    """The run of all five folds in one process."""
    return Trainer(make_shared_folder(trainer) / "configs" / "train.yaml", trainer.workspace / "undisturbed").train()


def start_pod(
    container: dict[str, Any], folder: Path, index: int, *words: str, fault: str | None = None
) -> ForkServerProcess:
    """Start the container of an index, with the folder in place of its volume."""
    assert MOUNTED_AT in [volume["mountPath"] for volume in container["volumeMounts"]]
    assert container["workingDir"] == MOUNTED_AT
    environment = {
        variable["name"]: variable["value"].replace(MOUNTED_AT, str(folder)) for variable in container["env"]
    }
    environment |= IMAGE | {"HOME": str(folder / f"home{index}"), "JOB_COMPLETION_INDEX": str(index)}
    program, *stated = [*container["command"], *container["args"]]
    assert program == "doccls-launch"
    if fault is not None:
        environment["DOCCLS_TEST_FAULT"] = fault
    ranks = TRAIN if fault is None else TRAIN_WITH_FAULT
    return start_alone(folder, environment, f"pod{index}", ranks, "launcher", *stated, *words)


def run_job(job: dict[str, Any], folder: Path, faults: dict[int, str]) -> dict[int, list[int]]:
    """Run pods as the Job's controller does; return exit codes by index, of each pod and its replacements.

    The first pod of an index may have a fault.
    """
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    codes: dict[int, list[int]] = {index: [] for index in range(spec["completions"])}
    pods = {index: start_pod(find_container(job), folder, index, fault=faults.get(index)) for index in codes}
    failures = 0
    while pods:
        assert wait([pod.sentinel for pod in pods.values()], LAUNCH_S), f"no pod ends: {codes}"
        for index in [index for index, pod in pods.items() if not pod.is_alive()]:
            ended = finish(pods.pop(index), folder, f"pod{index}")
            codes[index].append(ended.code)
            if ended.code:
                failures += not is_ignored(job, ended.code)
                assert failures <= spec.get("backoffLimit", 6), ended.out + ended.err
                pods[index] = start_pod(find_container(job), folder, index)
    return codes


def is_ignored(job: dict[str, Any], code: int) -> bool:
    """Return whether podFailurePolicy replaces a pod with that exit code without counting a failure."""
    stated = [rule["onExitCodes"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    return any(rule["operator"] == "In" and code in rule["values"] for rule in stated)


def read_logs(folder: Path, index: int) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob(f"logs/*_task{index}.log")))


def test_kubernetes_job_with_killed_pod_gives_bytes_of_one_process(
    job: dict[str, Any], trainer: Trainer, undisturbed: Run
) -> None:
    folder = make_shared_folder(trainer)
    codes = run_job(job, folder, faults={2: "launcher"})
    assert codes == {index: [-signal.SIGKILL, 0] if index == 2 else [0] for index in range(FOLDS)}
    run = Run([], folder)
    assert run.root.name == "pages-1"
    assert_same_bytes(undisturbed, run, FOLDS)
    attempts = [json.loads((run.root / f"launch_task{index}.json").read_text())["attempts"] for index in range(FOLDS)]
    outcomes = [[(attempt["fold"], attempt["outcome"]) for attempt in task] for task in attempts]
    assert outcomes == [[(2, "lost"), (2, "done")] if index == 2 else [(index, "done")] for index in range(FOLDS)]
    logs = "".join(read_logs(folder, index) for index in range(FOLDS))
    assert logs.count("[OOF] -> ") == 1, "one pod merges"


@pytest.mark.parametrize(("words", "code"), [((), 75), (("--requeue-code", "99"), 99)])
def test_evicted_pod_exits_with_resumable_code(
    job: dict[str, Any], container: dict[str, Any], trainer: Trainer, words: tuple[str, ...], code: int
) -> None:
    folder = make_shared_folder(trainer, epochs=500)
    pod = start_pod(container, folder, 3, *words)
    await_event(lambda: not pod.is_alive() or trains(folder), "an epoch", folder, "pod3")
    pod.terminate()
    ended = finish(pod, folder, "pod3")
    assert ended.code == code, ended.out + ended.err
    log = read_logs(folder, 3)
    assert f"[LAUNCH] stopped by SIGTERM; exit code {code}: the task can resume\n" in log
    assert f"[EXIT] TRAINING ERROR code={code}\n" in log
    assert list(folder.glob("experiments/*/pages-1/ckpt/last_fold3_*")), "a resume checkpoint"
    assert is_ignored(job, code) == (not words)


def test_grace_period_of_pod_exceeds_stop_timeout(job: dict[str, Any]) -> None:
    spec = job["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] > TrainConfig().stop_timeout_s
    assert spec["restartPolicy"] == "Never", "podFailurePolicy takes no other"


def test_pod_without_run_id_is_rejected(container: dict[str, Any], trainer: Trainer) -> None:
    command = container["command"]
    index = command.index("--run-id")
    nameless = {**container, "command": [*command[:index], *command[index + 2 :]]}
    folder = make_shared_folder(trainer)
    refused = finish(start_pod(nameless, folder, 0), folder, "pod0")
    assert refused.code == 1
    assert "index 0: the environment does not state the array's ID; name the run with --run-id ID" in refused.err
    assert not (folder / "experiments").exists()


def run_in_pbs(folder: Path, command: str, **variables: str) -> Launch:
    """Run the script of docs/batch.md as PBS runs task 3 of array 12; variables are those of `qsub -v`.

    The shell command replaces `doccls-launch`.
    """
    script, home = folder / "kfold.pbs", folder / "home"
    script.write_text(read_example("bash", "#PBS -J 0-4\n"))
    home.mkdir(exist_ok=True)
    program = folder / ".venv" / "bin" / "doccls-launch"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    given = {"PBS_JOBID": "12[3].host", "PBS_ARRAY_INDEX": "3", "PBS_O_WORKDIR": str(folder)}
    done = subprocess.run(
        ["bash", str(script)],
        cwd=home,
        env=IMAGE | {"HOME": str(home)} | given | variables,
        capture_output=True,
        text=True,
        timeout=LAUNCH_S,
        check=False,
    )
    return Launch(done.returncode, done.stdout, done.stderr, Run([], folder))


def test_pbs_task_trains_fold_of_its_index_and_reports_missing_folds(trainer: Trainer, undisturbed: Run) -> None:
    folder = make_shared_folder(trainer)
    ended = run_in_pbs(
        folder, f'PYTHONPATH={shlex.quote(str(REPOSITORY))} exec {shlex.quote(sys.executable)} -m launcher "$@"'
    )
    assert ended.code == 0, ended.out + ended.err
    assert ended.run.root.name == "v001-j12"
    predictions = "oof/parts/fold3.safetensors"
    assert (ended.run.root / predictions).read_bytes() == (undisturbed.root / predictions).read_bytes()
    assert "\n[EXIT] INCOMPLETE missing=0,1,2,4 code=0\n" in read_logs(folder, 3)
    assert "[EXIT] this command's share is finished, but folds 0, 1, 2, 4 of the run are not" in ended.out


def test_run_id_can_be_passed_to_pbs_array(tmp_path: Path) -> None:
    command = """printf '%s\\n' "$PWD" "$@\""""
    for variables, words in (({}, []), ({"RUN_ID": "v001-j11"}, ["--run-id", "v001-j11"])):
        ended = run_in_pbs(tmp_path, command, **variables)
        stated = [str(tmp_path), "task", "--config", "configs/train.yaml", *words]
        assert (ended.code, ended.out.splitlines()) == (0, stated), ended.err
