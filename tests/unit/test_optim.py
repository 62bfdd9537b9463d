"""Optimizer, schedule and losses: lr is a pure function of the step, and weight decay spares biases and norms."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from doccls.config.schema import TrainConfig
from doccls.errors import UserError
from doccls.model.optim import (
    build_ema,
    build_loss,
    build_mixup,
    build_optimizer,
    build_scheduler,
    choose_ema_decay,
    describe_unreached_ema,
)

CPU = torch.device("cpu")
STEPS = 10  # per epoch


def config(**keys: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 10, "lr": 0.1, **keys})


def list_lrs(order: list[int] | None = None, **keys: Any) -> list[float]:
    """Return the learning rate of each step of ten epochs, computed in `order`."""
    train = config(**keys)
    optimizer = build_optimizer(train, nn.Linear(2, 2), CPU)
    scheduler = build_scheduler(train, optimizer, STEPS)
    lrs = {}
    for step in order or list(range(train.epochs * STEPS)):
        scheduler.step_update(step)
        lrs[step] = float(optimizer.param_groups[0]["lr"])
    return [lrs[step] for step in sorted(lrs)]


# --- scaling of the learning rate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr_scaling", "batch_size", "factor"),
    [("none", 128, 1.0), ("linear", 32, 1.0), ("linear", 128, 4.0), ("linear", 8, 0.25), ("sqrt", 128, 2.0)],
)
def test_lr_scaling_scales_all_of_schedule_with_batch_size(lr_scaling: str, batch_size: int, factor: float) -> None:
    keys = {"warmup_epochs": 2.0, "min_lr": 0.001}
    expected = [factor * lr for lr in list_lrs(**keys)]
    assert list_lrs(**keys, lr_scaling=lr_scaling, batch_size=batch_size) == pytest.approx(expected)


# --- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["cosine", "tanh", "poly", "step", "constant"])
def test_lr_is_pure_function_of_step(scheduler: str) -> None:
    keys = {"scheduler": scheduler, "warmup_epochs": 2.0, "min_lr": 0.001, "decay_epochs": 3.0}
    forward = list_lrs(**keys)
    shuffled = np.random.default_rng(0).permutation(100).tolist()
    assert list_lrs(shuffled, **keys) == forward
    assert list_lrs([57], **keys) == [forward[57]]
    assert all(math.isfinite(lr) and 0 < lr <= 0.1 for lr in forward)


@pytest.mark.parametrize("scheduler", ["cosine", "tanh", "poly", "step", "constant"])
def test_warmup_starts_low_and_rises_to_peak(scheduler: str) -> None:
    lrs = list_lrs(scheduler=scheduler, warmup_epochs=2.0, decay_epochs=5.0)
    assert lrs[0] <= 0.1 * 0.01
    assert all(later > earlier for earlier, later in pairwise(lrs[:20]))
    assert max(lrs) > 0.09
    assert abs(max(lrs[:25]) - 0.1) < 0.01


def test_warmup_can_end_within_epoch() -> None:
    lrs = list_lrs(scheduler="constant", warmup_epochs=0.5)
    assert lrs[4] < 0.1 and lrs[5] == pytest.approx(0.1)


@pytest.mark.parametrize("scheduler", ["cosine", "tanh", "poly"])
def test_schedule_ends_near_min_lr(scheduler: str) -> None:
    keys = {"decay_rate": 1.0} if scheduler == "poly" else {}
    lrs = list_lrs(scheduler=scheduler, min_lr=0.002, **keys)
    assert lrs[0] == pytest.approx(0.1, rel=0.02)
    assert 0.002 <= lrs[-1] < 0.002 + 0.005
    assert all(later <= earlier for earlier, later in pairwise(lrs))


def test_cosine_schedule_matches_formula() -> None:
    for step, lr in enumerate(list_lrs(scheduler="cosine", min_lr=0.01)):
        assert lr == pytest.approx(0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * step / 100)), rel=1e-6)


def test_step_schedule_decays_every_decay_epochs() -> None:
    lrs = list_lrs(scheduler="step", decay_epochs=3.0, decay_rate=0.5)
    for step, lr in enumerate(lrs):
        assert lr == pytest.approx(0.1 * 0.5 ** (step // 30))


def test_constant_schedule_is_constant() -> None:
    assert set(list_lrs(scheduler="constant")) == {0.1}


def test_run_of_one_step_has_lr() -> None:
    train = config(epochs=1, scheduler="cosine")
    optimizer = build_optimizer(train, nn.Linear(2, 2), CPU)
    build_scheduler(train, optimizer, 1).step_update(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


# --- optimizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "AdamW", "SGD", "lamb", "NAdamW", "rmsprop"])
def test_timm_optimizers_are_case_insensitive_and_train(name: str) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(config(optimizer=name), model, CPU)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize(("name", "near"), [("adamv", "adam"), ("Adam W", "adamw"), ("sdg", "sgd"), ("qqqq", "adamw")])
def test_unknown_optimizer_is_rejected_with_closest_names(name: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        build_optimizer(config(optimizer=name), nn.Linear(1, 1), CPU)
    assert f"train.optimizer = {name!r}" in str(caught.value) and near in str(caught.value)


def test_biases_and_norms_get_no_weight_decay() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = build_optimizer(config(weight_decay=0.3), model, CPU)
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    names = dict(model.named_parameters())
    assert len(decay) == len(names)
    for name, parameter in names.items():
        assert decay[id(parameter)] == (0.0 if parameter.ndim <= 1 else 0.3), name
    assert {0.0, 0.3} == set(decay.values())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_layer_decay_lowers_lr_from_classifier_to_input(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    train = config(layer_decay=0.5, scheduler="constant", weight_decay=0.3)
    optimizer = build_optimizer(train, model, CPU)
    build_scheduler(train, optimizer, STEPS).step_update(3)
    lr = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    names = [name for name, _ in model.named_parameters()]
    lrs = [lr[id(weight)] for weight in model.parameters()]
    classifier = [number for number, name in enumerate(names) if name.startswith(("fc", "head"))]
    assert all(lrs[number] == pytest.approx(0.1) for number in classifier)
    assert lrs[0] == min(lrs) < 0.1 * 0.5**2
    assert all(any(value == pytest.approx(0.1 * 0.5**power) for power in range(20)) for value in lrs)
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert all(decay[id(weight)] == 0.0 for weight in model.parameters() if weight.ndim <= 1)


def test_without_layer_decay_all_layers_learn_alike() -> None:
    optimizer = build_optimizer(config(), timm.create_model("test_resnet", num_classes=3), CPU)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


# --- losses, Mixup, EMA ----------------------------------------------------------------------------------------------


def test_loss_is_mean_cross_entropy_with_label_smoothing() -> None:
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    for smoothing in (0.0, 0.2):
        expected = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        torch.testing.assert_close(build_loss(config(label_smoothing=smoothing))(logits, targets), expected)


def test_loss_takes_soft_targets_with_mixup() -> None:
    logits, soft = torch.randn(6, 4), torch.softmax(torch.randn(6, 4), dim=1)
    for keys in ({"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}):
        torch.testing.assert_close(build_loss(config(**keys))(logits, soft), nn.functional.cross_entropy(logits, soft))


def test_mixup_is_off_by_default() -> None:
    assert build_mixup(config(), 3) is None
    assert build_mixup(config(mixup_alpha=0.2), 3) is not None
    assert build_mixup(config(cutmix_alpha=0.2), 3) is not None


def test_mixup_mixes_pages_and_targets_in_same_ratio() -> None:
    np.random.seed(0)  # noqa: NPY002 (timm's Mixup draws from it)
    mixup = build_mixup(config(mixup_alpha=1.0), 2)
    assert mixup is not None
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    mixed, targets = mixup(images, torch.tensor([0, 1]))
    ratio = float(mixed[0, 0, 0, 0])
    assert 0 < ratio < 1
    torch.testing.assert_close(targets, torch.tensor([[1 - ratio, ratio], [ratio, 1 - ratio]]))


def test_ema_follows_weights_and_is_off_by_default() -> None:
    model = nn.Linear(1, 1, bias=False)
    assert build_ema(config(), model, 100) is None
    ema = build_ema(config(ema_decay=0.5), model, 100)
    assert ema is not None
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema.module.weight.fill_(0.0)
    ema.update(model, step=10**6)  # warmed up: the configured decay
    assert float(ema.module.weight.detach()) == pytest.approx(0.5, abs=1e-3)
    for step in range(50):
        ema.update(model, step=10**6 + step)
    assert float(ema.module.weight.detach()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.5), (40, 0.5), (1000, 0.98), (100_000, 0.9998)])
def test_auto_ema_spans_five_percent_of_run(steps: int, decay: float) -> None:
    assert choose_ema_decay(config(ema_decay="auto"), steps) == pytest.approx(decay)
    assert choose_ema_decay(config(ema_decay=0.9), steps) == 0.9 and choose_ema_decay(config(), steps) is None


@pytest.mark.parametrize(
    ("decay", "steps", "reached"),
    [(0.9999, 100, "0.968"), (0.9, 3, "0.561"), (0.5, 1, "0"), (0.9, 22, None), (0.9, 21, "0.898"), ("auto", 3, None),
     (None, 1, None)],
)  # fmt: skip
def test_ema_decay_that_training_does_not_reach_is_reported(decay: Any, steps: int, reached: str | None) -> None:
    warning = describe_unreached_ema(config(ema_decay=decay), steps)
    assert warning is None if reached is None else f"ends at {reached} after {steps} steps" in str(warning)
    ema = build_ema(config(ema_decay=decay), nn.Linear(1, 1), steps)
    if isinstance(decay, float) and ema is not None:  # timm's own decay at the last step
        assert (ema.get_decay(steps) < decay) is (reached is not None)


def test_auto_ema_reaches_its_decay_early_in_run() -> None:
    """A decay of 0.998, right for 10,000 steps, is reached only at step 3,968, after the end of a run of 1,000."""
    model = nn.Linear(1, 1)
    ema = build_ema(config(ema_decay="auto"), model, 1000)
    assert ema is not None and ema.get_decay(150) < 0.98 == pytest.approx(ema.get_decay(250))
