"""Packed strings and paths of all samples: a million of them are two arrays, not a million objects.

Objects would be pickled one by one for each rank and loader worker, and reading one updates its reference count, so
that memory shared by a fork is copied page by page. Reading an array element touches nothing else.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import overload

import numpy as np


class PackedTexts(Sequence[str]):
    """A sequence of strings in two arrays; each string is decoded on access."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode(errors="surrogateescape") for text in texts]  # file names may be invalid UTF-8
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        data = self._bytes.tobytes()
        for start, end in pairwise(self._ends.tolist()):
            yield data[start:end].decode(errors="surrogateescape")

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> list[str]: ...
    def __getitem__(self, key: int | slice) -> str | list[str]:
        if isinstance(key, slice):
            return [self[position] for position in range(len(self))[key]]
        position = range(len(self))[index(key)]
        start, end = self._ends[position : position + 2]
        return self._bytes[start:end].tobytes().decode(errors="surrogateescape")

    def find_empty(self) -> np.ndarray:
        """Return the indices of empty strings: (m,) int64, ascending."""
        return np.flatnonzero(np.diff(self._ends) == 0)


class PackedPaths(Sequence[Path | None]):
    """A sequence of paths under one folder, each built on access; None where there is no file."""

    def __init__(self, folder: Path, names: Iterable[str | None]) -> None:
        """Pack `names`, which are relative to the folder."""
        self._folder = os.fspath(folder)
        self.names = PackedTexts(name or "" for name in names)  # empty where there is no file

    def __len__(self) -> int:
        return len(self.names)

    def locate(self, name: str) -> Path:
        """Return the path of the file of that name."""
        return Path(self._folder, name)

    @overload
    def __getitem__(self, key: int) -> Path | None: ...
    @overload
    def __getitem__(self, key: slice) -> list[Path | None]: ...
    def __getitem__(self, key: int | slice) -> Path | list[Path | None] | None:
        if isinstance(key, slice):
            return [self[position] for position in range(len(self))[key]]
        name = self.names[key]
        return self.locate(name) if name else None

    def find_missing(self) -> np.ndarray:
        """Return the indices without a file: (m,) int64, ascending."""
        return self.names.find_empty()
