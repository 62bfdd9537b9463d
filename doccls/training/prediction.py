"""Predict pages with the best weights of folds, after their training."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator

from doccls.config import Config
from doccls.data.dataset import Batch, DocClsDataset
from doccls.data.loader import loading
from doccls.data.sampler import BatchDivision, BatchRequest
from doccls.data.shared_memory import plan_loader
from doccls.data.views import IDENTITY, View
from doccls.model.build import build_model
from doccls.reporting.progress import Reporter
from doccls.system.allocator import keep_freed_memory
from doccls.training.checkpoint import BestWeights
from doccls.training.evaluate import Normalizer, predict_logits


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
    images_at_a_time = BatchDivision.derive(config.train, accelerator.num_processes).images_at_a_time
    plan = plan_loader(config.data.num_workers, images_at_a_time * dataset.page_bytes, pin_memory, is_stored)
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
