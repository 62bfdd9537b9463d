"""Pooling that timm lacks: generalized mean (GeM), and max pooling with a deterministic gradient on GPUs."""

from typing import Self

import torch
from timm.layers import SelectAdaptivePool2d
from timm.layers.adaptive_avgmax_pool import AdaptiveAvgMaxPool2d, AdaptiveCatAvgMaxPool2d
from torch import nn

_WITH_MAXIMUM = (nn.AdaptiveMaxPool2d, AdaptiveAvgMaxPool2d, AdaptiveCatAvgMaxPool2d)


def use_deterministic_maxima(model: nn.Module) -> None:
    """Replace adaptive max pooling by `amax` in timm's pooling layers.

    The values are the same. On CUDA, the gradient of adaptive max pooling has no deterministic kernel, and training
    under `torch.use_deterministic_algorithms` would fail at the first step.
    """
    for layer in model.modules():
        if isinstance(layer, SelectAdaptivePool2d) and isinstance(layer.pool, _WITH_MAXIMUM):
            flatten = isinstance(layer.flatten, nn.Flatten)
            fast = SelectAdaptivePool2d(pool_type=f"fast{layer.pool_type}", flatten=flatten)
            layer.pool, layer.flatten = fast.pool, fast.flatten


class GeneralizedMeanPool2d(nn.Module):
    """Pooling by mean(x^p)^(1/p) over the page with a learned p, between the mean (p = 1) and the maximum.

    Source: Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018, eq. 3.
    """

    def __init__(self, flatten: bool, spatial_dims: tuple[int, int], power: float = 3.0, floor: float = 1e-6) -> None:
        super().__init__()
        self.gem_power = nn.Parameter(torch.tensor([power]))
        self.flatten = flatten
        self.spatial_dims = spatial_dims
        self.floor = floor
        self.pool_type = "gem"

    @classmethod
    def like(cls, pool: nn.Module) -> Self:
        """Return a layer with the same input and output layout as timm's `pool`."""
        assert isinstance(pool, SelectAdaptivePool2d)
        is_nhwc = getattr(pool.pool, "dim", (2, 3)) == (1, 2)
        flatten = bool(getattr(pool.pool, "flatten", False)) or isinstance(pool.flatten, nn.Flatten)
        return cls(flatten, (1, 2) if is_nhwc else (2, 3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Pool (n, c, h, w), or (n, h, w, c) if timm pools that, to (n, c); in float32, since powers overflow fp16."""
        powered = features.float().clamp(min=self.floor).pow(self.gem_power)
        pooled = powered.mean(dim=self.spatial_dims, keepdim=not self.flatten).pow(1.0 / self.gem_power)
        return pooled.to(features.dtype)

    def feat_mult(self) -> int:
        """Return the number of output channels per input channel, for timm's heads."""
        return 1
