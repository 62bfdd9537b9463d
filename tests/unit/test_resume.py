"""Resume checkpoints: what is restored is what was saved, and resumed training gives the same bits."""

from __future__ import annotations

import math
import re
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
from tests.unit.test_step import CLASSES, FakeCheckpointer, load, load_from, make_engine, train

FINGERPRINT = "a" * 64


def make_conv() -> nn.Module:
    """Build a model with BatchNorm and dropout, and with weights in channels_last as in training."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


KEYS = {
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
    bits = {
        f"{weights}.{name}": tensor.contiguous().numpy().tobytes()
        for weights, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    for number, state in enumerate(engine.optimizer.state.values()):
        bits |= {f"{number}.{name}": repr(value).encode() for name, value in state.items()}
    return bits


def save(engine: Engine, folder: Path, step: int, losses: list[float]) -> Path:
    """Save a checkpoint of the engine and return its path."""
    checkpointer = Checkpointer(engine, RunPaths(folder), FINGERPRINT, None)
    checkpointer.save(FoldProgress(step, LossMeter(list(losses))), wait=True)
    checkpointer.close()
    return RunPaths(folder).resume_checkpoints(0)[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_resumed_at_any_step_gives_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    keys = {**KEYS, "optimizer": optimizer}
    uninterrupted = make_engine(make_conv(), **keys)
    batches = load(uninterrupted)
    checkpoints: list[tuple[int, Path]] = []

    class SavingCheckpointer(FakeCheckpointer):
        def save(self, progress: FoldProgress, wait: bool = False) -> None:
            path = save(uninterrupted, tmp_path / str(progress.step), progress.step, progress.meter.losses)
            checkpoints.append((progress.step, path))

    results = train(uninterrupted, 3, SavingCheckpointer(lambda: True), batches)
    assert len(checkpoints) >= uninterrupted.plan.total_steps
    for step, path in checkpoints[:: 1 if optimizer == "adamw" else 4]:
        resumed = make_engine(make_conv(), **keys)
        progress = restore(resumed, ResumePoint(path, step, 0.0))
        resumed_results = train_from(resumed, progress)
        assert resumed_results == results[-len(resumed_results) :], step
        assert list_bits(resumed) == list_bits(uninterrupted), step


def train_from(engine: Engine, progress: FoldProgress) -> list[Any]:
    """Train the remaining epochs."""
    plan = engine.plan
    batches, results = load_from(engine, progress.step), []
    for epoch in range(find_epoch(progress.step, plan), plan.epochs):
        results.append(train_epoch(engine, batches, epoch, progress, FakeCheckpointer(), ProgressBar(None)))  # type: ignore[arg-type]
        progress.meter = LossMeter()
    assert next(batches, None) is None, "no batch is repeated or left out"
    return results


def test_moments_are_restored_in_the_layout_of_their_weights(tmp_path: Path) -> None:
    engine = make_engine(make_conv(), **KEYS, optimizer="adamw")
    train(engine, 1)
    path = save(engine, tmp_path, 3, [0.1] * 3)
    resumed = make_engine(make_conv(), **KEYS, optimizer="adamw")
    restore(resumed, ResumePoint(path, 3, 0.0))
    strides = [[state["exp_avg"].stride() for state in e.optimizer.state.values()] for e in (engine, resumed)]
    assert strides[0] == strides[1] and any(stride[1] == 1 for stride in strides[0] if len(stride) == 4)


# --- the file --------------------------------------------------------------------------------------------------------


def write_best_weights(tmp_path: Path, fingerprint: str = FINGERPRINT, fold: int = 3, epoch: int = 2) -> Path:
    path = RunPaths(tmp_path).best_checkpoint(fold=3)
    write_best(path, BestWeights({}, fingerprint, fold, epoch, 0.625, "raw", ("a",), (0.0,), (1.0,), "no", {}))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> ResumeCheckpoint:
    """Return a checkpoint of fold 3, whose best weights exist."""
    write_best_weights(tmp_path)
    generator = torch.Generator().manual_seed(0)
    logits = np.array([[0.5, -1], [2, 3], [4, 5]], np.float32)
    best = BestEpoch(2, 0.625, 0.75, "ema", np.array([1, 4, 7]), logits, 0.375, -logits)
    row = EpochMetrics(0, 1, 0.1, 0.2, 0.3, 1e-3, 4.5, 100.0)
    return ResumeCheckpoint(
        fingerprint=FINGERPRINT, fold=3, world_size=2, precision="fp16", saved_s=1234.5,
        step=17, losses=(0.25, 1 / 3), skipped_steps=2, best=best, rows=(row,),
        model={
            "raw": {"a.weight": torch.rand(3, 4, generator=generator), "a.count": torch.tensor(5)},
            "ema": {"a.half": torch.rand(2, generator=generator).bfloat16(), "a.on": torch.tensor([True])},
        },
        buffers_RB=torch.rand(2, 6, generator=generator).double(),
        optimizer={
            "state": {0: {"step": torch.tensor(7.0),
                  "exp_avg": torch.rand(3), "none": None, "more": [torch.ones(2), 3]}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0], "type": torch.bfloat16, "d": math.pi}],
        },
        scaler={"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 3},
    )  # fmt: skip


def test_checkpoint_survives_a_round_trip(checkpoint: ResumeCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "ckpt" / "last"
    write_resume(path, checkpoint)
    restored = read_resume(path)
    without_tensors: dict[str, Any] = {"model": {}, "buffers_RB": 0, "optimizer": {}, "best": None}
    assert replace(restored, **without_tensors) == replace(checkpoint, **without_tensors)
    best, saved_best = restored.best, checkpoint.best
    assert best is not None and saved_best is not None
    assert (best.epoch, best.macro_f1, best.selection_f1, best.weights) == (2, 0.625, 0.75, "ema")
    assert np.array_equal(best.indices_N, saved_best.indices_N)
    assert np.array_equal(best.logits_NC, saved_best.logits_NC)
    assert best.macro_f1_damaged == 0.375 and best.damaged_logits_NC is not None
    assert np.array_equal(best.damaged_logits_NC, -best.logits_NC)
    for name, weights in checkpoint.model.items():
        for key, tensor in weights.items():
            assert torch.equal(restored.model[name][key], tensor) and restored.model[name][key].dtype == tensor.dtype
    assert torch.equal(restored.buffers_RB, checkpoint.buffers_RB)
    own, saved = restored.optimizer["state"][0], checkpoint.optimizer["state"][0]
    assert own["none"] is None and own["more"][1] == 3 and torch.equal(own["more"][0], saved["more"][0])
    assert all(torch.equal(own[name], saved[name]) for name in ("step", "exp_avg"))
    assert restored.optimizer["param_groups"][0] == {**checkpoint.optimizer["param_groups"][0], "betas": [0.9, 0.999]}


def test_checkpoint_without_damaged_pages_survives_a_round_trip(checkpoint: ResumeCheckpoint, tmp_path: Path) -> None:
    assert checkpoint.best is not None
    best = replace(checkpoint.best, macro_f1_damaged=None, damaged_logits_NC=None)
    write_resume(tmp_path / "last", replace(checkpoint, best=best))
    restored = read_resume(tmp_path / "last").best
    assert restored is not None and restored.macro_f1_damaged is restored.damaged_logits_NC is None


def test_same_checkpoint_gives_the_same_bytes(checkpoint: ResumeCheckpoint, tmp_path: Path) -> None:
    for name in "ab":
        write_resume(tmp_path / name, checkpoint)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "flipped in a tensor": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "flipped in the description": lambda data: data.replace(b"1234.5", b"1234.6"),
    "foreign": lambda data: b"PK\x03\x04" + data,
    "a pickle": lambda data: b"\x80\x04\x95" + data,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_for_the_previous_one(
    checkpoint: ResumeCheckpoint, tmp_path: Path, damage: str
) -> None:
    paths, log = RunPaths(tmp_path).resume_checkpoints(3), KeptLog()
    write_resume(paths[1], replace(checkpoint, step=9))
    write_resume(paths[0], checkpoint)
    assert (
        find_resume_point(RunPaths(tmp_path), FINGERPRINT, 3, 2, False, log) == ResumePoint(paths[0], 17, 1234.5)
        and log.lines == []
    )
    paths[0].write_bytes(DAMAGES[damage](paths[0].read_bytes()))
    assert find_resume_point(RunPaths(tmp_path), FINGERPRINT, 3, 2, False, log) == ResumePoint(paths[1], 9, 1234.5)
    (warning,) = log.lines
    assert warning.startswith(f"[WARNING] {paths[0]}: ") and warning.endswith("; checkpoint skipped")
    paths[1].write_bytes(b"")
    assert find_resume_point(RunPaths(tmp_path), FINGERPRINT, 3, 2, False, log) is None and len(log.lines) == 3
    with pytest.raises(TensorFileError):
        read_resume(paths[0])


def test_checkpoint_of_another_version_is_rejected_and_kept(
    checkpoint: ResumeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RunPaths(tmp_path).resume_checkpoints(3)[0]
    monkeypatch.setattr("doccls.training.checkpoint._RESUME_FORMAT", "doccls-resume-2")
    write_resume(path, checkpoint)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"doccls-resume-2; .*Continue the run with that version"):
        find_resume_point(RunPaths(tmp_path), FINGERPRINT, 3, 2, False, KeptLog())


def test_checkpoint_of_another_experiment_or_fold_is_skipped(checkpoint: ResumeCheckpoint, tmp_path: Path) -> None:
    paths, log = RunPaths(tmp_path).resume_checkpoints(3), KeptLog()
    write_resume(paths[0], checkpoint)
    assert find_resume_point(RunPaths(tmp_path), "b" * 64, 3, 2, False, log) is None
    shutil.copyfile(paths[0], RunPaths(tmp_path).resume_checkpoints(2)[0])
    assert find_resume_point(RunPaths(tmp_path), FINGERPRINT, 2, 2, False, log) is None
    assert [line.endswith(" belongs to another experiment or fold; checkpoint skipped") for line in log.lines] == [
        True,
        True,
    ]
    assert find_resume_point(RunPaths(tmp_path), FINGERPRINT, 0, 2, False, log) is None


@pytest.mark.parametrize(
    ("best", "is_used"),
    [({}, True), ({"epoch": 3}, True), ({"epoch": 1}, False), ({"fold": 2}, False), ({"fingerprint": "b" * 64}, False),
     (b"torn", False), (None, False)],
)  # fmt: skip
def test_checkpoint_without_its_best_weights_is_skipped(
    checkpoint: ResumeCheckpoint, tmp_path: Path, best: dict[str, Any] | bytes | None, is_used: bool
) -> None:
    """Weights of a later epoch exist if the newest checkpoint was damaged: that epoch is then trained again."""
    paths, log = RunPaths(tmp_path).resume_checkpoints(3), KeptLog()
    write_resume(paths[1], replace(checkpoint, step=9, best=None))
    write_resume(paths[0], checkpoint)
    path = write_best_weights(tmp_path, **best) if isinstance(best, dict) else write_best_weights(tmp_path)
    if isinstance(best, bytes):
        path.write_bytes(best)
    elif best is None:
        path.unlink()
    is_later = isinstance(best, dict) and best.get("epoch") == 3
    assert find_resume_point(RunPaths(tmp_path), FINGERPRINT, 3, 2, False, log) == (
        ResumePoint(paths[0], 17, 1234.5, not is_later) if is_used else ResumePoint(paths[1], 9, 1234.5)
    )
    assert len(log.lines) == (0 if is_used else 1)
    warning = f"[WARNING] {paths[0]} skipped, because its best weights can't be used: "
    assert all(line.startswith(warning) and str(path) in line for line in log.lines)


def test_other_number_of_processes_is_rejected_with_alternatives(checkpoint: ResumeCheckpoint, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path).resume_checkpoints(3)
    write_resume(paths[0], checkpoint)
    message = r"fold 3 was saved at step 17 by 2 processes, but 1 are running now\. Start 2 .*--allow-world-size-change"
    with pytest.raises(UserError, match=message):
        find_resume_point(RunPaths(tmp_path), FINGERPRINT, 3, 1, False, RunLog(None))
    assert find_resume_point(RunPaths(tmp_path), FINGERPRINT, 3, 1, True, RunLog(None)) == ResumePoint(
        paths[0], 17, 1234.5
    )


# --- saving ----------------------------------------------------------------------------------------------------------


def test_two_checkpoints_are_kept_and_the_newer_is_never_overwritten(tmp_path: Path) -> None:
    engine, paths = make_engine(make_conv()), RunPaths(tmp_path).resume_checkpoints(0)
    checkpointer = Checkpointer(engine, RunPaths(tmp_path), FINGERPRINT, None)
    for step in range(1, 6):
        checkpointer.save(FoldProgress(step), wait=True)
        steps = [read_resume(path).step for path in paths if path.exists()]
        assert sorted(steps) == [step - 1, step] or (step, steps) == (1, [1])
    checkpointer.close()
    point = find_resume_point(RunPaths(tmp_path), FINGERPRINT, 0, 1, False, RunLog(None))
    assert point is not None and point.step == 5
    checkpointer = Checkpointer(engine, RunPaths(tmp_path), FINGERPRINT, point)
    checkpointer.save(FoldProgress(6), wait=False)
    checkpointer.close()
    assert sorted(read_resume(path).step for path in paths) == [5, 6]


def test_checkpoint_is_due_once_per_interval_and_only_on_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    engine = make_engine()
    checkpointer = Checkpointer(engine, RunPaths(Path("nowhere")), FINGERPRINT, None)
    assert not checkpointer.is_due()
    now_s[0] += 300
    assert checkpointer.is_due()
    monkeypatch.setattr(type(engine.accelerator), "is_main_process", False)
    assert not checkpointer.is_due()


@pytest.mark.parametrize("stops", [True, False])
def test_after_a_stop_ranks_wait_until_the_checkpoint_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """The signal comes during validation, while a checkpoint is being written. Other errors wait for no rank."""
    engine, paths, waited = make_engine(), RunPaths(tmp_path).resume_checkpoints(0), []

    def write_late(path: Path, checkpoint: ResumeCheckpoint) -> None:
        time.sleep(0.1)
        write_resume(path, checkpoint)

    monkeypatch.setattr(resume, "write_resume", write_late)
    monkeypatch.setattr(resume, "await_all", lambda accelerator: waited.append(read_resume(paths[0]).step))
    error = Interrupted(signal.SIGTERM) if stops else RuntimeError("broken")
    with pytest.raises(type(error)), Checkpointer(engine, RunPaths(tmp_path), FINGERPRINT, None) as checkpointer:
        checkpointer.save(FoldProgress(7), wait=False)
        raise error
    assert waited == ([7] if stops else [])
    assert read_resume(paths[0]).step == 7


def test_full_disk_is_reported_and_the_previous_checkpoint_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, paths, log = make_engine(), RunPaths(tmp_path).resume_checkpoints(0), KeptLog()
    checkpointer = Checkpointer(replace(engine, log=log), RunPaths(tmp_path), FINGERPRINT, None)
    checkpointer.save(FoldProgress(1), wait=True)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("doccls.system.atomic_files.os.fsync", refuse)
        checkpointer.save(FoldProgress(2), wait=True)
    checkpointer.close()
    (warning,) = log.lines
    assert re.fullmatch(
        rf"\[WARNING\] a resume checkpoint was not saved: can't write {paths[1]}: No space left on device "
        r"\(errno 28\): [\d,]+ bytes needed, [\d.,]+ \w+ free; the previous one is kept",
        warning,
    )
    point = find_resume_point(RunPaths(tmp_path), FINGERPRINT, 0, 1, False, log)
    assert point is not None and point.step == 1 and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("failures", [1, 2])
def test_after_failed_writes_the_older_checkpoint_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    engine, paths = make_engine(), RunPaths(tmp_path).resume_checkpoints(0)
    checkpointer = Checkpointer(engine, RunPaths(tmp_path), FINGERPRINT, None)
    for step in (1, 2):
        checkpointer.save(FoldProgress(step), wait=True)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("doccls.system.atomic_files.os.fsync", refuse)
        for step in range(3, 3 + failures):
            checkpointer.save(FoldProgress(step), wait=True)
    checkpointer.save(FoldProgress(9), wait=True)
    checkpointer.close()
    assert [read_resume(path).step for path in paths] == [9, 2]


def make_best(epoch: int) -> BestWeights:
    return BestWeights(
        {"a": torch.full((3,), epoch)}, FINGERPRINT, 0, epoch, 0.5, "raw", ("a",), (0.0,), (1.0,), "no", {}
    )


def test_queued_best_weights_are_replaced_by_better_ones_and_written_before_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, written, may_write = RunPaths(tmp_path), list[str](), threading.Event()

    def write_when_allowed(path: Path, best: BestWeights) -> None:
        assert may_write.wait(10)
        written.append(f"best {best.epoch}")
        write_best(path, best)

    def record_write(path: Path, checkpoint: ResumeCheckpoint) -> None:
        written.append(f"step {checkpoint.step}")
        write_resume(path, checkpoint)

    monkeypatch.setattr(resume, "write_best", write_when_allowed)
    monkeypatch.setattr(resume, "write_resume", record_write)
    with Checkpointer(make_engine(), paths, FINGERPRINT, None) as checkpointer:
        checkpointer.save_best(make_best(1))
        while checkpointer._queued_best is not None:  # until the writer has taken it
            time.sleep(0.001)
        for epoch in (2, 3):
            checkpointer.save_best(make_best(epoch))
        checkpointer.save(FoldProgress(9))
        assert written == []
        may_write.set()
        checkpointer.check_best(wait=True)
    assert written == ["best 1", "best 3", "step 9"]
    assert read_best(paths.best_checkpoint(0)).epoch == 3


def test_failure_to_save_best_weights_ends_the_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Checkpointer(make_engine(), RunPaths(tmp_path), FINGERPRINT, None) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr("doccls.system.atomic_files.os.fsync", refuse)
            checkpointer.save_best(make_best(1))
            with pytest.raises(WriteError, match=r"best_fold0\.pth: No space left on device"):
                checkpointer.check_best(wait=True)
        checkpointer.save_best(make_best(2))
        checkpointer.check_best(wait=True)


def test_checkpoint_is_not_saved_if_its_best_weights_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk is full, earlier checkpoints are kept, and the fold can resume from them."""

    def reach(step: int, epoch: int) -> FoldProgress:
        return FoldProgress(step, best=BestEpoch(epoch, 0.5, 0.5, "raw", np.arange(1), np.zeros((1, 2), np.float32)))

    def refuse(path: Path, best: BestWeights) -> None:
        raise OSError(28, "No space left on device")

    log = KeptLog()
    with Checkpointer(replace(make_engine(), log=log), RunPaths(tmp_path), FINGERPRINT, None) as checkpointer:
        checkpointer.save_best(make_best(1))
        checkpointer.save(reach(5, 1), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(resume, "write_best", refuse)
            checkpointer.save_best(make_best(2))
            for step in (6, 7):
                checkpointer.save(reach(step, 2), wait=True)
        warning = "a resume checkpoint was not saved: the best weights that"
        assert len([line for line in log.lines if warning in line]) == 2
        point = find_resume_point(RunPaths(tmp_path), FINGERPRINT, 0, 1, False, RunLog(None))
        assert point is not None and (point.step, point.keeps_best) == (5, True)
        with pytest.raises(OSError, match="No space left"):
            checkpointer.check_best()
        checkpointer.save_best(make_best(2))
        checkpointer.save(reach(8, 2), wait=True)
        point = find_resume_point(RunPaths(tmp_path), FINGERPRINT, 0, 1, False, RunLog(None))
        assert point is not None and (point.step, point.keeps_best) == (8, True)


@pytest.mark.parametrize("keeps_best", [True, False])
def test_epochs_are_compared_afresh_if_better_weights_have_replaced_the_best_ones(
    tmp_path: Path, keeps_best: bool
) -> None:
    """Otherwise logits and weights could belong to two epochs, if retrained epochs do not give the same bits."""
    engine, best = make_engine(), BestEpoch(1, 0.5, 0.5, "raw", np.arange(1), np.zeros((1, 2), np.float32))
    with Checkpointer(engine, RunPaths(tmp_path), FINGERPRINT, None) as checkpointer:
        checkpointer.save(FoldProgress(3, best=best), wait=True)
    path = RunPaths(tmp_path).resume_checkpoints(0)[0]
    progress = restore(engine, ResumePoint(path, 3, 0.0, keeps_best))
    assert (progress.best is not None) == keeps_best


def test_process_that_has_lost_its_fold_writes_nothing_queued(tmp_path: Path) -> None:
    def refuse() -> None:
        raise LockError("another process owns the fold")

    with Checkpointer(make_engine(), RunPaths(tmp_path), FINGERPRINT, None, refuse) as checkpointer:
        checkpointer.save_best(make_best(1))
        with pytest.raises(LockError):
            checkpointer.check_best(wait=True)
    assert not RunPaths(tmp_path).best_checkpoint(0).exists()


def test_best_weights_that_could_not_be_saved_before_a_stop_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    log = KeptLog()
    monkeypatch.setattr("doccls.system.atomic_files.os.fsync", refuse)
    with Checkpointer(replace(make_engine(), log=log), RunPaths(tmp_path), FINGERPRINT, None) as checkpointer:
        checkpointer.save_best(make_best(1))
    (warning,) = log.lines
    assert warning.startswith("[WARNING] the best weights were not saved: can't write ") and "best_fold0.pth" in warning


def test_later_steps_do_not_change_a_checkpoint_being_saved(tmp_path: Path) -> None:
    """The checkpoint is written in the background while training continues."""
    engine = make_engine(make_conv(), optimizer="adamw")
    before = {name: tensor.clone() for name, tensor in engine.bare_model.state_dict().items()}
    checkpointer = Checkpointer(engine, RunPaths(tmp_path), FINGERPRINT, None)
    started: list[Callable[[], None]] = []
    checkpointer._writer.submit = lambda write, *args: started.append(lambda: write(*args))  # type: ignore[assignment, return-value]
    checkpointer.save(FoldProgress(1), wait=False)
    train(engine, 1)
    started[0]()
    saved = read_resume(RunPaths(tmp_path).resume_checkpoints(0)[0]).model["raw"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_resume_line_says_how_much_work_is_repeated() -> None:
    point = ResumePoint(Path("x"), 412, time.mktime((2026, 1, 2, 14, 3, 22, 0, 0, -1)))
    line = "[RESUME] fold=2 from step 412 (epoch 5), saved 14:03:22"
    assert describe_resume(point, 2, 90, point.saved_s + 37.2) == f"{line}, repeating 37 s of work"
    assert describe_resume(point, 2, 90, point.saved_s - 5) == f"{line}, repeating 0 s of work"
    assert describe_resume(point, 2, 90, None) == line
    assert "from step 90 (epoch 1)" in describe_resume(replace(point, step=90), 2, 90, None)
