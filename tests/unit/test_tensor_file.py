"""The tensor file: other programs read it, the same content gives the same bytes, and damage is found."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import load_file, save_file

from doccls.system.tensor_file import OtherVersionError, TensorFileError, read_tensor_file, write_tensor_file

DTYPES = ("<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "|i1", "|u1", "<u2", "<u4", "<u8", "|b1")
ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8).filter("__metadata__".__ne__),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, min_side=0))
    ),
    max_size=4,
)


def read(path: Path, word: str = "kind-1") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return read_tensor_file(path, word, lambda description, arrays: (description, arrays))


@given(ARRAYS)
def test_what_was_written_comes_back_and_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_tensor_file(path, "kind-1", {"a": [1, "ü"]}, arrays)
    description, found = read(path)
    assert description == {"a": [1, "ü"]}
    for others in (found, load_file(path)):
        assert others.keys() == arrays.keys()
        for name, array in arrays.items():
            assert others[name].dtype == array.dtype and others[name].shape == array.shape
            assert others[name].tobytes() == array.tobytes()


def test_an_array_with_another_layout_gives_the_same_bytes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for name, written in (("a", array), ("b", np.asfortranarray(array))):
        write_tensor_file(tmp_path / name, "kind-1", {}, {"x": written})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_of_another_kind_or_of_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(TensorFileError, match="can't be read"):
        read(path)
    write_tensor_file(path, "kind-1", {}, {})
    with pytest.raises(TensorFileError, match="not a file of the format kind-2"):
        read(path, "kind-2")
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(TensorFileError, match="not a file of the format kind-1"):
        read(path)
    write_tensor_file(path, "doccls-kind-1", {}, {})
    with pytest.raises(OtherVersionError, match=r"its format is doccls-kind-1; this version reads doccls-kind-2\)"):
        read(path, "doccls-kind-2")


@pytest.mark.parametrize("error", [KeyError, TypeError, ValueError, AttributeError, RecursionError])
def test_a_description_that_says_something_else_is_damage(tmp_path: Path, error: type[Exception]) -> None:
    def parse(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        raise error("what")

    write_tensor_file(tmp_path / "x", "kind-1", {}, {})
    with pytest.raises(TensorFileError, match="its description is damaged"):
        read_tensor_file(tmp_path / "x", "kind-1", parse)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F4", "nonsense"])
def test_arrays_of_a_kind_that_numpy_lacks_are_damage(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(TensorFileError):
        read(tmp_path / "x")


def test_a_description_that_nests_without_end_is_damage(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x", {"doccls": "[" * 200_000})
    with pytest.raises(TensorFileError):
        read(tmp_path / "x")


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensor_file(path, "kind-1", {"a": 1}, {"b": np.arange(3), "c": np.ones((2, 1), np.float32)})
    data, unnoticed = path.read_bytes(), 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            description, found = read(path)
        except TensorFileError:
            continue
        unnoticed += 1
        assert description == {"a": 1} and found["b"].tolist() == [0, 1, 2]
    assert unnoticed <= 8, "padding alone"


def test_what_no_file_can_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="x is an array of object, which can't be saved"):
        write_tensor_file(tmp_path / "x", "kind-1", {}, {"x": np.array([None])})
    with pytest.raises(TypeError):
        write_tensor_file(tmp_path / "x", "kind-1", {"a": dataclasses}, {})
    assert not list(tmp_path.iterdir())


def test_other_threads_run_while_a_large_file_is_written(tmp_path: Path) -> None:
    """A thread that counts gets on; with the interpreter's lock held for the whole write it would stand still."""
    array, counts, done = np.zeros(2**26, dtype=np.float32), [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counts[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counts[0]
        write_tensor_file(tmp_path / "x", "kind-1", {}, {"x": array})
        after = counts[0]
    finally:
        done.set()
        thread.join()
    assert after - before > 100
