"""Every seed of a run derives from here.

Nothing draws from a generator that carries state from one sample or step to the next: a draw is named by what it is for
and where it stands. So workers, restarts and order change nothing, and a checkpoint holds no generator state.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for; part of its key, so that two purposes never share draws. Numbers are fixed for ever."""

    FOLDS = 1
    INITIAL_WEIGHTS = 2
    ORDER = 3
    AUGMENTATION = 4
    STEP = 5


def derive_stream(seed: int, purpose: Purpose, *place: int) -> np.random.SeedSequence:
    """The stream of (seed, purpose, place...): for example place = (fold, epoch, sample) for one augmentation."""
    return np.random.SeedSequence([seed, int(purpose), *place])


def derive_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """The same stream as one unsigned 32-bit number, for libraries that are seeded by a number."""
    return int(derive_stream(seed, purpose, *place).generate_state(1)[0])
