"""The training loop: the same gradient for any micro-batch, mixing of odd batches, errors that name bad batches."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from doccls.config.schema import TrainConfig
from doccls.data.dataset import Batch
from doccls.data.sampler import BatchDivision, BatchPlace, BatchPlan, iterate_fold
from doccls.errors import UserError
from doccls.model.optim import build_ema, build_loss, build_mixup, build_optimizer, build_scheduler
from doccls.reporting.log import RunLog
from doccls.reporting.progress import ProgressBar
from doccls.run.heartbeat import Heartbeat
from doccls.system.signals import Interrupted, handling_signals, stopping_gracefully
from doccls.training.engine import Engine, FoldProgress, LossMeter
from doccls.training.evaluate import Normalizer, predict_logits
from doccls.training.step import TrainedEpoch, _mix, _reduce_losses, group_gradients, train_epoch
from tests.unit.conftest import KeptLog

COUNT, CLASSES, SIDE = 11, 3, 4
PAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8))
TARGETS = torch.arange(COUNT) % CLASSES
PLACE = BatchPlace("validate", 0)


class FakeCheckpointer:
    """A stand-in for the fold's Checkpointer that records what it is asked to save, and at which step."""

    def __init__(self, due: Callable[[], bool] = lambda: False) -> None:
        self.is_due = due
        self.saved: list[tuple[int, int, bool]] = []

    def save(self, progress: FoldProgress, wait: bool = False) -> None:
        self.saved.append((progress.step, len(progress.meter.losses), wait))


class Recorder:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.logged.append((dict(values), step))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def make_engine(model: nn.Module | None = None, **keys: Any) -> Engine:
    config = TrainConfig(**{"batch_size": 4, "epochs": 2, "lr": 0.1, "optimizer": "sgd", "weight_decay": 0.0, **keys})
    model = model or make_model()
    plan = BatchPlan(1, 0, np.arange(COUNT), config.batch_size, config.epochs)
    optimizer = build_optimizer(config, model, torch.device("cpu"))
    return Engine(
        accelerator=Accelerator(cpu=True),
        model=model,
        bare_model=model,
        ema=build_ema(config, model, plan.total_steps),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, plan.steps_per_epoch),
        criterion=build_loss(config),
        mixup=build_mixup(config, CLASSES),
        normalize=Normalizer((0.5,) * 3, (0.25,) * 3, torch.device("cpu")),
        num_classes=CLASSES,
        plan=plan,
        division=BatchDivision.derive(config, 1),
        config=config,
        ids=tuple(f"id{row}" for row in range(COUNT)),
        log=RunLog(None),
        tracker=Recorder(),
        heartbeat=Heartbeat(),
    )


def load(engine: Engine, pages: torch.Tensor = PAGES) -> Iterator[Batch]:
    return load_from(engine, 0, pages)


def load_from(engine: Engine, step: int, pages: torch.Tensor = PAGES) -> Iterator[Batch]:
    """Yield the batches of a training without validation, from a step on."""
    for request in iterate_fold(engine.plan, np.arange(0), engine.division, 0, step):
        rows = torch.tensor(request.indices)
        yield Batch(pages[rows], TARGETS[rows], rows, request.place)


def train(engine: Engine, epochs: int = 2, checkpointer: Any = None, batches: Any = None) -> list[TrainedEpoch]:
    batches, checkpointer = batches or load(engine), checkpointer or FakeCheckpointer()
    bar = ProgressBar(None)
    return [train_epoch(engine, batches, epoch, FoldProgress(), checkpointer, bar) for epoch in range(epochs)]


def test_reported_lr_is_that_of_classifier() -> None:
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    engine = make_engine(model, layer_decay=0.5, scheduler="constant")
    pages = torch.zeros(COUNT, 32, 32, 3, dtype=torch.uint8)
    assert train(engine, 1, batches=load(engine, pages))[0].lr == pytest.approx(0.1)


