"""Views applied to batches of pages."""

import torch
from torch.nn import functional

from doccls.data.views import View

_WHITE = 255


def apply_view(images_NHWC: torch.Tensor, view: View) -> torch.Tensor:
    """Return the view of each page: (n, size, size, 3) uint8, as `images_NHWC`. Flips and turns are exact.

    The identity returns `images_NHWC` itself.
    """
    images = images_NHWC
    if view.is_mirrored:
        images = images.flip(2)
    if view.quarter_turns:
        images = torch.rot90(images, view.quarter_turns, (1, 2))
    return images if view.scale == 1 else _scale(images, view.scale)


def _scale(images_NHWC: torch.Tensor, scale: float) -> torch.Tensor:
    """Resize around the centre to the nearest size with margins of whole pixels; cut off or fill with white."""
    size = images_NHWC.shape[1]
    margin = round(size * (scale - 1) / 2)  # negative: the width of the white border
    # Rounded to uint8 as a page from a file is.
    images_NCHW = images_NHWC.permute(0, 3, 1, 2).float()
    side = size + 2 * margin
    resized = functional.interpolate(images_NCHW, (side, side), mode="bilinear", antialias=True, align_corners=False)
    fitted = functional.pad(resized, (-margin,) * 4, value=_WHITE)  # a negative width cuts off
    return fitted.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
