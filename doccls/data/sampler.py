"""Which samples make up which batch: pure functions of (seed, fold, step), the same at any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Self

import numpy as np

from doccls.config.schema import TrainConfig
from doccls.randomness import Purpose, derive_stream


class BatchPlace(NamedTuple):
    """What a batch is for, and which one it is."""

    phase: Literal["train", "validate", "predict"]
    fold: int
    epoch: int = 0
    """0-based."""
    step: int = 0
    """Optimizer step of the fold (0-based, over all epochs) that it is part of; in a validation, how many are done."""
    number: int = 0
    """From 0, of the rank's micro-batches of the step or of its batches of the validation or prediction."""
    is_last: bool = False
    """Whether it is the last of these."""


class BatchRequest(NamedTuple):
    """A batch that is to be loaded."""

    place: BatchPlace
    indices: tuple[int, ...]
    """Of its samples."""


@dataclass(frozen=True)
class BatchDivision:
    """How a global batch is divided: over ranks, and then into micro-batches, which pass the model one by one."""

    batch_size: int
    """Samples of the global batch."""
    world_size: int
    micro_batch_size: int | None
    """Most samples of a micro-batch; None is all that a rank gets."""

    @classmethod
    def derive(cls, train: TrainConfig, world_size: int) -> Self:
        """As the config says, for so many ranks."""
        return cls(train.batch_size, world_size, train.micro_batch_size)

    @property
    def per_rank(self) -> int:
        """Most samples that a rank gets of a global batch."""
        return -(-self.batch_size // self.world_size)

    @property
    def images_at_a_time(self) -> int:
        """Most samples that a rank takes through the model at once, in an evaluation too."""
        return min(self.micro_batch_size or self.per_rank, self.per_rank)

    def split(self, samples_B: np.ndarray, rank: int) -> list[np.ndarray]:
        """One rank's micro-batches of a global batch (n,): of near-equal size, at least one."""
        own = samples_B[rank :: self.world_size]
        count = 1 if self.micro_batch_size is None else max(1, -(-len(own) // self.micro_batch_size))
        return np.array_split(own, count)

    def find_smallest(self, batch_size: int) -> int:
        """Samples of the smallest micro-batch of any rank, of a global batch of `batch_size`."""
        samples = np.arange(batch_size)
        return min(len(part) for rank in range(self.world_size) for part in self.split(samples, rank))


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The global batches of one fold's whole training."""

    seed: int
    fold: int
    samples: np.ndarray
    """Indices (n,) int64 of the samples trained on."""
    batch_size: int
    """Samples of one global batch; more than there are samples means all of them."""
    epochs: int

    @property
    def size(self) -> int:
        """Samples in each global batch."""
        return min(self.batch_size, len(self.samples))

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of one epoch; the rest of an epoch's permutation is left out, another rest each epoch."""
        return len(self.samples) // self.size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def list_steps(self, epoch: int) -> range:
        """The optimizer steps of an epoch (0-based)."""
        return range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)

    def list_batch(self, step: int) -> np.ndarray:
        """Sample indices (size,) int64 of the global batch of optimizer step `step` (0-based over the whole fold)."""
        assert 0 <= step < self.total_steps
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _permute(self.seed, self.fold, epoch, len(self.samples))
        batch: np.ndarray = self.samples[order[place * self.size : (place + 1) * self.size]]
        return batch


def list_step(plan: BatchPlan, step: int, division: BatchDivision, rank: int) -> list[BatchRequest]:
    """One rank's micro-batches of an optimizer step (0-based over the whole fold)."""
    parts = [tuple(part.tolist()) for part in division.split(plan.list_batch(step), rank)]
    place = BatchPlace("train", plan.fold, step // plan.steps_per_epoch, step)
    return _number(place, parts)


def list_evaluation(place: BatchPlace, samples: np.ndarray, division: BatchDivision, rank: int) -> list[BatchRequest]:
    """One rank's batches of a validation or prediction: every world_size-th of `samples` (n,), none padded or twice.

    Ranks may get different numbers of batches, and none at all.
    """
    own, size = samples[rank :: division.world_size].tolist(), division.images_at_a_time
    return _number(place, [tuple(own[start : start + size]) for start in range(0, len(own), size)])


def iterate_fold(
    plan: BatchPlan, valid: np.ndarray, division: BatchDivision, rank: int, from_step: int = 0
) -> Iterator[BatchRequest]:
    """One rank's batches of a fold from `from_step` on: an epoch's steps, its validation, the next epoch, ..."""
    for epoch in range(find_epoch(from_step, plan), plan.epochs):
        for step in plan.list_steps(epoch):
            if step >= from_step:
                yield from list_step(plan, step, division, rank)
        done = plan.list_steps(epoch).stop
        yield from list_evaluation(BatchPlace("validate", plan.fold, epoch, done), valid, division, rank)


def find_epoch(step: int, plan: BatchPlan) -> int:
    """The epoch (0-based) that a fold resumes in: at an epoch's end its validation is still to do."""
    return max(0, step - 1) // plan.steps_per_epoch


def _number(place: BatchPlace, parts: list[tuple[int, ...]]) -> list[BatchRequest]:
    last = len(parts) - 1
    return [BatchRequest(place._replace(number=at, is_last=at == last), part) for at, part in enumerate(parts)]


@lru_cache(maxsize=4)
def _permute(seed: int, fold: int, epoch: int, count: int) -> np.ndarray:
    stream = derive_stream(seed, Purpose.ORDER, fold, epoch)
    return np.random.Generator(np.random.PCG64(stream)).permutation(count)