def flatten(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def train_by_hand(epochs: int = 2) -> tuple[torch.Tensor, list[float]]:
    """Run the same training in plain torch: the entire batch at once, the mean loss, SGD."""
    engine = make_engine()
    model, losses = engine.bare_model, []
    optimizer = build_optimizer(engine.config, model, torch.device("cpu"))
    scheduler = build_scheduler(engine.config, optimizer, engine.plan.steps_per_epoch)
    for step in range(epochs * engine.plan.steps_per_epoch):
        rows = torch.from_numpy(engine.plan.list_batch(step))
        scheduler.step_update(step)
        loss = nn.functional.cross_entropy(model((PAGES[rows].permute(0, 3, 1, 2) / 255 - 0.5) / 0.25), TARGETS[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return flatten(model), losses


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 1, 2, 3, 4, 9])
def test_training_matches_full_batch_at_any_micro_batch_size(micro: int | None) -> None:
    engine = make_engine(micro_batch_size=micro)
    results = train(engine)
    weights, losses = train_by_hand()
    torch.testing.assert_close(flatten(engine.bare_model), weights, rtol=1e-4, atol=1e-5)
    half = len(losses) // 2
    assert [result.loss for result in results] == pytest.approx(
        [np.mean(losses[:half]), np.mean(losses[half:])], rel=1e-4
    )


def test_training_twice_gives_the_same_bits() -> None:
    first, second = make_engine(mixup_alpha=0.4), make_engine(mixup_alpha=0.4)
    assert train(first) == train(second)
    assert torch.equal(flatten(first.bare_model), flatten(second.bare_model))


def test_dropout_depends_on_the_step_and_not_on_earlier_draws() -> None:
    def run(disturb: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * SIDE * SIDE, CLASSES))
        engine = make_engine(model)
        torch.manual_seed(77 if disturb else 78)
        train(engine)
        return flatten(model)

    assert torch.equal(run(True), run(False))


def test_gradients_are_clipped_to_the_norm() -> None:
    moved = []
    for clip in (None, 0.01):
        engine = make_engine(grad_clip_norm=clip, optimizer="momentum", batch_size=COUNT)  # one step an epoch
        before = flatten(engine.bare_model)
        train(engine, 1)
        moved.append(float((flatten(engine.bare_model) - before).norm()))
    assert moved[0] > 0.01
    assert moved[1] == pytest.approx(0.1 * 0.01, rel=0.01)  # the first step of momentum is lr x gradient


def test_lr_follows_the_schedule_and_the_last_one_is_returned() -> None:
    engine = make_engine(scheduler="cosine")
    results = train(engine)
    other = make_engine(scheduler="cosine")
    other.scheduler.step_update(other.plan.total_steps - 1)
    assert results[1].lr == pytest.approx(other.optimizer.param_groups[0]["lr"])


def test_averaged_and_raw_weights_are_both_validated() -> None:
    engine = make_engine(ema_decay=0.9)
    assert engine.ema is not None and engine.modules == {"ema": engine.ema.module, "raw": engine.bare_model}
    assert list(engine.modules) == ["ema", "raw"], "if equal, the first is kept"
    train(engine)
    assert not torch.equal(flatten(engine.modules["ema"]), flatten(engine.modules["raw"]))
    assert list(make_engine().modules) == ["raw"]


def test_steps_are_tracked_at_the_interval_and_at_epoch_end() -> None:
    engine = make_engine(batch_size=2, log_interval=2)  # five steps an epoch
    train(engine)
    assert isinstance(engine.tracker, Recorder)
    assert [step for _, step in engine.tracker.logged] == [2, 4, 5, 7, 9, 10]
    assert set(engine.tracker.logged[0][0]) == {"train/loss", "train/lr"}


# --- fp16 ------------------------------------------------------------------------------------------------------------


class Overflowing(nn.Module):
    """A model whose gradients, or with `forward` its logits, overflow at given steps (1-based)."""

    def __init__(self, steps: Container[int] = (3, 4), forward: bool = False) -> None:
        super().__init__()
        self.inner = make_model()
        self.steps, self.overflows_forward = steps, forward
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits: torch.Tensor = self.inner(images)
        if self.calls in self.steps and self.overflows_forward:
            return logits * float("inf")
        if self.calls in self.steps:
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return logits


def make_fp16_engine(model: nn.Module, **train: Any) -> Engine:
    engine = make_engine(model, batch_size=2, **train)  # five steps an epoch
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine.accelerator.scaler = scaler
    return replace(engine, optimizer=AcceleratedOptimizer(engine.optimizer, scaler=scaler), log=KeptLog())


