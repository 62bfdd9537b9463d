"""Which samples make up which optimizer step: pure functions of (seed, fold, step), the same at any world size."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from doccls.randomness import Purpose, derive_stream


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

    def split_batch(self, step: int, rank: int, world_size: int, micro_batch_size: int | None) -> list[np.ndarray]:
        """One rank's share of a global batch, in micro-batches of near-equal size, each at most `micro_batch_size`."""
        share = self.list_batch(step)[rank::world_size]
        count = 1 if micro_batch_size is None else max(1, -(-len(share) // micro_batch_size))
        return np.array_split(share, count)


@lru_cache(maxsize=4)
def _permute(seed: int, fold: int, epoch: int, count: int) -> np.ndarray:
    stream = derive_stream(seed, Purpose.ORDER, fold, epoch)
    return np.random.Generator(np.random.PCG64(stream)).permutation(count)
