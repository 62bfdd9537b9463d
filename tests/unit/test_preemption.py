"""A preemption is heard by a step that ends: with a stub in place of srun, whose end stands for Slurm's SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.slurm import preemption
from launcher.slurm.preemption import watching_for_preemption

BOUND_S = 60.0


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when this process is sent SIGTERM."""
    event = threading.Event()

    kill = os.kill

    def note(pid: int, number: int) -> None:
        if pid != os.getpid():  # the stub's
            kill(pid, number)
        else:
            assert number == signal.SIGTERM
            event.set()

    monkeypatch.setattr(preemption.os, "kill", note)
    return event


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


@pytest.mark.parametrize("end", ["exit 143", "kill -TERM $$"])
def test_a_step_that_slurm_ends_is_passed_on_as_a_request_to_stop(
    end: str, heard: threading.Event, set_srun: Callable[[str], None]
) -> None:
    set_srun(f'[ "$SLURM_JOB_ID" = 12 ] && [ -z "$SLURM_CPU_BIND" ] || exit 1\n{end}')
    with watching_for_preemption() as watch:
        assert heard.wait(BOUND_S)
        assert watch is not None and watch.heard


def test_a_step_that_can_not_be_had_says_nothing(heard: threading.Event, set_srun: Callable[[str], None]) -> None:
    set_srun("echo 'srun: unrecognized option --overlap' >&2; exit 1")
    with watching_for_preemption() as watch:
        assert watch is not None
        watch.join()
    assert not heard.is_set() and not watch.heard


def test_the_end_of_the_task_ends_the_step_unheard(heard: threading.Event, set_srun: Callable[[str], None]) -> None:
    set_srun("exec sleep 1000")
    with watching_for_preemption() as watch:
        assert watch is not None
    watch.join()
    assert not heard.is_set() and not watch.heard


def test_without_srun_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with watching_for_preemption() as watch:
        assert watch is None
