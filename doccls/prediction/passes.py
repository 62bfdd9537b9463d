"""Passes of pages through the best model of a fold, in batches that are the same for any number of processes."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

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
from doccls.prediction.batch_norm import BATCH_SIZE, adapt_batch_norm, choose_pages
from doccls.reporting.progress import Reporter
from doccls.system.allocator import keep_freed_memory
from doccls.training.checkpoint import BestWeights
from doccls.training.evaluate import Normalizer, predict_logits

_MAX_BATCH_SIZE = 64  # of a prediction; larger batches are hardly faster, and one process may have to hold them


def choose_batch_size(config: Config) -> int:
    """Return how many pages pass the model at once, whatever the number of processes."""
    return min(BatchDivision.derive(config.train, 1).images_at_a_time, _MAX_BATCH_SIZE)


@dataclass(frozen=True)
class Pass:
    """One rank's batches of one fold's pages: those that adapt its BatchNorm statistics, if any, and then all."""

    prior: int | None  # as in Setting
    num_adapting: int  # pages of all ranks that give the statistics
    adapting: tuple[BatchRequest, ...]
    predicting: tuple[BatchRequest, ...]

    @property
    def requests(self) -> tuple[BatchRequest, ...]:
        """The batches in the order in which they are needed."""
        return self.adapting + self.predicting


def plan_pass(
    place: BatchPlace, rows: np.ndarray, config: Config, accelerator: Accelerator, prior: int | None = None
) -> Pass:
    """Plan this rank's part of a prediction of `rows` (n,), with BatchNorm statistics of these pages if `prior` is."""

    def list_requests(rows: np.ndarray, batch_size: int) -> tuple[BatchRequest, ...]:
        return tuple(list_prediction(place, rows, batch_size, accelerator.num_processes, accelerator.process_index))

    adapting = choose_pages(rows[:0] if prior is None else rows)
    predicting = list_requests(rows, choose_batch_size(config))
    return Pass(prior, len(adapting), list_requests(adapting, BATCH_SIZE), predicting)


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
    batch_bytes = max(choose_batch_size(config), BATCH_SIZE) * dataset.page_bytes
    plan = plan_loader(config.data.num_workers, batch_bytes, pin_memory, is_stored)
    for remark in plan.remarks:
        reporter.line(f"[PREDICT] {remark}")
    if not pin_memory:
        keep_freed_memory(os.environ)
    with loading(dataset, requests, plan.workers, pin_memory, plan.prefetch) as batches:
        yield batches


def predict_fold(
    best: BestWeights,
    config: Config,
    work: Pass,
    batches: Iterator[Batch],
    accelerator: Accelerator,
    views: Sequence[View] = (IDENTITY,),
) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices (n,), logits (views, n, classes) float32) of a fold's model, as `predict_logits`.

    The next of `batches` are those of `work.requests`. All ranks must call.

    Raises:
        UserError: the model has no BatchNorm statistics to adapt.
    """
    model = build_model(config.model, len(best.classes), config.train.img_size, fetch=False)
    model.load_state_dict(best.state_dict)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = Normalizer(best.mean, best.std, accelerator.device)
    if work.prior is not None:
        adapting = islice(batches, len(work.adapting))
        adapt_batch_norm(model, adapting, normalize, accelerator, work.num_adapting, work.prior)
    predicting = islice(batches, len(work.predicting))
    return predict_logits([model], predicting, normalize, len(best.classes), accelerator, views)
