"""Compute the logits of a set of samples, each exactly once, with any number of processes."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from doccls.data.dataset import Batch
from doccls.data.views import IDENTITY, View
from doccls.system.signals import check_stop
from doccls.training.distributed import encode_stop, raise_stop
from doccls.training.views import apply_view


class Normalizer:
    """The conversion of uint8 pages to the network's input, on the device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean, self.std = mean, std
        self._mean = 255.0 * torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._factor = 1.0 / (255.0 * torch.tensor(std, device=device).view(1, 3, 1, 1))

    def __call__(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """Convert (n, h, w, 3) uint8 to (n, 3, h, w) float32 in channels_last, the layout of the permuted view."""
        images = images_NHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
        return (images - self._mean) * self._factor


@torch.no_grad()  # not inference_mode: a model may later train with tensors that it derives and caches here
def predict_logits(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    normalize: Normalizer,
    num_classes: int,
    accelerator: Accelerator,
    views: Sequence[View] = (IDENTITY,),
) -> tuple[np.ndarray, np.ndarray]:
    """Return each model's logits of every sample in all ranks' `batches`, on every rank. All ranks must call.

    `models` are bare modules: DDP's forward may run collectives, and ranks may have different numbers of batches.
    Each batch is loaded once and passes the models in every view, one view at a time.

    Returns:
        (indices (n,) int64 ascending, logits (views * models, n, num_classes) float32 in that order): all models in
        the first view, then all in the second, ...

    Raises:
        Interrupted: a signal asked for a stop; with several ranks, all raise it when they exchange their logits.
    """
    # Until set to training, LeViT and others in timm <= 1.0.29 keep what they derived from an EMA's earlier weights.
    for model in models:
        model.train()
        model.eval()
    indices: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    for batch in batches:
        if accelerator.num_processes == 1:
            check_stop()
        pages = batch.images_NHWC.to(accelerator.device, non_blocking=True)
        outputs = []
        for view in views:
            images = normalize(apply_view(pages, view))
            with accelerator.autocast():
                outputs += [model(images) for model in models]
        indices.append(batch.indices_N)  # on the CPU until the exchange, so that no batch waits for the device
        logits.append(torch.cat([output.float() for output in outputs], dim=1))
    own_indices = torch.cat([torch.empty(0, dtype=torch.int64), *indices])
    count = len(views) * len(models)
    own_logits = torch.cat([torch.empty(0, count * num_classes, device=accelerator.device), *logits])
    rows, columns = gather_indexed(own_indices, own_logits, accelerator)
    return rows, np.ascontiguousarray(columns.reshape(len(rows), count, num_classes).swapaxes(0, 1))


def gather_indexed(
    indices_N: torch.Tensor, values_NC: torch.Tensor, accelerator: Accelerator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of all ranks, by ascending index, on every rank. All ranks must call.

    Args:
        indices_N: (n,) int64, on the CPU; no two rows of any ranks have the same.
        values_NC: (n, columns) on the device; the same dtype and columns on all ranks.
        accelerator: The ranks.

    Raises:
        Interrupted: a signal asked for a stop; with several ranks, all raise it.
    """
    if accelerator.num_processes > 1:
        device = values_NC.device
        own = torch.cat([torch.tensor([len(indices_N)], device=device), encode_stop(device).long()])
        exchanged_RS = accelerator.gather(own[None])
        raise_stop(exchanged_RS[:, 1:].sum(0))
        length = int(exchanged_RS[:, 0].max())
        padding = length - len(indices_N)  # with index -1
        indices_N = accelerator.gather(nn.functional.pad(indices_N, (0, padding), value=-1).to(device))
        values_NC = accelerator.gather(nn.functional.pad(values_NC, (0, 0, 0, padding)).contiguous())
    indices, values = indices_N.cpu().numpy(), values_NC.cpu().numpy()
    real = indices >= 0
    order = np.argsort(indices[real], kind="stable")
    indices, values = indices[real][order], values[real][order]
    assert np.all(np.diff(indices) > 0), "a sample was evaluated twice"
    return indices, values