def test_steps_skipped_in_fp16_are_counted_and_logged_with_the_scale() -> None:
    engine = make_fp16_engine(Overflowing(), log_interval=2)
    first, second = train(engine)
    assert (first.skipped_steps, second.skipped_steps) == (2, 0)
    assert [line.partition(" lr=")[2].partition(" ")[2] for line in engine.log.lines] == [
        "scale=1024 skipped_steps=0", "scale=256 skipped_steps=2", "scale=256 skipped_steps=2",
        *["scale=256 skipped_steps=0"] * 3,
    ]  # fmt: skip


def test_overflow_skipped_in_fp16_is_not_a_bad_loss() -> None:
    engine = make_fp16_engine(Overflowing(forward=True), log_interval=5)
    first, second = train(engine)
    assert (first.skipped_steps, second.skipped_steps) == (2, 0)
    assert math.isfinite(first.loss) and math.isfinite(second.loss)
    assert not any("nan" in line for line in engine.log.lines)


class OverflowingInside(nn.Module):
    """A model whose third forward pass overflows before a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.inner = make_model()
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits: torch.Tensor = self.inner(self.norm(images * float("inf") if self.calls == 3 else images))
        return logits


def test_overflow_that_corrupts_batchnorm_ends_the_fold() -> None:
    """The scaler skips the step, but can't restore the running statistics."""
    engine = make_fp16_engine(OverflowingInside(), log_interval=2)
    with pytest.raises(UserError, match=r"the loss of step 3 \(epoch 1\) is nan"):
        train(engine)


def test_overflows_at_the_smallest_scale_end_the_fold() -> None:
    engine = make_fp16_engine(Overflowing(range(2, 99), forward=True), log_interval=1, epochs=9)
    with pytest.raises(UserError, match=r"the loss of step 12 \(epoch 3\) is nan"):
        train(engine, epochs=9)  # ten halvings from 1,024 to 1, and one more


def test_other_precisions_skip_nothing_and_log_no_scale() -> None:
    engine = replace(make_engine(), log=KeptLog())
    assert [result.skipped_steps for result in train(engine)] == [None, None]
    assert not any("scale" in line for line in engine.log.lines)


