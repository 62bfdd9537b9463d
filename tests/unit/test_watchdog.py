"""The watchdog: when it ends a process that makes no progress, and what it reports about peers."""

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from doccls.run.heartbeat import Beat, Heartbeat
from doccls.run.watchdog import Stall, decide_exit, describe_failed_peers, describe_running_peers

MOVING = Stall(silent_s=0.5, failed_s=None, stop_s=None, limit_s=600.0, stop_limit_s=110.0)
TERM = signal.SIGTERM


@pytest.mark.parametrize(
    ("stall", "signum"),
    [
        (MOVING, None),
        (replace(MOVING, silent_s=599.9), None),
        (replace(MOVING, silent_s=1e9, limit_s=None), None),
        (replace(MOVING, silent_s=500.0, stop_s=109.0), TERM),
        (replace(MOVING, silent_s=500.0, failed_s=4.0), None),
    ],
)
def test_process_within_its_limits_continues(stall: Stall, signum: int | None) -> None:
    assert decide_exit(stall, signum, "train step 3, epoch 1") is None


def test_stalled_process_exits_with_reason() -> None:
    progress = "train step 3, epoch 1"
    assert decide_exit(replace(MOVING, silent_s=600.0), None, progress) == (
        "no step for 600 s (train.collective_timeout_s) in train step 3, epoch 1", 1
    )  # fmt: skip
    stopped = replace(MOVING, stop_s=110.0, limit_s=None)
    assert decide_exit(stopped, TERM, progress) == (
        "SIGTERM received, and this process had not stopped after 110 s (train.stop_timeout_s) "
        "in train step 3, epoch 1", 143
    )  # fmt: skip
    after_failure = replace(stopped, silent_s=5.0, failed_s=5.0)  # torchrun sends SIGTERM when a rank fails
    assert decide_exit(after_failure, TERM, progress) == (
        "a peer failed, and this process made no progress in train step 3, epoch 1", 1
    )  # fmt: skip


@pytest.fixture
def peers(tmp_path: Path) -> dict[int, Path]:
    """Rank 1 failed, 2 is alive, 3 was killed, 4 was stopped, 5 is on another machine, 6 has written no beat."""
    here = Beat(socket.gethostname(), os.getpid(), phase="train", fold=0, epoch=2, step=7)
    killed = replace(here, pid=2**22 + 1)  # above the largest PID of Linux
    beats = {
        1: replace(here, phase="failed", error="KeyError", message="'x'"),
        2: here, 3: killed, 4: replace(killed, phase="stopped"), 5: replace(killed, host="elsewhere"),
    }  # fmt: skip
    for rank, beat in beats.items():
        heartbeat = Heartbeat()
        heartbeat._beat = beat
        heartbeat.write_to(tmp_path / f"{rank}.json")
    return {rank: tmp_path / f"{rank}.json" for rank in range(1, 7)}


def test_failed_and_running_peers_are_reported(peers: dict[int, Path]) -> None:
    here = socket.gethostname()
    assert describe_failed_peers(peers) == [
        f"[RANK 1] on {here} failed: KeyError: 'x'",
        f"[RANK 3] on {here} disappeared without an error (killed?), last seen in train step 7, epoch 2",
    ]
    running = [line.partition(" at ")[0] for line in describe_running_peers(peers)]
    assert running == [f"[RANK 2] on {here} was last heard from", "[RANK 5] on elsewhere was last heard from"]
