"""Exclusive ownership of folds: the main process that trains a fold holds its lock, whatever has started it."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from doccls.run.paths import RunPaths
from doccls.system.lock import Lock, hold_lock


class FoldOwner:
    """The locks of the folds that this process trains, held until the block ends. Only the main process takes them."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._locks: dict[int, Lock] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def take(self, paths: RunPaths, folds: Sequence[int], wait_s: float) -> None:
        """Take the locks of the folds, also from dead owners; wait up to `wait_s` seconds for a live one.

        The main process calls it once.

        Raises:
            LockError: another process trains one of the folds.
        """
        for fold in folds:
            what = f"fold {fold} of run {paths.run_id} is being trained"
            self._locks[fold] = self._held.enter_context(hold_lock(paths.fold_lock(fold), what, wait_s))

    def check(self, fold: int) -> None:
        """Check that this process still owns the fold; call it before each write of the fold's files.

        Raises:
            LockError: another process has taken the fold while this one was suspended.
        """
        if fold in self._locks:
            self._locks[fold].check()