# --- bad numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_interval", [1, 10])
def test_non_finite_loss_names_step_and_samples(log_interval: int) -> None:
    class Bad(nn.Module):
        """A model that returns NaN from the fourth forward pass on."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()
            self.calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            logits: torch.Tensor = self.inner(images)
            return logits * (float("nan") if self.calls >= 4 else 1.0)

    engine = make_engine(Bad(), log_interval=log_interval)  # two steps an epoch
    with pytest.raises(UserError) as caught:
        train(engine)
    message = str(caught.value)
    assert "fold 0: the loss of step 4 (epoch 2) is nan" in message
    ids = [f"id{row}" for row in engine.plan.list_batch(3)]
    assert f"The batch held 4 samples: {', '.join(ids)}" in message


def test_meter_keeps_each_steps_loss_however_often_losses_are_reduced() -> None:
    engine, meter = make_engine(), LossMeter()
    meter.pending = [torch.tensor(1.0), torch.tensor(3.0)]
    assert _reduce_losses(engine, meter, 2, False) == (None, False)
    assert (meter.losses, meter.pending) == ([1.0, 3.0], [])
    meter.pending = [torch.tensor(5.0)]
    _reduce_losses(engine, meter, 2, False)
    assert meter.losses == [1.0, 3.0, 5.0]


# --- when checkpoints are saved --------------------------------------------------------------------------------------


def test_checkpoint_is_saved_when_due_and_not_at_epoch_end() -> None:
    due = iter([False, True, True, False, False])  # called after each of five steps, and twice when due
    checkpointer = FakeCheckpointer(lambda: next(due, False))
    train(make_engine(batch_size=2, log_interval=100), 1, checkpointer)
    assert checkpointer.saved == [(2, 2, False)]


def test_saving_changes_no_bit_of_weights_or_results() -> None:
    plain, saving = make_engine(batch_size=2), make_engine(batch_size=2)
    assert train(plain) == train(saving, checkpointer=FakeCheckpointer(lambda: True))
    assert torch.equal(flatten(plain.bare_model), flatten(saving.bare_model))


# --- stops -----------------------------------------------------------------------------------------------------------


def test_signal_stops_training_after_the_current_step() -> None:
    engine = make_engine(batch_size=2)  # five steps an epoch
    taken = []

    def step(*others: Any) -> None:
        taken.append(len(taken))
        if len(taken) == 3:
            signal.raise_signal(signal.SIGTERM)

    engine.optimizer.register_step_post_hook(step)
    checkpointer = FakeCheckpointer()
    with handling_signals(), stopping_gracefully(), pytest.raises(Interrupted) as caught:
        train(engine, checkpointer=checkpointer)
    assert (len(taken), caught.value.exit_code) == (3, 143)
    assert checkpointer.saved == [(3, 3, True)], "waits for the disk"


def test_signal_stops_validation_between_batches() -> None:
    engine = make_engine()
    yielded = []

    def load_pages() -> Iterator[Batch]:
        for row in range(5):
            yielded.append(row)
            if row == 2:
                signal.raise_signal(signal.SIGINT)
            yield Batch(PAGES[row : row + 1], TARGETS[row : row + 1], torch.tensor([row]), PLACE)

    with handling_signals(), stopping_gracefully(), pytest.raises(Interrupted) as caught:
        predict_logits([engine.bare_model], load_pages(), engine.normalize, CLASSES, engine.accelerator)
    assert (yielded, caught.value.exit_code) == ([0, 1, 2], 130)


@pytest.mark.parametrize("micro", [None, 2])
def test_grouping_gradients_leaves_weights_buffers_and_gradients_unchanged(
    monkeypatch: pytest.MonkeyPatch, micro: int | None
) -> None:
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *pooled)
    engine = make_engine(model, micro_batch_size=micro, img_size=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch_sizes: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: batch_sizes.append(len(inputs[0])))
    group_gradients(engine)
    assert batch_sizes == [], "one process has no buckets"
    monkeypatch.setattr(type(engine.accelerator), "num_processes", 2)
    group_gradients(engine)
    assert batch_sizes == [micro or 4] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- Mixup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "keys", [{"mixup_alpha": 0.5}, {"cutmix_alpha": 0.5}, {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}]
)
def test_batch_of_any_size_is_mixed_except_an_odd_last_page(count: int, keys: dict[str, float]) -> None:
    engine = make_engine(label_smoothing=0.1, **keys)
    images, targets = torch.rand(count, 3, SIDE, SIDE), TARGETS[:count]
    before = images.clone()
    mixed, soft = _mix(engine, images, targets, 0)
    assert mixed.shape == before.shape and soft.shape == (count, CLASSES)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(count))
    if count % 2:
        assert torch.equal(mixed[-1], before[-1])
        assert soft[-1].tolist() == pytest.approx(
            [0.1 / 3 + 0.9 * (label == int(targets[-1])) for label in range(CLASSES)]
        )


@pytest.mark.parametrize("count", [2, 3, 8])
def test_mixed_images_keep_their_layout(count: int) -> None:
    images = torch.rand(count, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    mixed, _ = _mix(make_engine(mixup_alpha=0.5), images, TARGETS[:count], 0)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("epoch", "is_mixed"), [(0, True), (2, True), (3, False), (4, False)])
def test_final_epochs_are_not_mixed(epoch: int, is_mixed: bool) -> None:
    engine = make_engine(epochs=5, mixup_alpha=0.5, unmixed_epochs=2, label_smoothing=0.1)
    images = torch.rand(4, 3, SIDE, SIDE)
    np.random.seed(0)  # noqa: NPY002 (timm's Mixup draws from it; one draw in some hundreds mixes next to nothing)
    mixed, soft = _mix(engine, images.clone(), TARGETS[:4], epoch)
    assert torch.equal(mixed, images) != is_mixed
    hard = torch.full((4, CLASSES), 0.1 / CLASSES)
    hard[torch.arange(4), TARGETS[:4]] += 0.9
    assert torch.allclose(soft, hard) != is_mixed


def test_run_of_unmixed_epochs_only_trains_as_without_mixup() -> None:
    first = make_engine(mixup_alpha=0.5, unmixed_epochs=2)
    second = make_engine()
    assert first.mixup is None
    assert train(first) == train(second)


def test_batch_is_unchanged_without_mixup() -> None:
    images = torch.rand(3, 3, SIDE, SIDE)
    mixed, targets = _mix(make_engine(), images, TARGETS[:3], 0)
    assert mixed is images and targets.tolist() == [0, 1, 2]


# --- normalisation, evaluation ---------------------------------------------------------------------------------------


def test_pages_are_normalised_per_channel_in_channels_last() -> None:
    normalize = Normalizer((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), torch.device("cpu"))
    images = normalize(PAGES)
    expected = (PAGES.permute(0, 3, 1, 2) / 255 - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor(
        [1.0, 2.0, 4.0]
    ).view(1, 3, 1, 1)
    torch.testing.assert_close(images, expected)
    assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)


def test_logits_are_sorted_by_index_whatever_the_batches() -> None:
    engine = make_engine()
    model = engine.bare_model.train()
    batches = [Batch(PAGES[rows], TARGETS[rows], torch.tensor(rows), PLACE) for rows in ([7, 2], [9], [0, 4, 1])]
    indices, logits = predict_logits([model], batches, engine.normalize, CLASSES, engine.accelerator)
    assert indices.tolist() == [0, 1, 2, 4, 7, 9] and logits.dtype == np.float32 and not model.training
    with torch.no_grad():
        np.testing.assert_allclose(logits[0], model(engine.normalize(PAGES[indices])).numpy(), atol=1e-5)


class Deriving(nn.Module):
    """A model like LeViT in timm <= 1.0.29, which keeps what it derives from its weights until set to training."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(CLASSES))
        self.derived: torch.Tensor | None = None

    def train(self, mode: bool = True) -> Deriving:
        if mode:
            self.derived = None
        return super().train(mode)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.derived is None:
            self.derived = 2 * self.weights
        return self.derived.expand(len(images), CLASSES)


