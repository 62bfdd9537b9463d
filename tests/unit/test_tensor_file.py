"""Tensor files: other programs can read them, equal content gives equal bytes, and damage is detected."""

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
def test_content_round_trips_and_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_tensor_file(path, "kind-1", {"a": [1, "ü"]}, arrays)
    description, found = read(path)
    assert description == {"a": [1, "ü"]}
    for loaded in (found, load_file(path)):
        assert loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
            assert loaded[name].tobytes() == array.tobytes()


def test_array_in_another_layout_gives_same_bytes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for name, written in (("a", array), ("b", np.asfortranarray(array))):
        write_tensor_file(tmp_path / name, "kind-1", {}, {"x": written})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_missing_file_and_other_formats_are_rejected(tmp_path: Path) -> None:
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
def test_unexpected_description_counts_as_damage(tmp_path: Path, error: type[Exception]) -> None:
    def parse(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        raise error("unexpected")

    write_tensor_file(tmp_path / "x", "kind-1", {}, {})
    with pytest.raises(TensorFileError, match="its description is damaged"):
        read_tensor_file(tmp_path / "x", "kind-1", parse)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F4", "nonsense"])
def test_dtypes_that_numpy_lacks_count_as_damage(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(TensorFileError):
        read(tmp_path / "x")


def test_endlessly_nested_description_counts_as_damage(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x", {"doccls": "[" * 200_000})
    with pytest.raises(TensorFileError):
        read(tmp_path / "x")


def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensor_file(path, "kind-1", {"a": 1}, {"b": np.arange(3), "c": np.ones((2, 1), np.float32)})
    data, unnoticed = path.read_bytes(), 0
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        try:
            description, found = read(path)
        except TensorFileError:
            continue
        unnoticed += 1
        assert description == {"a": 1} and found["b"].tolist() == [0, 1, 2]
    assert unnoticed <= 8, "only padding"


def test_unsupported_content_is_rejected_without_leaving_a_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="x is an array of object, which can't be saved"):
        write_tensor_file(tmp_path / "x", "kind-1", {}, {"x": np.array([None])})
    with pytest.raises(TypeError):
        write_tensor_file(tmp_path / "x", "kind-1", {"a": dataclasses}, {})
    assert not list(tmp_path.iterdir())


def test_other_threads_run_during_a_large_write(tmp_path: Path) -> None:
    """A counting thread makes progress, which it could not if the write held the GIL."""
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


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 12]}},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 2**60], "shape": [2**58]}},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 8], "shape": [0, 2**80]}},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 16], "shape": [-2, -1]}},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 16], "shape": [2.0]}},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": ["8", 16]}},
        {"a": ENTRY, "b": None},
        {"a": ENTRY, "__metadata__": None},
    ],
    ids=str,
)
def test_arrays_that_do_not_fill_the_file_count_as_damage(tmp_path: Path, entries: dict[str, Any]) -> None:
    header = json.dumps(entries).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(TensorFileError, match="can't be read"):
        read(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\0" * 8])
def test_file_without_a_header_counts_as_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(TensorFileError, match="can't be read"):
        read(tmp_path / "x")
