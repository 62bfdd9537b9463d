"""Generalized-mean pooling: the formula, its limits, and the shapes that timm's heads expect."""

from __future__ import annotations

import pytest
import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from doccls.model.pooling import GeneralizedMeanPool2d, use_deterministic_maxima


def test_gem_matches_formula() -> None:
    features = torch.rand(2, 3, 4, 5) + 0.1
    pooled = GeneralizedMeanPool2d(True, (2, 3), power=2.5)(features)
    expected = (features.double() ** 2.5).mean(dim=(2, 3)) ** (1 / 2.5)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-6)


def test_power_one_is_mean_and_large_power_is_maximum() -> None:
    features = torch.rand(2, 3, 6, 6) + 0.5
    torch.testing.assert_close(GeneralizedMeanPool2d(True, (2, 3), power=1.0)(features), features.mean(dim=(2, 3)))
    near_max = GeneralizedMeanPool2d(True, (2, 3), power=60.0)(features)
    torch.testing.assert_close(near_max, features.amax(dim=(2, 3)), rtol=0.08, atol=0)


def test_values_below_floor_give_finite_results_and_gradients() -> None:
    features = torch.full((1, 2, 3, 3), -1.0, requires_grad=True)
    pool = GeneralizedMeanPool2d(True, (2, 3))
    pooled = pool(features)
    pooled.sum().backward()
    assert torch.isfinite(pooled).all() and pooled.min() > 0
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert pool.gem_power.grad is not None and torch.isfinite(pool.gem_power.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    features = torch.full((1, 2, 4, 4), 300.0, dtype=dtype)  # 300 cubed overflows fp16
    pooled = GeneralizedMeanPool2d(True, (2, 3))(features)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.float(), torch.full((1, 2), 300.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gem_has_output_shape_of_timm_pool(flatten: bool, layout: str) -> None:
    timm_pool = SelectAdaptivePool2d(pool_type="avg" if layout == "NCHW" else "fast", flatten=flatten, input_fmt=layout)
    if layout == "NHWC":
        timm_pool = SelectAdaptivePool2d(pool_type="fastavg", flatten=flatten, input_fmt="NHWC")
    features = torch.rand(2, 5, 6, 7)
    pooled = GeneralizedMeanPool2d.like(timm_pool)(features)
    assert pooled.shape == timm_pool(features).shape


def test_gem_with_power_one_is_timm_average_pool() -> None:
    features = torch.rand(2, 5, 6, 7) + 0.1
    for timm_pool in (
        SelectAdaptivePool2d(pool_type="avg", flatten=True),
        SelectAdaptivePool2d(pool_type="fastavg", flatten=True, input_fmt="NHWC"),
    ):
        pool = GeneralizedMeanPool2d.like(timm_pool)
        with torch.no_grad():
            pool.gem_power.fill_(1.0)
        torch.testing.assert_close(pool(features), timm_pool(features))


def test_power_is_only_parameter() -> None:
    assert [name for name, _ in GeneralizedMeanPool2d(True, (2, 3)).named_parameters()] == ["gem_power"]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax", "catavgmax"])
def test_deterministic_maxima_have_values_of_timm_pooling(pooling: str, flatten: bool) -> None:
    layer = SelectAdaptivePool2d(pool_type=pooling, flatten=flatten)
    features = torch.rand(2, 5, 6, 7)
    expected = layer(features)
    use_deterministic_maxima(nn.Sequential(layer))
    pooled = layer(features)
    torch.testing.assert_close(pooled, expected)
    features.requires_grad_()
    names = set()
    todo = [layer(features).sum().grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert not any("MaxPool" in name for name in names), "on CUDA its gradient is not deterministic"
