"""Which batches a rank reads, in which order: those of training and validation, of all folds, one after the other."""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from accelerate import Accelerator

from doccls.data.dataset import Batch, DocClsDataset, Pages, list_keys
from doccls.data.loader import loading
from doccls.data.sampler import BatchDivision, BatchRequest, iterate_fold
from doccls.data.shared_memory import plan_loader
from doccls.data.transforms import Augmentation
from doccls.experiment import Experiment
from doccls.training.checkpoint import ResumePoint
from doccls.training.engine import RunContext

_TIMED_PAGES = 8


class WaitingBatches(Iterator[Batch]):
    """The batches, and how long they were waited for: with loader workers, only where these were too slow."""

    def __init__(self, batches: Iterator[Batch], workers: int) -> None:
        """`workers` make them; 0: this process does so itself."""
        self.workers = workers
        self._batches, self._waited_s = batches, 0.0

    def __next__(self) -> Batch:
        asked_s = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._waited_s += time.perf_counter() - asked_s

    def take_s(self) -> float:
        """Seconds waited since it was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s


@contextmanager
def load_folds(
    context: RunContext, folds: Sequence[int], starts: Mapping[int, ResumePoint]
) -> Iterator[WaitingBatches]:
    """This rank's batches of all that `train_fold` does on `folds`, in that order: one set of workers for all.

    Raises:
        RankLocalError: this machine has no shared memory for them.
    """
    experiment, accelerator = context.experiment, context.accelerator
    config, manifest = experiment.config, experiment.data.manifest
    pages = Pages(
        manifest.ids,
        manifest.paths,
        manifest.targets_N,
        config.train.img_size,
        config.page_px,
        config.data.max_image_pixels,
        experiment.data.stored,
    )
    dataset = DocClsDataset(pages, Augmentation(config.augment, config.train.img_size), config.project.seed)
    requests = (
        request for fold in folds for request in _iterate_requests(experiment, fold, starts.get(fold), accelerator)
    )
    most = BatchDivision.derive(config.train, accelerator.num_processes).images_at_a_time
    on_gpu, stored = accelerator.device.type == "cuda", experiment.data.stored is not None
    page_s = 0.0
    if on_gpu and folds and config.data.num_workers == "auto":
        page_s = measure_page(dataset, next(_iterate_requests(experiment, folds[0], None, accelerator)))
    plan = plan_loader(config.data.num_workers, most * dataset.page_bytes, on_gpu, stored, page_s)
    for remark in plan.remarks:
        context.log.line(f"[DATA] {remark}")
    with loading(dataset, requests, plan.workers, on_gpu, plan.prefetch) as batches:
        yield WaitingBatches(batches, plan.workers)


def measure_page(dataset: DocClsDataset, request: BatchRequest) -> float:
    """Seconds that it takes one process to make a page: the median of the first few, without the very first."""
    times_s = []
    for key in list_keys(request)[: _TIMED_PAGES + 1]:
        began_s = time.perf_counter()
        dataset[key]
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s[1:] or times_s)


def _iterate_requests(
    experiment: Experiment, fold: int, start: ResumePoint | None, accelerator: Accelerator
) -> Iterator[BatchRequest]:
    """This rank's batches of one fold, from where it resumes."""
    division = BatchDivision.derive(experiment.config.train, accelerator.num_processes)
    valid, step = experiment.data.list_valid(fold), 0 if start is None else start.step
    return iterate_fold(experiment.plan(fold), valid, division, accelerator.process_index, step)


def advise_on_waiting(share: float, workers: int, cores: int, stored: bool) -> str:
    """What the log says where steps wait for pages, of which the loader makes as many as it can.

    Args:
        share: of the epoch's time, waited.
        workers: that make the pages.
        cores: that this process may use.
        stored: whether pages come decoded.
    """
    # Without waiting, the epoch would take 1 - share of its time, and as many pages would be made in it.
    # Where there are no workers, this process was busy with pages while it waited.
    busy = workers if workers else share
    needed = max(workers + 1, math.ceil(busy / (1.0 - share)))
    cures = [f"data.num_workers = {needed} (now {workers})"] if needed < cores else []
    cures += [] if stored else ["data.store, which keeps decoded pages"]
    cures += ["less of augment's slow ones (shadow, noise)"]
    cures += [] if needed < cores else [f"more cores ({needed} workers would keep up; now {workers}, on {cores} cores)"]
    return f"steps waited for pages {share:.0%} of the epoch's time; what helps: {', '.join(cures)}"
