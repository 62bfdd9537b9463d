"""Packed strings and paths: they survive a round trip and pickle as arrays."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doccls.data.packed import PackedPaths, PackedTexts

file_names = st.binary(max_size=12).map(os.fsdecode)  # including names of invalid UTF-8


@given(st.lists(st.text() | file_names))
def test_packed_texts_equal_the_originals(texts: list[str]) -> None:
    packed = pickle.loads(pickle.dumps(PackedTexts(texts)))  # noqa: S301 (pickled here)
    assert list(packed) == texts and len(packed) == len(texts)
    assert [packed[np.int64(position)] for position in range(len(texts))] == texts
    assert packed[1:4] == texts[1:4] and packed[::-2] == texts[::-2]
    assert packed.find_empty().tolist() == [position for position, text in enumerate(texts) if not text]
    for beyond in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            packed[beyond]


def test_packed_paths_are_in_their_folder_or_none() -> None:
    paths = PackedPaths(Path("/pages"), ["a.jpg", None, "b/c.png"])
    assert list(paths) == [Path("/pages/a.jpg"), None, Path("/pages/b/c.png")]
    assert paths[-1] == Path("/pages/b/c.png") and paths[:2] == [Path("/pages/a.jpg"), None]
    assert paths.find_missing().tolist() == [1] and len(paths) == 3


def test_packed_texts_pickle_compactly() -> None:
    packed = PackedTexts(f"page_{row:07d}.jpg" for row in range(10_000))
    assert len(pickle.dumps(packed)) < 10_000 * (16 + 8) + 1000
