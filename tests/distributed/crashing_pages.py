"""A data set whose decoder crashes at one sample, as a loader worker finds it."""

import os
import signal

import numpy as np

from doccls.data.dataset import DocClsDataset

CRASHING = 3


class CrashingDataset(DocClsDataset):
    """Sample CRASHING ends its process by the signal `crash`."""

    def __init__(self, *words: object, crash: signal.Signals) -> None:
        super().__init__(*words)  # type: ignore[arg-type]
        self._crash = crash

    def _read(self, index: int) -> np.ndarray:
        if index == CRASHING:
            os.kill(os.getpid(), self._crash)
        return super()._read(index)
