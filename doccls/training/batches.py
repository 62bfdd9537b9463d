"""The batches that a rank reads: those of training and validation, of one fold after the other."""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from accelerate import Accelerator

from doccls.data.dataset import Batch, DocClsDataset, build_dataset, list_keys
from doccls.data.loader import loading
from doccls.data.sampler import BatchDivision, BatchRequest, iterate_fold
from doccls.data.shared_memory import plan_loader
from doccls.experiment import Experiment
from doccls.training.checkpoint import ResumePoint
from doccls.training.engine import RunContext

_TIMED_PAGES = 8


class TimedBatches(Iterator[Batch]):
    """An iterator over batches that measures the time spent waiting for them."""

    def __init__(self, batches: Iterator[Batch], workers: int) -> None:
        """Wrap the batches of `workers` loader processes; 0 means that this process makes them itself."""
        self.workers = workers
        self._batches, self._waited_s = batches, 0.0

    def __next__(self) -> Batch:
        began_s = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._waited_s += time.perf_counter() - began_s

    def pop_wait_s(self) -> float:
        """Return the seconds spent waiting since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s


@contextmanager
def load_folds(
    context: RunContext, folds: Sequence[int], resume_points: Mapping[int, ResumePoint]
) -> Iterator[TimedBatches]:
    """Yield this rank's batches for `train_fold` on each of `folds`, in that order, from one set of workers.

    Raises:
        RankLocalError: this machine has too little shared memory for them.
    """
    experiment, accelerator = context.experiment, context.accelerator
    config = experiment.config
    dataset = build_dataset(config, experiment.data.manifest, experiment.data.stored)
    requests = (
        request
        for fold in folds
        for request in _iterate_requests(experiment, fold, resume_points.get(fold), accelerator)
    )
    micro_batch = BatchDivision.derive(config.train, accelerator.num_processes).images_at_a_time
    on_gpu, stored = accelerator.device.type == "cuda", experiment.data.stored is not None
    page_s = 0.0
    if on_gpu and folds and config.data.num_workers == "auto":
        page_s = measure_page(dataset, next(_iterate_requests(experiment, folds[0], None, accelerator)))
    plan = plan_loader(config.data.num_workers, micro_batch * dataset.page_bytes, on_gpu, stored, page_s)
    for remark in plan.remarks:
        context.log.line(f"[DATA] {remark}")
    with loading(dataset, requests, plan.workers, on_gpu, plan.prefetch) as batches:
        yield TimedBatches(batches, plan.workers)


def measure_page(dataset: DocClsDataset, request: BatchRequest) -> float:
    """Return the seconds that one process takes to make a page: the median of a few, after one to warm up."""
    times_s = []
    for key in list_keys(request)[: _TIMED_PAGES + 1]:
        began_s = time.perf_counter()
        dataset[key]
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s[1:] or times_s)


def _iterate_requests(
    experiment: Experiment, fold: int, resume_point: ResumePoint | None, accelerator: Accelerator
) -> Iterator[BatchRequest]:
    """Iterate over this rank's batch requests for one fold, from where it resumes."""
    division = BatchDivision.derive(experiment.config.train, accelerator.num_processes)
    valid, step = experiment.data.list_valid(fold), 0 if resume_point is None else resume_point.step
    with_damage = experiment.config.valid.has_damage
    return iterate_fold(experiment.plan(fold), valid, division, accelerator.process_index, step, with_damage)


def advise_on_waiting(share: float, workers: int, cores: int, stored: bool) -> str:
    """Return advice for a run whose steps wait for pages, although the loader is working to capacity.

    Args:
        share: The share of the epoch's time that was spent waiting.
        workers: The number of loader workers.
        cores: The number of cores that this process may use.
        stored: Whether pages are read from the store, already decoded.
    """
    # Without waiting, the epoch would take 1 - share of its time, for the same number of pages.
    # Without workers, this process was itself making pages while it waited.
    busy = workers if workers else share
    needed = max(workers + 1, math.ceil(busy / (1.0 - share)))
    options = [f"data.num_workers = {needed} (now {workers})"] if needed < cores else []
    options += [] if stored else ["data.store, which keeps decoded pages"]
    options += ["fewer slow augmentations (shadow, noise)"]
    if needed >= cores:
        options.append(f"more cores ({needed} workers would keep up; now {workers}, on {cores} cores)")
    return f"steps waited for pages {share:.0%} of the epoch's time; consider {', '.join(options)}"