def test_tensors_that_an_ema_derived_from_earlier_weights_are_recomputed() -> None:
    engine, model = make_engine(), Deriving()
    ema = build_ema(TrainConfig(ema_decay=0.5), model, 10)
    assert ema is not None
    for scale in (1.0, 3.0):
        nn.init.constant_(model.weights, scale)
        ema.set(model)
        batch = Batch(PAGES[:2], TARGETS[:2], torch.arange(2), PLACE)
        logits = predict_logits([ema.module], [batch], engine.normalize, CLASSES, engine.accelerator)[1][0]
        assert np.array_equal(logits, np.full((2, CLASSES), 2 * scale)) and not ema.module.training


def test_each_model_gives_its_own_logits() -> None:
    engine = make_engine()
    other = make_model()
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    batches = [Batch(PAGES[rows], TARGETS[rows], rows, PLACE) for rows in (torch.tensor([7, 2]), torch.tensor([4]))]
    both = predict_logits([engine.bare_model, other], batches, engine.normalize, CLASSES, engine.accelerator)
    assert both[0].tolist() == [2, 4, 7] and both[1].shape == (2, 3, CLASSES) and both[1].flags.c_contiguous
    for number, model in enumerate((engine.bare_model, other)):
        alone = predict_logits([model], batches, engine.normalize, CLASSES, engine.accelerator)
        assert np.array_equal(both[1][number], alone[1][0])
    assert not np.array_equal(both[1][0], both[1][1])


def test_no_batches_give_no_logits() -> None:
    engine = make_engine()
    indices, logits = predict_logits([engine.bare_model], [], engine.normalize, CLASSES, engine.accelerator)
    assert indices.shape == (0,) and logits.shape == (1, 0, CLASSES)


def test_sample_evaluated_twice_is_an_error() -> None:
    engine = make_engine()
    batch = Batch(PAGES[:2], TARGETS[:2], torch.tensor([3, 3]), PLACE)
    with pytest.raises(AssertionError, match="evaluated twice"):
        predict_logits([engine.bare_model], [batch], engine.normalize, CLASSES, engine.accelerator)
