"""A data set whose decoder crashes the process at one sample."""

import os
import signal

import numpy as np

from doccls.data.dataset import DocClsDataset

CRASHING = 3


class CrashingDataset(DocClsDataset):
    """A data set in which reading sample CRASHING kills the process with the signal `crash`."""

    def __init__(self, *arguments: object, crash: signal.Signals) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._crash = crash

    def _read(self, index: int) -> np.ndarray:
        if index == CRASHING:
            os.kill(os.getpid(), self._crash)
        return super()._read(index)
