"""Composition of batches: pure functions of (seed, fold, step), the same for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Self

import numpy as np

from doccls.config.schema import TrainConfig
from doccls.randomness import Purpose, derive_stream


class BatchPlace(NamedTuple):
    """The purpose of a batch and its position in the fold."""

    phase: Literal["train", "validate", "validate_damaged", "predict"]
    fold: int
    epoch: int = 0  # 0-based
    step: int = 0  # optimizer step of the fold (0-based, over all epochs); in a validation, the number of steps done
    number: int = 0  # 0-based, among the rank's micro-batches of the step or its batches of the evaluation
    is_last: bool = False  # whether no higher `number` follows


class BatchRequest(NamedTuple):
    """A request to load the samples of one batch."""

    place: BatchPlace
    indices: tuple[int, ...]  # of the samples


@dataclass(frozen=True)
class BatchDivision:
    """The division of a global batch over ranks and then into micro-batches, which pass the model one by one."""

    batch_size: int  # samples of the global batch
    world_size: int
    micro_batch_size: int | None  # maximum samples of a micro-batch; None means a rank's entire batch

    @classmethod
    def derive(cls, train: TrainConfig, world_size: int) -> Self:
        """Derive the division from the config for `world_size` ranks."""
        return cls(train.batch_size, world_size, train.micro_batch_size)

    @property
    def per_rank(self) -> int:
        """The maximum number of samples of a global batch that a rank gets."""
        return -(-self.batch_size // self.world_size)

    @property
    def images_at_a_time(self) -> int:
        """The maximum number of samples that a rank passes through the model at once, also in an evaluation."""
        return min(self.micro_batch_size or self.per_rank, self.per_rank)

    def split(self, samples_B: np.ndarray, rank: int) -> list[np.ndarray]:
        """Return one rank's micro-batches of a global batch (n,): at least one, of near-equal size."""
        own = samples_B[rank :: self.world_size]
        count = 1 if self.micro_batch_size is None else max(1, -(-len(own) // self.micro_batch_size))
        return np.array_split(own, count)

    def find_smallest(self, batch_size: int) -> int:
        """Return the size of the smallest micro-batch of any rank for a global batch of `batch_size` samples."""
        samples = np.arange(batch_size)
        return min(len(micro) for rank in range(self.world_size) for micro in self.split(samples, rank))


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The global batches of one fold's training."""

    seed: int
    fold: int
    samples: np.ndarray  # (n,) int64 indices of the training samples
    batch_size: int  # samples of one global batch; capped at the number of samples
    epochs: int

    @property
    def size(self) -> int:
        """The number of samples in each global batch."""
        return min(self.batch_size, len(self.samples))

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches per epoch; the remainder of each epoch's own permutation is dropped."""
        return len(self.samples) // self.size

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps of the fold."""
        return self.epochs * self.steps_per_epoch

    def list_steps(self, epoch: int) -> range:
        """Return the optimizer steps of an epoch (0-based)."""
        return range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)

    def list_batch(self, step: int) -> np.ndarray:
        """Return the sample indices (size,) int64 of the global batch of `step` (0-based over all epochs)."""
        assert 0 <= step < self.total_steps
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permute(self.seed, self.fold, epoch, len(self.samples))
        batch: np.ndarray = self.samples[order[position * self.size : (position + 1) * self.size]]
        return batch


def list_step(plan: BatchPlan, step: int, division: BatchDivision, rank: int) -> list[BatchRequest]:
    """Return one rank's micro-batches of an optimizer step (0-based over all epochs)."""
    micro_batches = [tuple(samples.tolist()) for samples in division.split(plan.list_batch(step), rank)]
    place = BatchPlace("train", plan.fold, step // plan.steps_per_epoch, step)
    return _number_batches(place, micro_batches)


def list_evaluation(place: BatchPlace, samples: np.ndarray, division: BatchDivision, rank: int) -> list[BatchRequest]:
    """Return one rank's batches of a validation: every world_size-th of `samples` (n,), without padding.

    Ranks may get different numbers of batches, including none.
    """
    own, size = samples[rank :: division.world_size].tolist(), division.images_at_a_time
    return _number_batches(place, [tuple(own[start : start + size]) for start in range(0, len(own), size)])


def list_prediction(
    place: BatchPlace, samples: np.ndarray, batch_size: int, world_size: int, rank: int
) -> list[BatchRequest]:
    """Return one rank's batches of a prediction: every world_size-th of those of `samples` (n,), without padding.

    The batches are the same for any number of ranks: the logits of a page may depend, in their last bits, on how many
    others are in its batch. Ranks may get different numbers of batches, including none.
    """
    starts = range(0, len(samples), batch_size)[rank::world_size]
    return _number_batches(place, [tuple(samples[start : start + batch_size].tolist()) for start in starts])


def iterate_fold(
    plan: BatchPlan,
    valid: np.ndarray,
    division: BatchDivision,
    rank: int,
    from_step: int = 0,
    with_damage: bool = False,
) -> Iterator[BatchRequest]:
    """Yield one rank's batches of a fold from `from_step` on: an epoch's steps, its validation, the next epoch, ...

    With `with_damage`, each validation has the same batches a second time, with damaged pages.
    """
    for epoch in range(find_epoch(from_step, plan), plan.epochs):
        for step in plan.list_steps(epoch):
            if step >= from_step:
                yield from list_step(plan, step, division, rank)
        place = BatchPlace("validate", plan.fold, epoch, plan.list_steps(epoch).stop)
        yield from list_evaluation(place, valid, division, rank)
        if with_damage:
            yield from list_evaluation(place._replace(phase="validate_damaged"), valid, division, rank)


def find_epoch(step: int, plan: BatchPlan) -> int:
    """Return the epoch (0-based) in which a fold resumes: at an epoch's end, its validation is still to be done."""
    return max(0, step - 1) // plan.steps_per_epoch


def _number_batches(place: BatchPlace, batches: list[tuple[int, ...]]) -> list[BatchRequest]:
    last = len(batches) - 1
    return [
        BatchRequest(place._replace(number=number, is_last=number == last), indices)
        for number, indices in enumerate(batches)
    ]


@lru_cache(maxsize=4)
def _permute(seed: int, fold: int, epoch: int, count: int) -> np.ndarray:
    stream = derive_stream(seed, Purpose.ORDER, fold, epoch)
    return np.random.Generator(np.random.PCG64(stream)).permutation(count)
