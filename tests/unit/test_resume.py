"""A fold's state on disk: what comes back is what was saved, and training goes on with the same bits."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from doccls.data.sampler import find_epoch
from doccls.errors import UserError
from doccls.reporting.log import RunLog
from doccls.reporting.progress import ProgressBar
from doccls.run.metrics_log import EpochMetrics
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import WriteError
from doccls.system.lock import LockError
from doccls.system.signals import Interrupted
from doccls.system.tensor_file import TensorFileError
from doccls.training import resume
from doccls.training.checkpoint import (
    BestEpoch,
    BestWeights,
    ResumeCheckpoint,
    ResumePoint,
    find_resume_point,
    read_best,
    read_resume,
    write_best,
    write_resume,
)
from doccls.training.engine import Engine, FoldProgress, LossMeter
from doccls.training.resume import Checkpointer, describe_resume, restore
from doccls.training.step import train_epoch
from tests.unit.conftest import KeptLog
from tests.unit.test_step import CLASSES, Saves, load, load_from, make_engine, train

IDENTITY = "a" * 64


def make_conv() -> nn.Module:
    """BatchNorm and dropout, with weights in channels_last, as a fold has them."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


RICH = {
    "batch_size": 3,
    "mixup_alpha": 0.4,
    "ema_decay": 0.9,
    "micro_batch_size": 2,
    "grad_clip_norm": 1.0,
    "epochs": 3,
}
OPTIMIZERS = (
    "sgd", "momentum", "adam", "adamw", "nadamw", "radam", "rmsproptf", "lamb", "lion", "adafactor", "adafactorbv",
    "adopt", "novograd", "adabelief", "madgrad", "mars", "adadelta", "laprop", "lars",
)  # fmt: skip


