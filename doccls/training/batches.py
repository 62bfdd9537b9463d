"""Which batches a rank reads, in which order: those of training and validation, of all folds, one after the other."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from accelerate import Accelerator

from doccls.config.schema import DataConfig
from doccls.data.dataset import Batch, DocClsDataset, Pages, SampleKey
from doccls.data.order import BatchPlan
from doccls.data.room import plan_loader
from doccls.data.transforms import Augmentation
from doccls.data.workers import loading
from doccls.experiment import Experiment
from doccls.run.runlog import RunLog
from doccls.training.evaluate import EvaluationKeys
from doccls.training.loop import list_training_keys
from doccls.training.starts import Start


def load_folds(
    experiment: Experiment, folds: Sequence[int], starts: Mapping[int, Start], accelerator: Accelerator, log: RunLog
) -> AbstractContextManager[Iterator[Batch]]:
    """This rank's batches of all that `train_fold` does on `folds`, in that order: one set of workers for all.

    Raises:
        OwnError: this machine has no shared memory for them.
    """
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
    keys = (batch for fold in folds for batch in _list_keys(experiment, fold, starts.get(fold), accelerator))
    share = -(-config.train.batch_size // accelerator.num_processes)
    most = min(config.train.micro_batch_size or share, share)
    on_gpu, stored = accelerator.device.type == "cuda", experiment.data.stored is not None
    plan = plan_loader(config.data.num_workers, most * dataset.page_bytes, on_gpu, stored)
    for remark in plan.remarks:
        log.line(f"[DATA] {remark}")
    return loading(dataset, keys, plan.workers, on_gpu, plan.prefetch)


def _list_keys(
    experiment: Experiment, fold: int, start: Start | None, accelerator: Accelerator
) -> Iterator[list[SampleKey]]:
    """One fold's batches on this rank, from where it goes on: an epoch, its validation, the next epoch, ..."""
    train, plan = experiment.config.train, experiment.plan(fold)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    step = 0 if start is None else start.step
    for epoch in range(find_epoch(step, plan), train.epochs):
        yield from list_training_keys(plan, epoch, train.micro_batch_size, rank, world_size, step)
        yield from list_validation_keys(experiment, fold, accelerator)


def find_epoch(step: int, plan: BatchPlan) -> int:
    """The epoch (0-based) that a fold goes on in: at an epoch's end its validation is still to do."""
    return max(0, step - 1) // plan.steps_per_epoch


def list_validation_keys(experiment: Experiment, fold: int, accelerator: Accelerator) -> EvaluationKeys:
    """This rank's share of the fold's validation."""
    train, world_size = experiment.config.train, accelerator.num_processes
    size = min(train.micro_batch_size or train.batch_size, -(-train.batch_size // world_size))
    return EvaluationKeys(experiment.data.list_valid(fold), size, accelerator.process_index, world_size)


class WaitingBatches(Iterator[Batch]):
    """The batches, and how long they were waited for: with loader workers, only where these were too slow."""

    def __init__(self, batches: Iterator[Batch]) -> None:
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


def advise_on_waiting(share: float, data: DataConfig, stored: bool) -> str:
    """What the log says where steps wait for pages: how much, and what to raise."""
    cures = ["a larger data.num_workers" + ("" if data.num_workers == "auto" else f" (now {data.num_workers})")]
    cures += [] if stored else ["data.store, which keeps decoded pages"]
    cures += ["less of augment's slow ones (shadow, noise)"]
    return f"steps waited for pages {share:.0%} of the epoch's time; what helps: {', '.join(cures)}"
