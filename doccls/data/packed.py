"""Texts and paths of all samples, packed: a million of them are two arrays, not a million objects.

Objects would be pickled one by one for each rank and each loader worker; and whatever looks at one writes its count of
references, so that memory shared by a fork is copied page by page. Of arrays, what is not looked up is not touched.
"""

import os
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import overload

import numpy as np


class PackedTexts(Sequence[str]):
    """Texts, each made when it is asked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode(errors="surrogateescape") for text in texts]  # file names need not be valid UTF-8
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[item] for item in range(len(self))[place]]
        place = range(len(self))[index(place)]
        start, end = self._ends[place : place + 2]
        return self._bytes[start:end].tobytes().decode(errors="surrogateescape")

    def find_empty(self) -> np.ndarray:
        """Where the text is empty: (m,) int64, ascending."""
        return np.flatnonzero(np.diff(self._ends) == 0)


class PackedPaths(Sequence[Path | None]):
    """Files in or under one folder, each made when it is asked for; None where there is none."""

    def __init__(self, folder: Path, names: Iterable[str | None]) -> None:
        """`names` are relative to the folder."""
        self._folder = os.fspath(folder)
        self._names = PackedTexts(name or "" for name in names)

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, place: int) -> Path | None: ...
    @overload
    def __getitem__(self, place: slice) -> list[Path | None]: ...
    def __getitem__(self, place: int | slice) -> Path | list[Path | None] | None:
        if isinstance(place, slice):
            return [self[item] for item in range(len(self))[place]]
        name = self._names[place]
        return Path(self._folder, name) if name else None

    def find_missing(self) -> np.ndarray:
        """Where there is none: (m,) int64, ascending."""
        return self._names.find_empty()