def list_bits(engine: Engine) -> dict[str, bytes]:
    modules = {"model": engine.bare_model} | ({} if engine.ema is None else {"ema": engine.ema.module})
    found = {
        f"{part}.{name}": tensor.contiguous().numpy().tobytes()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    for number, state in enumerate(engine.optimizer.state.values()):
        found |= {f"{number}.{name}": repr(value).encode() for name, value in state.items()}
    return found


def keep(engine: Engine, folder: Path, step: int, losses: list[float]) -> Path:
    """Save the engine as it is; the file."""
    keeper = Checkpointer(engine, RunPaths(folder), IDENTITY, None)
    keeper.save(FoldProgress(step, LossMeter(list(losses))), wait=True)
    keeper.close()
    return RunPaths(folder).resume_checkpoints(0)[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_from_any_step_with_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    keys = {**RICH, "optimizer": optimizer}
    whole = make_engine(make_conv(), **keys)
    batches = load(whole)
    states: list[tuple[int, Path]] = []

    class Keeper(Saves):
        def save(self, progress: FoldProgress, wait: bool = False) -> None:
            losses = progress.meter.losses
            states.append((progress.step, keep(whole, tmp_path / str(progress.step), progress.step, losses)))

    results = train(whole, 3, Keeper(lambda: True), batches)
    assert len(states) >= whole.plan.total_steps
    for step, path in states[:: 1 if optimizer == "adamw" else 4]:
        again = make_engine(make_conv(), **keys)
        progress = restore(again, ResumePoint(path, step, 0.0))
        told = train_from(again, progress)
        assert told == results[-len(told) :], step
        assert list_bits(again) == list_bits(whole), step


def train_from(engine: Engine, progress: FoldProgress) -> list[Any]:
    """The rest of the training."""
    plan = engine.plan
    batches, results = load_from(engine, progress.step), []
    for epoch in range(find_epoch(progress.step, plan), plan.epochs):
        results.append(train_epoch(engine, batches, epoch, progress, Saves(), ProgressBar(None)))  # type: ignore[arg-type]
        progress.meter = LossMeter()
    assert next(batches, None) is None, "no batch twice, none left out"
    return results


def test_the_layout_of_moments_is_that_of_their_weights(tmp_path: Path) -> None:
    engine = make_engine(make_conv(), **RICH, optimizer="adamw")
    train(engine, 1)
    path = keep(engine, tmp_path, 3, [0.1] * 3)
    again = make_engine(make_conv(), **RICH, optimizer="adamw")
    restore(again, ResumePoint(path, 3, 0.0))
    strides = [[state["exp_avg"].stride() for state in one.optimizer.state.values()] for one in (engine, again)]
    assert strides[0] == strides[1] and any(stride[1] == 1 for stride in strides[0] if len(stride) == 4)


# --- the file --------------------------------------------------------------------------------------------------------


def keep_best(tmp_path: Path, fingerprint: str = IDENTITY, fold: int = 3, epoch: int = 2) -> Path:
    path = RunPaths(tmp_path).best_checkpoint(fold=3)
    write_best(path, BestWeights({}, fingerprint, fold, epoch, 0.625, "raw", ("a",), (0.0,), (1.0,), "no", {}))
    return path


@pytest.fixture
def state(tmp_path: Path) -> ResumeCheckpoint:
    """Of fold 3, whose best weights are there."""
    keep_best(tmp_path)
    draw = torch.Generator().manual_seed(0)
    best = BestEpoch(2, 0.625, 0.75, "ema", np.array([1, 4, 7]), np.array([[0.5, -1], [2, 3], [4, 5]], np.float32))
    row = EpochMetrics(0, 1, 0.1, 0.2, 0.3, 1e-3, 4.5, 100.0)
    return ResumeCheckpoint(
        fingerprint=IDENTITY, fold=3, world_size=2, precision="fp16", saved_s=1234.5,
        step=17, losses=(0.25, 1 / 3), skipped_steps=2, best=best, rows=(row,),
        model={
            "raw": {"a.weight": torch.rand(3, 4, generator=draw), "a.count": torch.tensor(5)},
            "ema": {"a.half": torch.rand(2, generator=draw).bfloat16(), "a.on": torch.tensor([True])},
        },
        buffers_RB=torch.rand(2, 6, generator=draw).double(),
        optimizer={
            "state": {0: {"step": torch.tensor(7.0),
                  "exp_avg": torch.rand(3), "none": None, "more": [torch.ones(2), 3]}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0], "type": torch.bfloat16, "d": math.pi}],
        },
        scaler={"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 3},
    )  # fmt: skip


def test_a_state_comes_back_as_it_was(state: ResumeCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "ckpt" / "last"
    write_resume(path, state)
    back = read_resume(path)
    bare: dict[str, Any] = {"model": {}, "buffers_RB": 0, "optimizer": {}, "best": None}
    assert replace(back, **bare) == replace(state, **bare)
    best, was = back.best, state.best
    assert best is not None and was is not None
    assert (best.epoch, best.macro_f1, best.selection_f1, best.weights) == (2, 0.625, 0.75, "ema")
    assert np.array_equal(best.indices_N, was.indices_N) and np.array_equal(best.logits_NC, was.logits_NC)
    for name, weights in state.model.items():
        for key, tensor in weights.items():
            assert torch.equal(back.model[name][key], tensor) and back.model[name][key].dtype == tensor.dtype
    assert torch.equal(back.buffers_RB, state.buffers_RB)
    own, other = back.optimizer["state"][0], state.optimizer["state"][0]
    assert own["none"] is None and own["more"][1] == 3 and torch.equal(own["more"][0], other["more"][0])
    assert all(torch.equal(own[name], other[name]) for name in ("step", "exp_avg"))
    assert back.optimizer["param_groups"][0] == {**state.optimizer["param_groups"][0], "betas": [0.9, 0.999]}


def test_the_same_state_gives_the_same_bytes(state: ResumeCheckpoint, tmp_path: Path) -> None:
    for name in "ab":
        write_resume(tmp_path / name, state)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "flipped in a tensor": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "flipped in the words": lambda data: data.replace(b"1234.5", b"1234.6"),
    "foreign": lambda data: b"PK\x03\x04" + data,
    "a pickle": lambda data: b"\x80\x04\x95" + data,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over_for_the_one_before_it(
    state: ResumeCheckpoint, tmp_path: Path, damage: str
) -> None:
    paths, log = RunPaths(tmp_path).resume_checkpoints(3), KeptLog()
    write_resume(paths[1], replace(state, step=9))
    write_resume(paths[0], state)
    assert (
        find_resume_point(RunPaths(tmp_path), IDENTITY, 3, 2, False, log) == ResumePoint(paths[0], 17, 1234.5)
        and log.lines == []
    )
    paths[0].write_bytes(DAMAGES[damage](paths[0].read_bytes()))
    assert find_resume_point(RunPaths(tmp_path), IDENTITY, 3, 2, False, log) == ResumePoint(paths[1], 9, 1234.5)
    (told,) = log.lines
    assert told.startswith(f"[WARNING] {paths[0]}: ") and told.endswith(": passed over")
    paths[1].write_bytes(b"")
    assert find_resume_point(RunPaths(tmp_path), IDENTITY, 3, 2, False, log) is None and len(log.lines) == 3
    with pytest.raises(TensorFileError):
        read_resume(paths[0])


def test_a_state_of_another_experiment_or_fold_is_passed_over(state: ResumeCheckpoint, tmp_path: Path) -> None:
    paths, log = RunPaths(tmp_path).resume_checkpoints(3), KeptLog()
    write_resume(paths[0], state)
    assert find_resume_point(RunPaths(tmp_path), "b" * 64, 3, 2, False, log) is None
    shutil.copyfile(paths[0], RunPaths(tmp_path).resume_checkpoints(2)[0])
    assert find_resume_point(RunPaths(tmp_path), IDENTITY, 2, 2, False, log) is None
    assert [line.endswith("of another experiment or fold: passed over") for line in log.lines] == [True, True]
    assert find_resume_point(RunPaths(tmp_path), IDENTITY, 0, 2, False, log) is None


@pytest.mark.parametrize(
    ("there", "is_used"),
    [({}, True), ({"epoch": 3}, True), ({"epoch": 1}, False), ({"fold": 2}, False), ({"fingerprint": "b" * 64}, False),
     (b"torn", False), (None, False)],
)  # fmt: skip
def test_a_state_without_the_best_weights_that_it_relies_on_is_passed_over(
    state: ResumeCheckpoint, tmp_path: Path, there: dict[str, Any] | bytes | None, is_used: bool
) -> None:
    """Those of a later epoch are there when the newest state was damaged: that epoch comes again."""
    paths, log = RunPaths(tmp_path).resume_checkpoints(3), KeptLog()
    write_resume(paths[1], replace(state, step=9, best=None))
    write_resume(paths[0], state)
    path = keep_best(tmp_path, **there) if isinstance(there, dict) else keep_best(tmp_path)
    if isinstance(there, bytes):
        path.write_bytes(there)
    elif there is None:
        path.unlink()
    is_later = isinstance(there, dict) and there.get("epoch") == 3
    assert find_resume_point(RunPaths(tmp_path), IDENTITY, 3, 2, False, log) == (
        ResumePoint(paths[0], 17, 1234.5, not is_later) if is_used else ResumePoint(paths[1], 9, 1234.5)
    )
    assert len(log.lines) == (0 if is_used else 1)
    told = f"[WARNING] {paths[0]}: passed over, since its best weights are not there: "
    assert all(line.startswith(told) and str(path) in line for line in log.lines)


def test_another_number_of_processes_is_refused_with_the_ways_out(state: ResumeCheckpoint, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path).resume_checkpoints(3)
    write_resume(paths[0], state)
    told = r"fold 3 was saved at step 17 by 2 processes, and these are 1\. Start 2; or say --allow-world-size-change"
    with pytest.raises(UserError, match=told):
        find_resume_point(RunPaths(tmp_path), IDENTITY, 3, 1, False, RunLog(None))
    assert find_resume_point(RunPaths(tmp_path), IDENTITY, 3, 1, True, RunLog(None)) == ResumePoint(
        paths[0], 17, 1234.5
    )


# --- saving ----------------------------------------------------------------------------------------------------------


def test_two_states_are_kept_and_the_newer_is_never_written_over(tmp_path: Path) -> None:
    engine, paths = make_engine(make_conv()), RunPaths(tmp_path).resume_checkpoints(0)
    keeper = Checkpointer(engine, RunPaths(tmp_path), IDENTITY, None)
    for step in range(1, 6):
        keeper.save(FoldProgress(step), wait=True)
        steps = [read_resume(path).step for path in paths if path.exists()]
        assert sorted(steps) == [step - 1, step] or (step, steps) == (1, [1])
    keeper.close()
    start = find_resume_point(RunPaths(tmp_path), IDENTITY, 0, 1, False, RunLog(None))
    assert start is not None and start.step == 5
    keeper = Checkpointer(engine, RunPaths(tmp_path), IDENTITY, start)
    keeper.save(FoldProgress(6), wait=False)
    keeper.close()
    assert sorted(read_resume(path).step for path in paths) == [5, 6]


def test_a_state_is_due_once_an_interval_and_on_the_main_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    engine = make_engine()
    keeper = Checkpointer(engine, RunPaths(Path("nowhere")), IDENTITY, None)
    assert not keeper.is_due()
    now_s[0] += 300
    assert keeper.is_due()
    monkeypatch.setattr(type(engine.accelerator), "is_main_process", False)
    assert not keeper.is_due()


@pytest.mark.parametrize("stops", [True, False])
def test_after_a_stop_no_rank_leaves_before_a_state_that_is_being_written_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """As when the signal comes in the validation, right after an epoch's state. Other errors wait for no rank."""
    engine, paths, waited = make_engine(), RunPaths(tmp_path).resume_checkpoints(0), []

    def write_late(path: Path, state: ResumeCheckpoint) -> None:
        time.sleep(0.1)
        write_resume(path, state)

    monkeypatch.setattr(resume, "write_resume", write_late)
    monkeypatch.setattr(resume, "await_all", lambda accelerator: waited.append(read_resume(paths[0]).step))
    error = Interrupted(signal.SIGTERM) if stops else RuntimeError("broken")
    with pytest.raises(type(error)), Checkpointer(engine, RunPaths(tmp_path), IDENTITY, None) as keeper:
        keeper.save(FoldProgress(7), wait=False)
        raise error
    assert waited == ([7] if stops else [])
    assert read_resume(paths[0]).step == 7


def test_a_disk_that_takes_no_more_is_told_and_the_state_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, paths, log = make_engine(), RunPaths(tmp_path).resume_checkpoints(0), KeptLog()
    keeper = Checkpointer(replace(engine, log=log), RunPaths(tmp_path), IDENTITY, None)
    keeper.save(FoldProgress(1), wait=True)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("doccls.system.atomic_files.os.fsync", refuse)
        keeper.save(FoldProgress(2), wait=True)
    keeper.close()
    (told,) = log.lines
    assert told == (
        f"[WARNING] a resume checkpoint was not saved: can't write {paths[1]}: No space left on device (errno 28); "
        "the one before it is kept"
    )
    start = find_resume_point(RunPaths(tmp_path), IDENTITY, 0, 1, False, log)
    assert start is not None and start.step == 1 and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("failures", [1, 2])
def test_after_a_failed_write_the_older_state_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    engine, paths = make_engine(), RunPaths(tmp_path).resume_checkpoints(0)
    keeper = Checkpointer(engine, RunPaths(tmp_path), IDENTITY, None)
    for step in (1, 2):
        keeper.save(FoldProgress(step), wait=True)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("doccls.system.atomic_files.os.fsync", refuse)
        for step in range(3, 3 + failures):
            keeper.save(FoldProgress(step), wait=True)
    keeper.save(FoldProgress(9), wait=True)
    keeper.close()
    assert [read_resume(path).step for path in paths] == [9, 2]


def make_best(epoch: int) -> BestWeights:
    return BestWeights({"a": torch.full((3,), epoch)}, IDENTITY, 0, epoch, 0.5, "raw", ("a",), (0.0,), (1.0,), "no", {})


def test_best_weights_that_wait_for_the_disk_give_way_to_better_ones_and_come_before_what_relies_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, written, may_write = RunPaths(tmp_path), list[str](), threading.Event()

    def write_when_allowed(path: Path, best: BestWeights) -> None:
        assert may_write.wait(10)
        written.append(f"best {best.epoch}")
        write_best(path, best)

    def note(path: Path, checkpoint: ResumeCheckpoint) -> None:
        written.append(f"step {checkpoint.step}")
        write_resume(path, checkpoint)

    monkeypatch.setattr(resume, "write_best", write_when_allowed)
    monkeypatch.setattr(resume, "write_resume", note)
    with Checkpointer(make_engine(), paths, IDENTITY, None) as keeper:
        keeper.save_best(make_best(1))
        while keeper._waiting_best is not None:  # the writer has taken it
            time.sleep(0.001)
        for epoch in (2, 3):
            keeper.save_best(make_best(epoch))
        keeper.save(FoldProgress(9))
        assert written == []
        may_write.set()
        keeper.check_best(wait=True)
    assert written == ["best 1", "best 3", "step 9"]
    assert read_best(paths.best_checkpoint(0)).epoch == 3


def test_best_weights_that_cannot_be_saved_end_the_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Checkpointer(make_engine(), RunPaths(tmp_path), IDENTITY, None) as keeper:
        with monkeypatch.context() as patch:
            patch.setattr("doccls.system.atomic_files.os.fsync", refuse)
            keeper.save_best(make_best(1))
            with pytest.raises(WriteError, match=r"best_fold0\.pth: No space left on device"):
                keeper.check_best(wait=True)
        keeper.save_best(make_best(2))
        keeper.check_best(wait=True)


def test_a_checkpoint_never_relies_on_best_weights_that_could_not_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for a moment: the checkpoints before it stay, and the fold resumes from them."""

    def reach(step: int, epoch: int) -> FoldProgress:
        return FoldProgress(step, best=BestEpoch(epoch, 0.5, 0.5, "raw", np.arange(1), np.zeros((1, 2), np.float32)))

    def refuse(path: Path, best: BestWeights) -> None:
        raise OSError(28, "No space left on device")

    log = KeptLog()
    with Checkpointer(replace(make_engine(), log=log), RunPaths(tmp_path), IDENTITY, None) as keeper:
        keeper.save_best(make_best(1))
        keeper.save(reach(5, 1), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(resume, "write_best", refuse)
            keeper.save_best(make_best(2))
            for step in (6, 7):
                keeper.save(reach(step, 2), wait=True)
        assert (
            len([line for line in log.lines if "a resume checkpoint was not saved: the best weights that" in line]) == 2
        )
        found = find_resume_point(RunPaths(tmp_path), IDENTITY, 0, 1, False, RunLog(None))
        assert found is not None and (found.step, found.keeps_best) == (5, True)
        with pytest.raises(OSError, match="No space left"):
            keeper.check_best()
        keeper.save_best(make_best(2))
        keeper.save(reach(8, 2), wait=True)
        found = find_resume_point(RunPaths(tmp_path), IDENTITY, 0, 1, False, RunLog(None))
        assert found is not None and (found.step, found.keeps_best) == (8, True)


@pytest.mark.parametrize("keeps_best", [True, False])
def test_where_better_weights_have_replaced_the_best_ones_epochs_are_compared_anew(
    tmp_path: Path, keeps_best: bool
) -> None:
    """Else logits and weights could be of two epochs, where the epochs that come again do not give the same bits."""
    engine, best = make_engine(), BestEpoch(1, 0.5, 0.5, "raw", np.arange(1), np.zeros((1, 2), np.float32))
    with Checkpointer(engine, RunPaths(tmp_path), IDENTITY, None) as keeper:
        keeper.save(FoldProgress(3, best=best), wait=True)
    path = RunPaths(tmp_path).resume_checkpoints(0)[0]
    progress = restore(engine, ResumePoint(path, 3, 0.0, keeps_best))
    assert (progress.best is not None) == keeps_best


def test_a_process_that_has_lost_its_fold_writes_nothing_that_it_had_queued(tmp_path: Path) -> None:
    def refuse() -> None:
        raise LockError("another process owns the fold")

    with Checkpointer(make_engine(), RunPaths(tmp_path), IDENTITY, None, refuse) as keeper:
        keeper.save_best(make_best(1))
        with pytest.raises(LockError):
            keeper.check_best(wait=True)
    assert not RunPaths(tmp_path).best_checkpoint(0).exists()


def test_best_weights_that_could_not_be_saved_before_a_stop_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    log = KeptLog()
    monkeypatch.setattr("doccls.system.atomic_files.os.fsync", refuse)
    with Checkpointer(replace(make_engine(), log=log), RunPaths(tmp_path), IDENTITY, None) as keeper:
        keeper.save_best(make_best(1))
    (told,) = log.lines
    assert told.startswith("[WARNING] the best weights were not saved: can't write ") and "best_fold0.pth" in told


def test_a_saved_state_is_not_what_the_next_step_makes_of_it(tmp_path: Path) -> None:
    """It is written beside the training, which goes on meanwhile."""
    engine = make_engine(make_conv(), optimizer="adamw")
    before = {name: one.clone() for name, one in engine.bare_model.state_dict().items()}
    keeper = Checkpointer(engine, RunPaths(tmp_path), IDENTITY, None)
    started: list[Callable[[], None]] = []
    keeper._writer.submit = lambda act, *words: started.append(lambda: act(*words))  # type: ignore[assignment, return-value]
    keeper.save(FoldProgress(1), wait=False)
    train(engine, 1)
    started[0]()
    saved = read_resume(RunPaths(tmp_path).resume_checkpoints(0)[0]).model["raw"]
    assert all(torch.equal(saved[name], one) for name, one in before.items())


def test_going_on_is_told_with_what_is_done_again() -> None:
    start = ResumePoint(Path("x"), 412, time.mktime((2026, 1, 2, 14, 3, 22, 0, 0, -1)))
    told = "[RESUME] fold=2 from step 412 (epoch 5), saved 14:03:22"
    assert describe_resume(start, 2, 90, start.saved_s + 37.2) == f"{told}, 37 s of work done again"
    assert describe_resume(start, 2, 90, start.saved_s - 5) == f"{told}, 0 s of work done again"
    assert describe_resume(start, 2, 90, None) == told
    assert "from step 90 (epoch 1)" in describe_resume(replace(start, step=90), 2, 90, None)
