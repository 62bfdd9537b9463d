"""The source of every seed of a run.

No generator carries state from one sample or step to the next: each draw is keyed by its purpose and its coordinates
(fold, epoch, sample, ...). So workers, restarts and order change nothing, and a checkpoint holds no generator state.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """The purpose of a stream: part of its key, so that no two purposes share draws. The numbers must never change."""

    FOLDS = 1
    INITIAL_WEIGHTS = 2
    ORDER = 3
    AUGMENTATION = 4
    STEP = 5
    DAMAGE = 6


def derive_stream(seed: int, purpose: Purpose, *coordinates: int) -> np.random.SeedSequence:
    """Return the stream of (seed, purpose, *coordinates); an augmentation's coordinates are (fold, epoch, sample)."""
    return np.random.SeedSequence([seed, int(purpose), *coordinates])


def derive_seed(seed: int, purpose: Purpose, *coordinates: int) -> int:
    """Return the same stream as one unsigned 32-bit number, for libraries that take an integer seed."""
    return int(derive_stream(seed, purpose, *coordinates).generate_state(1)[0])
