"""Batch scripts: the checked-in ones, the Python that they choose, and the sbatch command."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.slurm.script import JobRequest, render_kfold, render_merge, render_output, render_sbatch, render_script

SLURM = Path(__file__).resolve().parents[2] / "slurm"
REQUEST = JobRequest(nodes=2, gpus_per_node=4, cpus_per_task=16, partition="gpu", at_once=3, others=("--exclude=n7",))
PRINT_ARGUMENTS = '#!/bin/sh\n[ "$1" = -c ] || printf "%s\\0" "$0" "$@"\n'


def make_python(path: Path, has_doccls: bool = True) -> Path:
    """Write a fake Python that prints its path and its arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PRINT_ARGUMENTS if has_doccls else "#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


def run(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "12", **environment}
    command = ["bash", "-c", script, "job", *args]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


def run_kfold(home: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run slurm/kfold.sh of the checkout in `home`, submitted from there."""
    (home / "slurm").mkdir(parents=True, exist_ok=True)
    (home / "slurm" / "kfold.sh").touch()
    return run(render_kfold(), *args, SLURM_SUBMIT_DIR=str(home), **environment)


def find_python(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = run_kfold(home, **environment)
    done.stdout = done.stdout.partition("\0")[0]
    return done


@pytest.mark.parametrize(("name", "render"), [("kfold", render_kfold), ("merge", render_merge)])
def test_checked_in_scripts_match_the_template(name: str, render: Callable[[], str]) -> None:
    checked_in = (SLURM / f"{name}.sh").read_text(encoding="utf-8")
    assert checked_in == render(), f"python -m launcher.slurm.script {name} >slurm/{name}.sh"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "it's a\nplace"


def test_first_python_with_doccls_is_chosen(home: Path) -> None:
    environment: dict[str, str] = {}
    for name, path in (
        (None, home / ".venv" / "bin" / "python"),
        ("CONDA_PREFIX", home / "conda" / "bin" / "python"),
        ("VIRTUAL_ENV", home / "venv" / "bin" / "python"),
        ("DOCCLS_PYTHON", home / "mine"),
    ):
        make_python(path)
        if name is not None:
            environment[name] = str(path if name == "DOCCLS_PYTHON" else path.parents[1])
        done = find_python(home, **environment)
        assert (done.returncode, done.stdout) == (0, str(path)), done.stderr


def test_python_without_doccls_is_skipped(home: Path) -> None:
    without = make_python(home / "conda" / "bin" / "python", has_doccls=False)
    chosen = make_python(home / ".venv" / "bin" / "python")
    assert find_python(home, CONDA_PREFIX=str(without.parents[1])).stdout == str(chosen)


def test_env_sh_is_read_first(home: Path) -> None:
    mine = make_python(home / "mine")
    (home / "slurm").mkdir()
    (home / "slurm" / "env.sh").write_text('[ -z "$NEVER_SET" ] && export DOCCLS_PYTHON=$home/mine\n')
    assert find_python(home).stdout == str(mine)


def test_error_without_python_gives_advice(home: Path) -> None:
    done = find_python(home, DOCCLS_PYTHON=str(home / "gone"))
    assert done.returncode == 1
    assert "[EXIT][ERROR] training failed: no Python with doccls on " in done.stderr and "DOCCLS_PYTHON" in done.stderr


def test_setup_line_runs_before_the_task(home: Path) -> None:
    python = make_python(home / "mine")
    for args in (["--setup", "export DOCCLS_PYTHON=$home/mine"], ["--setup=export DOCCLS_PYTHON=$home/mine"]):
        done = run_kfold(home, "my c.yaml", *args, "--set", "a=b c")
        assert done.stdout.split("\0") == [
            str(python), "-m", "launcher", "task", "--config", "my c.yaml", *args, "--set", "a=b c", ""
        ], done.stderr  # fmt: skip


@pytest.mark.parametrize("line", ["false", "cd /no/such/folder", "no-such-module load cuda"])
def test_failing_setup_line_ends_the_job_with_an_error(home: Path, line: str) -> None:
    make_python(home / ".venv" / "bin" / "python")
    done = run_kfold(home, "--setup", line)
    assert done.returncode != 0 and done.stdout == ""
    assert f"[EXIT] TRAINING ERROR code={done.returncode}\n[EXIT][ERROR] training failed: {line}\n" in done.stderr


def test_env_sh_of_submission_folder_takes_precedence(home: Path) -> None:
    for folder in (home, home / "away"):
        (folder / "slurm").mkdir(parents=True, exist_ok=True)
        python = shlex.quote(str(make_python(folder / "mine")))
        (folder / "slurm" / "env.sh").write_text(f"export DOCCLS_PYTHON={python}\n")
    script = render_script(REQUEST, "r", str(home), [], "/no/python", [])
    for expected, submission_folder in ((home / "away", home / "away"), (home, home / "elsewhere")):
        done = run(script, SLURM_SUBMIT_DIR=str(submission_folder))
        assert done.stdout.startswith(f"{expected / 'mine'}\0"), done.stderr


def test_merge_gets_the_run(home: Path) -> None:
    python = make_python(home / "mine")
    (home / "slurm").mkdir()
    (home / "slurm" / "merge.sh").touch()
    done = run(render_merge(), "/a run", SLURM_SUBMIT_DIR=str(home), DOCCLS_PYTHON=str(python))
    assert done.stdout.split("\0")[:-1] == [str(python), "-m", "launcher", "merge", "/a run"], done.stderr


def test_script_of_submitted_task_handles_hostile_arguments(home: Path) -> None:
    python = make_python(home / "my python")
    (home / "slurm").mkdir()
    (home / "slurm" / "env.sh").write_text("export FROM_ENV=1\n")
    args = ("--config", "it's $HOME/\nc.yaml", "--set", 'a="b"')
    script = render_script(REQUEST, "r", str(home), ["[ $FROM_ENV = 1 ]", "echo 'set up' >&2"], str(python), args)
    done = run(script)
    assert done.stdout.split("\0")[:-1] == [str(python), "-m", "launcher", "task", *args], done.stderr
    assert done.stderr == "set up\n"
    assert run(script, DOCCLS_PYTHON=str(make_python(home / "other"))).stdout.startswith(str(home / "other"))
    assert [line for line in script.splitlines() if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=doccls-r", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gres=gpu:4",
        "#SBATCH --cpus-per-task=16", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@120",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"gpus_per_node": 0}, {"gres": "gpu:a100:1"}, {"others": ("--gpus=4",)}, {"others": ("--gpus-per-task=2",)},
        {"others": ("--gres=gpu:a100:1",)}, {"others": ("-G4",)}, {"others": ("--tres-per-task=gres/gpu:1",)},
    ],
)  # fmt: skip
def test_gpu_request_of_user_replaces_the_default(changes: dict[str, Any]) -> None:
    assert "gpu:4" not in render_script(replace(REQUEST, **changes), "r", "/h", [], "python", [])


@pytest.mark.parametrize("other", ["--gres=nvme:1", "--gpu-bind=closest", "--exclude=gpus7"])
def test_other_options_keep_the_default(other: str) -> None:
    assert "--gres=gpu:4" in render_script(replace(REQUEST, others=(other,)), "r", "/h", [], "python", [])


def test_sbatch_submits_one_task_per_fold() -> None:
    request = replace(REQUEST, qos="high", constraint="a100&ib", mem="32G", gres="gpu:a100:1")
    command = render_sbatch(request, (1, 3, 4), "doccls:r:abc", "/a run/slurm-%A_%a.out")
    assert command[0] == "sbatch" and command[-1] == "--exclude=n7"
    options = dict(word[2:].split("=", 1) for word in command[1:] if "=" in word)
    assert (options["array"], options["comment"], options["output"]) == (
        "1,3,4%3", "doccls:r:abc", "/a run/slurm-%A_%a.out"
    )  # fmt: skip
    assert (options["partition"], options["qos"], options["mem"], options["gres"]) == (
        "gpu",
        "high",
        "32G",
        "gpu:a100:1",
    )
    assert options["constraint"] == "a100&ib" and "account" not in options and "time" not in options


def test_output_pattern_is_rendered() -> None:
    assert render_output("/a/100%/x") == "/a/100%%/x/slurm-%A_%a.out"
    assert render_output("/a\\b") == "slurm-%A_%a.out"
