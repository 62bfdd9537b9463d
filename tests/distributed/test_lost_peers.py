"""A rank that fails, is killed or hangs: the main process's log names it, and the run soon ends with its marker."""

import os
import signal
import socket

import pytest
from test_signals_to_runs import (
    END_S,
    LONG,
    START_S,
    assert_ended_cleanly,
    await_event,
    has_logged_epoch_2,
    join,
    running,
)
from tiny_runs import Run, Trainer

HERE = socket.gethostname()


def test_killed_peer_is_named(trainer: Trainer) -> None:
    with running(trainer, "doccls.train:main", LONG, 2) as (folder, ranks):
        await_event(lambda: has_logged_epoch_2(folder), START_S, "an epoch", folder)
        ranks[1].kill()
        assert join(ranks, folder) == [1, -signal.SIGKILL]
    lines = Run([], folder).lines
    message = f"[RANK 1] on {HERE} disappeared without an error (killed?), last seen in "
    assert any(line.startswith(message) for line in lines)
    assert lines[-2:] == ["[EXIT] TRAINING ERROR code=1", ">> Stopping logger and restoring stdio"]
    assert "[EXIT][ERROR] training failed: " in (folder / "console" / "rank0.err").read_text()


def test_stopped_peer_ends_the_run_within_the_limit(trainer: Trainer) -> None:
    with running(trainer, "doccls.train:main", (*LONG, "train.collective_timeout_s=3"), 2) as (folder, ranks):
        await_event(lambda: has_logged_epoch_2(folder), START_S, "an epoch", folder)
        assert ranks[1].pid is not None
        os.kill(ranks[1].pid, signal.SIGSTOP)
        await_event(lambda: not ranks[0].is_alive(), END_S, "the main process's end", folder)
        assert ranks[0].exitcode == 1
    assert_ended_cleanly(folder, 1, killed="rank1")
    lines = Run([], folder).lines
    assert any(line.startswith(f"[RANK 1] on {HERE} was last heard from at ") for line in lines)
    assert any(line.startswith("no step for 3 s (train.collective_timeout_s) in ") for line in lines)
    console = (folder / "console" / "rank0.err").read_text()
    assert "[EXIT][ERROR] training failed: [RANK 1] on " in console and "most recent call first" in console, "no stack"


def test_peer_error_is_reported_while_main_thread_blocks(trainer: Trainer) -> None:
    with running(trainer, "signal_programs:fail_while_main_blocks", LONG, 2) as (folder, ranks):
        assert join(ranks, folder) == [1, 1]
    assert_ended_cleanly(folder, 1)
    lines = Run([], folder).lines
    assert f"[RANK 1] on {HERE} failed: RuntimeError: rank 1 met this alone" in lines
    assert any(line.startswith("a peer failed, and this process made no progress in ") for line in lines)


@pytest.mark.parametrize("world_size", [1, 2])
def test_stop_while_main_thread_blocks_ends_within_stop_timeout(trainer: Trainer, world_size: int) -> None:
    with running(trainer, "signal_programs:hold_step", (*LONG, "train.stop_timeout_s=2"), world_size) as (
        folder,
        ranks,
    ):
        await_event(lambda: (folder / "held").exists(), START_S, "the held step", folder)
        for rank in ranks:
            rank.terminate()
        assert join(ranks, folder) == [143] * world_size
    assert_ended_cleanly(folder, 143)
    lines = Run([], folder).lines
    assert any(
        line.startswith("SIGTERM received, and this process had not stopped after 2 s (train.sto") for line in lines
    )
