"""A preemption is heard by a step that ends: with a stub in place of srun, whose end stands for Slurm's SIGTERM."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.slurm import preemption
from launcher.slurm.preemption import watching_for_preemption


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that this process was asked to stop by."""
    signals: list[int] = []
    monkeypatch.setattr(preemption, "agree_to_stop", signals.append)
    return signals


@pytest.fixture
def set_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`set_srun(script)`: what srun does."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CPU_BIND", "of a shell in another job")

    def write(script: str) -> None:
        srun = tmp_path / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(f"#!/bin/bash\n{script}\n")
        srun.chmod(0o755)
        monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")

    return write


@pytest.mark.parametrize(
    ("end", "number"),
    [("exit 143", signal.SIGTERM), ("kill -TERM $$", signal.SIGTERM), ("exit 138", signal.SIGUSR1)],
)
def test_a_step_that_slurm_ends_is_passed_on_as_a_request_to_stop(
    end: str, number: int, heard: list[int], set_srun: Callable[[str], None]
) -> None:
    set_srun(f'[ "$SLURM_JOB_ID" = 12 ] && [ -z "$SLURM_CPU_BIND" ] || exit 1\n{end}')
    with watching_for_preemption() as watch:
        assert watch is not None
        watch.join()
    assert heard == [number]


def test_a_step_that_can_not_be_had_says_nothing(heard: list[int], set_srun: Callable[[str], None]) -> None:
    set_srun("echo 'srun: unrecognized option --overlap' >&2; exit 1")
    with watching_for_preemption() as watch:
        assert watch is not None
        watch.join()
    assert heard == []


def test_the_end_of_the_task_ends_the_step_unheard(heard: list[int], set_srun: Callable[[str], None]) -> None:
    set_srun("exec sleep 1000")
    with watching_for_preemption() as watch:
        assert watch is not None
    watch.join()
    assert heard == []


@pytest.mark.parametrize("there", [False, True])
def test_without_an_srun_that_runs_nobody_listens(
    there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, set_srun: Callable[[str], None]
) -> None:
    if there:
        set_srun("")
        (tmp_path / "bin" / "srun").write_bytes(b"\x7fELF of another machine")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    else:
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.setenv("PATH", str(tmp_path))
    with watching_for_preemption() as watch:
        assert watch is None
