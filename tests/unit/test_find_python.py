"""slurm/find_python.sh: which Python a job takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "find_python.sh"


def make_python(path: Path, has_doccls: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {0 if has_doccls else 1}\n")
    path.chmod(0o755)
    return path


def find(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a job reads it: under `set -eo pipefail`, submitted from `home`/away."""
    code = 'set -eo pipefail; home=$1; . "$2"; printf %s "$python"'
    told = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(home / "away"), **environment}
    command = ["bash", "-c", code, "job", str(home), str(SCRIPT)]
    return subprocess.run(command, env=told, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "it's a\nplace"


def test_the_first_that_has_doccls_is_taken(home: Path) -> None:
    environment: dict[str, str] = {}
    for name, path in (
        (None, home / ".venv" / "bin" / "python"),
        (None, home / "away" / ".venv" / "bin" / "python"),
        ("CONDA_PREFIX", home / "conda" / "bin" / "python"),
        ("VIRTUAL_ENV", home / "venv" / "bin" / "python"),
        ("DOCCLS_PYTHON", home / "mine"),
    ):
        make_python(path)
        if name is not None:
            environment[name] = str(path if name == "DOCCLS_PYTHON" else path.parents[1])
        done = find(home, **environment)
        assert (done.returncode, done.stdout) == (0, str(path)), done.stderr


def test_one_without_doccls_is_passed_over(home: Path) -> None:
    without = make_python(home / "conda" / "bin" / "python", has_doccls=False)
    taken = make_python(home / ".venv" / "bin" / "python")
    assert find(home, CONDA_PREFIX=str(without.parents[1])).stdout == str(taken)


def test_lines_of_ones_own_are_read_first(home: Path) -> None:
    mine = make_python(home / "mine")
    (home / "slurm").mkdir()
    (home / "slurm" / "env.sh").write_text('[ -z "$NEVER_SET" ] && export DOCCLS_PYTHON=$home/mine\n')
    assert find(home).stdout == str(mine)


def test_none_is_told_with_what_to_do(home: Path) -> None:
    done = find(home, DOCCLS_PYTHON=str(home / "gone"))
    assert done.returncode == 1
    assert "[EXIT][ERROR] training failed: no Python with doccls on " in done.stderr and "DOCCLS_PYTHON" in done.stderr
