"""Self-describing files of named arrays: safetensors with a format word, a description and a digest of the content.

The safetensors library can read them, but is not used here: `safetensors.save` holds the GIL while it copies,
`save_file` uses a temporary file of its own, which this process can't sync or, after a kill, find, and `safe_open` maps
the file, which not every file system allows.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from doccls.errors import UserError
from doccls.system.atomic_files import replacing

_T = TypeVar("_T")
Arrays = Mapping[str, np.ndarray]
_DTYPES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8", "|u1": "U8",
    "<u2": "U16", "<u4": "U32", "<u8": "U64", "|b1": "BOOL",
}  # fmt: skip
_ARRAY_DTYPES = {word: np.dtype(dtype) for dtype, word in _DTYPES.items()}
_ALIGNMENT = 8
_LENGTH_BYTES = 8  # of the header's length, with which a file begins
# Errors of code that parses malformed content; RecursionError is a RuntimeError, OverflowError an ArithmeticError.
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError)
_KEY = "doccls"  # the only metadata key: safetensors would write several in an order that differs from run to run


class TensorFileError(UserError):
    """A file is missing, truncated, damaged or of another format; the message gives the path and the reason."""


class OtherVersionError(TensorFileError):
    """A file was written by another version of doccls: it is not damaged, and must not be replaced."""


def refuse_format(path: Path, found: object, wanted: str) -> None:
    """Refuse a file unless it has the wanted format word.

    Raises:
        OtherVersionError: the word is another one of doccls.
        TensorFileError: the word is not one of doccls, or missing.
    """
    if isinstance(found, str) and found.startswith("doccls-") and found != wanted:
        raise OtherVersionError(
            f"{path}: written by another version of doccls (its format is {found}; this version reads {wanted})"
        )
    if found != wanted:
        raise TensorFileError(f"{path}: not a file of the format {wanted}")


def write_tensor_file(path: Path, format_word: str, description: Mapping[str, Any], arrays: Arrays) -> None:
    """Write the file atomically; equal content gives equal bytes. Other Python threads can run meanwhile.

    Args:
        path: of the file.
        format_word: the kind and version of the file.
        description: JSON values.
        arrays: numeric or boolean arrays by name.

    Raises:
        OSError: no disk space, no permission, ...; an existing file at `path` is unchanged.
        TypeError: the description or an array's dtype is not supported.
    """
    text = json.dumps(description)
    packed = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in packed.items():
        if array.dtype.str not in _DTYPES:
            raise TypeError(f"{name} is an array of {array.dtype}, which can't be saved")
    metadata = {"format": format_word, "description": text, "digest": digest_arrays(packed, text)}
    names = sorted(
        packed, key=lambda name: (-packed[name].itemsize, name)
    )  # this order aligns each array to its item size
    header = _render_header({name: packed[name] for name in names}, {_KEY: json.dumps(metadata)})
    with replacing(path, len(header) + sum(array.nbytes for array in packed.values())) as file:
        file.write(header)
        for name in names:
            file.write(_view_bytes(packed[name]))


def read_tensor_file(path: Path, format_word: str, parse: Callable[[dict[str, Any], dict[str, np.ndarray]], _T]) -> _T:
    """Read and verify a file; return the result of `parse(description, arrays)`.

    Raises:
        OtherVersionError: another version of doccls wrote it.
        TensorFileError: it is missing, truncated or of another format, its content does not match its digest, or
            `parse` failed on unexpected content.
    """
    try:
        with path.open("rb") as file:
            file_metadata, arrays = _read_content(file, os.fstat(file.fileno()).st_size)
        metadata = json.loads(file_metadata.get(_KEY, "null"))
    except (OSError, *_DAMAGE) as error:
        raise TensorFileError(f"{path}: can't be read ({type(error).__name__}: {error})") from error
    found = metadata.get("format") if isinstance(metadata, dict) else None
    refuse_format(path, found, format_word)
    text = metadata.get("description")
    if not isinstance(text, str) or metadata.get("digest") != digest_arrays(arrays, text):
        raise TensorFileError(f"{path}: the file is damaged: its content does not match its digest")
    try:
        return parse(json.loads(text), arrays)
    except TensorFileError:
        raise
    except _DAMAGE as error:
        raise TensorFileError(f"{path}: its description is damaged ({type(error).__name__}: {error})") from error


def digest_arrays(arrays: Arrays, text: str) -> str:
    """Return the SHA-256 of a text and named arrays, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
        digest.update(_view_bytes(np.asarray(array, order="C")))
    return digest.hexdigest()


def _render_header(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file that holds the arrays in this order without gaps.

    Source: https://github.com/huggingface/safetensors#format
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": _DTYPES[array.dtype.str], "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read_content(file: BufferedReader, size: int) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Read a safetensors file of `size` bytes; return its metadata and its arrays, which must fill it without gaps.

    Raises:
        ValueError, TypeError, KeyError, ...: it is truncated or damaged, or has arrays of a dtype that NumPy lacks.
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    data_bytes = size - _LENGTH_BYTES - length
    if data_bytes < 0:
        raise ValueError("its header is truncated")
    entries = json.loads(file.read(length))
    metadata = entries.pop("__metadata__", {})
    end, arrays = 0, {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _ARRAY_DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = end, end + math.prod(shape) * dtype.itemsize
        if entry["data_offsets"] != [start, end] or end > data_bytes:  # before memory is allocated for it
            raise ValueError(f"{name!r} does not follow the array before it, or is truncated")
        arrays[name] = np.empty(shape, dtype)
        if file.readinto(_view_bytes(arrays[name])) != end - start:
            raise ValueError(f"{name!r} is truncated")
    if end != data_bytes:
        raise ValueError("data follow its last array")
    return metadata, arrays


def _view_bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
