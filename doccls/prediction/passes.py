"""Passes of pages through the best model of a fold, in batches that are the same for any number of processes."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator

from doccls.config import Config
from doccls.data.dataset import Batch, DocClsDataset
from doccls.data.loader import loading
from doccls.data.sampler import BatchDivision, BatchPlace, BatchRequest, list_prediction
from doccls.data.shared_memory import plan_loader
from doccls.data.views import IDENTITY, View
from doccls.model.build import build_model
from doccls.reporting.progress import Reporter
from doccls.system.allocator import keep_freed_memory
from doccls.training.checkpoint import BestWeights
from doccls.training.evaluate import Normalizer, predict_logits

_MAX_BATCH_SIZE = 64  # of a prediction; larger batches are hardly faster, and one process may have to hold them


def choose_batch_size(config: Config) -> int:
    """Return how many pages pass the model at once, whatever the number of processes."""
    return min(BatchDivision.derive(config.train, 1).images_at_a_time, _MAX_BATCH_SIZE)


def list_requests(place: BatchPlace, rows: np.ndarray, config: Config, accelerator: Accelerator) -> list[BatchRequest]:
    """Return this rank's batches of a prediction of `rows` (n,)."""
    world_size, rank = accelerator.num_processes, accelerator.process_index
    return list_prediction(place, rows, choose_batch_size(config), world_size, rank)


@contextmanager
def load_batches(
    dataset: DocClsDataset,
    requests: Iterable[BatchRequest],
    config: Config,
    is_stored: bool,
    accelerator: Accelerator,
    reporter: Reporter,
) -> Iterator[Iterator[Batch]]:
    """Yield this rank's batches from one set of workers; `is_stored` says whether the pages are in a store."""
    pin_memory = accelerator.device.type == "cuda"
    batch_bytes = choose_batch_size(config) * dataset.page_bytes
    plan = plan_loader(config.data.num_workers, batch_bytes, pin_memory, is_stored)
    for remark in plan.remarks:
        reporter.line(f"[PREDICT] {remark}")
    if not pin_memory:
        keep_freed_memory(os.environ)
    with loading(dataset, requests, plan.workers, pin_memory, plan.prefetch) as batches:
        yield batches


def load_model(best: BestWeights, config: Config, accelerator: Accelerator) -> torch.nn.Module:
    """Return the fold's model on this process's device."""
    model = build_model(config.model, len(best.classes), config.train.img_size, fetch=False)
    model.load_state_dict(best.state_dict)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def predict_views(
    model: torch.nn.Module,
    best: BestWeights,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    views: Sequence[View] = (IDENTITY,),
) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices (n,), logits (views, n, classes) float32), as `predict_logits`. All ranks must call."""
    normalize = Normalizer(best.mean, best.std, accelerator.device)
    return predict_logits([model], batches, normalize, len(best.classes), accelerator, views)
