"""When a process that stands still is ended, and what is said of its peers."""

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from doccls.run.heartbeat import Beat, Heartbeat
from doccls.run.watchdog import Standstill, describe_lost, describe_silent, judge

MOVING = Standstill(silent_s=0.5, failed_s=None, stop_s=None, limit_s=600.0, stop_limit_s=110.0)
TERM = signal.SIGTERM


@pytest.mark.parametrize(
    ("seen", "stop"),
    [
        (MOVING, None),
        (replace(MOVING, silent_s=599.9), None),
        (replace(MOVING, silent_s=1e9, limit_s=None), None),
        (replace(MOVING, silent_s=500.0, stop_s=109.0), TERM),
        (replace(MOVING, silent_s=500.0, failed_s=4.0), None),
    ],
)
def test_who_goes_on_or_may_yet_is_left_alone(seen: Standstill, stop: int | None) -> None:
    assert judge(seen, stop, "train step 3, epoch 1") is None


def test_a_standstill_is_ended_with_its_reason() -> None:
    place = "train step 3, epoch 1"
    assert judge(replace(MOVING, silent_s=600.0), None, place) == (
        "no step for 600 s (train.collective_timeout_s) in train step 3, epoch 1", 1
    )  # fmt: skip
    stopped = replace(MOVING, stop_s=110.0, limit_s=None)
    assert judge(stopped, TERM, place) == (
        "SIGTERM received, and this process had not left after 110 s (train.stop_timeout_s): "
        "it was in train step 3, epoch 1", 143
    )  # fmt: skip
    lost = judge(replace(stopped, silent_s=5.0, failed_s=5.0), TERM, place)  # torchrun sends SIGTERM when a rank fails
    assert lost == ("a peer failed, and this process stood still in train step 3, epoch 1", 1)


@pytest.fixture
def peers(tmp_path: Path) -> dict[int, Path]:
    """Rank 1 failed, 2 lives, 3 is gone, 4 was stopped, 5 is on another machine, 6 has said nothing."""
    here = Beat(socket.gethostname(), os.getpid(), phase="train", fold=0, epoch=2, step=7)
    gone = replace(here, pid=2**22 + 1)  # above the most that Linux gives
    beats = {
        1: replace(here, phase="failed", error="KeyError", message="'x'"),
        2: here, 3: gone, 4: replace(gone, phase="stopped"), 5: replace(gone, host="elsewhere"),
    }  # fmt: skip
    for rank, beat in beats.items():
        heartbeat = Heartbeat()
        heartbeat._beat = beat
        heartbeat.write_to(tmp_path / f"{rank}.json")
    return {rank: tmp_path / f"{rank}.json" for rank in range(1, 7)}


def test_what_became_of_each_peer_is_told(peers: dict[int, Path]) -> None:
    here = socket.gethostname()
    assert describe_lost(peers) == [
        f"[RANK 1] on {here} failed: KeyError: 'x'",
        f"[RANK 3] on {here} is gone without a word (killed?), last seen in train step 7, epoch 2",
    ]
    alive = [line.partition(" at ")[0] for line in describe_silent(peers)]
    assert alive == [f"[RANK 2] on {here} was last heard of", "[RANK 5] on elsewhere was last heard of"]
