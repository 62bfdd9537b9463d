"""BatchNorm statistics of the pages at hand, mixed with those of the training.

Pages that were scanned or photographed differently shift the distribution of each layer's inputs. With n pages (at
most MAX_PAGES) and a prior strength N, a layer normalizes by N / (N + n) times the mean and variance of the training
plus n / (N + n) times those of the pages (Schneider et al., Improving Robustness Against Common Corruptions by
Covariate Shift Adaptation, NeurIPS 2020).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from doccls.data.dataset import Batch
from doccls.errors import UserError
from doccls.system.signals import check_stop
from doccls.training.evaluate import Normalizer, gather_indexed

MIN_PAGES = 32  # fewer say too little about the distribution of all
# Whatever the training's: a layer's inputs are measured while each batch is normalized by its own statistics, which are
# far from those of all pages if the batch is small.
BATCH_SIZE = 32
MAX_PAGES = 1024  # more hardly change the statistics, but cost time, and memory for those of each batch


def has_batch_norm(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Return whether the weights are of a model with BatchNorm layers that have running statistics."""
    # Other layers with such statistics, as EvoNorm, count no batches.
    return any(name.endswith("num_batches_tracked") for name in state_dict)


def choose_pages(rows: np.ndarray) -> np.ndarray:
    """Return the rows (m,) whose pages give the statistics: all, or MAX_PAGES of them, evenly spread."""
    if len(rows) <= MAX_PAGES:
        return rows
    chosen: np.ndarray = rows[np.linspace(0, len(rows) - 1, MAX_PAGES).round().astype(np.int64)]
    return chosen


@torch.no_grad()
def adapt_batch_norm(
    model: nn.Module,
    batches: Iterable[Batch],
    normalize: Normalizer,
    accelerator: Accelerator,
    num_pages: int,
    prior: int,
) -> None:
    """Mix the statistics of all ranks' `batches`, of `num_pages` pages, into the model. All ranks must call.

    While they are measured, each batch is normalized by its own mixture, so that a layer sees inputs like those it will
    see later. The sums over batches are in the order of the batches, so that any number of ranks gives the same bits,
    if the batches are those of `list_prediction`. Statistics that are not finite give logits that are not.

    Raises:
        UserError: the model has no BatchNorm layer with running statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        raise UserError("--adapt-bn: the model has no BatchNorm layer with running statistics")
    model.eval()
    source = [_read_statistics(norm).clone() for norm in norms]
    weight = num_pages / (prior + num_pages)
    numbers: list[int] = []
    moments: list[torch.Tensor] = []
    with _measuring(norms, source, weight) as measured:
        for batch in batches:
            if accelerator.num_processes == 1:
                check_stop()
            with accelerator.autocast():
                model(normalize(batch.images_NHWC.to(accelerator.device, non_blocking=True)))
            numbers.append(batch.place.number * accelerator.num_processes + accelerator.process_index)
            moments.append(len(batch.indices_N) * _list_moments([measured[norm].cpu() for norm in norms]))
    width = sum(2 * norm.num_features for norm in norms)
    own_BM = torch.cat([torch.empty(0, width, dtype=torch.float64), *moments])
    if accelerator.num_processes > 1:
        own_BM = own_BM.to(accelerator.device)
    _, sums_BM = gather_indexed(torch.tensor(numbers, dtype=torch.int64), own_BM, accelerator)
    totals = np.split(sums_BM.sum(axis=0) / num_pages, np.cumsum([2 * norm.num_features for norm in norms])[:-1])
    for norm, own_source, total in zip(norms, source, totals, strict=True):
        mean, square = np.split(total, 2)
        pages = torch.from_numpy(np.stack([mean, np.maximum(square - mean**2, 0)])).to(own_source)
        _write_statistics(norm, torch.lerp(own_source, pages, weight))


@contextmanager
def _measuring(
    norms: list[_BatchNorm], source: list[torch.Tensor], weight: float
) -> Iterator[dict[_BatchNorm, torch.Tensor]]:
    """Yield the mean and variance (2, channels) of each layer's latest input, by which, mixed, it is normalized."""
    source_of = dict(zip(norms, source, strict=True))
    measured = dict(source_of)  # of a layer that no page passes

    def measure(norm: _BatchNorm, inputs: tuple[torch.Tensor]) -> None:
        values = inputs[0].float()  # (n, channels, ...)
        variance, mean = torch.var_mean(values, [0, *range(2, values.dim())], correction=0)
        measured[norm] = torch.stack([mean, variance])
        _write_statistics(norm, torch.lerp(source_of[norm], measured[norm], weight))

    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        yield measured
    finally:
        for handle in handles:
            handle.remove()


def _list_moments(measured: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean and the mean square of each layer, one after the other: (1, 2 x channels of all) float64."""
    parts = []
    for mean, variance in (statistics.double() for statistics in measured):
        parts += [mean, variance + mean**2]
    return torch.cat(parts)[None]


def _read_statistics(norm: _BatchNorm) -> torch.Tensor:
    """Return the mean and variance of a layer: (2, channels)."""
    assert norm.running_mean is not None and norm.running_var is not None
    return torch.stack([norm.running_mean, norm.running_var])


def _write_statistics(norm: _BatchNorm, statistics: torch.Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(statistics[0])
    norm.running_var.copy_(statistics[1])
