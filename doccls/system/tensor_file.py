"""Files of named arrays that say what they are: safetensors with a format word, a description and a digest over all.

They are read by the safetensors library. They are written here, since `safetensors.save` holds the interpreter's lock
while it copies, and `save_file` goes through a temporary file of its own, which nobody can sync or, after a kill, find.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from doccls.errors import UserError
from doccls.system.atomic_files import replacing

_T = TypeVar("_T")
Arrays = Mapping[str, np.ndarray]
_DTYPES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8", "|u1": "U8",
    "<u2": "U16", "<u4": "U32", "<u8": "U64", "|b1": "BOOL",
}  # fmt: skip
_ALIGNMENT = 8
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)  # and with it RecursionError
"""What content of the wrong kind is met with."""
_KEY = "doccls"
"""The one key of the metadata: safetensors would write several in an order that differs from run to run."""


class TensorFileError(UserError):
    """A file is missing, torn, of another format, or not what it says; the message names it and the reason."""


class OtherVersionError(TensorFileError):
    """A file is of another version of doccls, which can read it: it is not damaged, and must not be replaced."""


def refuse_format(path: Path, found: object, wanted: str) -> None:
    """Refuse a file by its format word, unless it is the one that is wanted.

    Raises:
        OtherVersionError: the word is of doccls.
        TensorFileError: it is not, or there is none.
    """
    if isinstance(found, str) and found.startswith("doccls-") and found != wanted:
        raise OtherVersionError(
            f"{path}: of another version of doccls (its format is {found}; this version reads {wanted})"
        )
    if found != wanted:
        raise TensorFileError(f"{path}: not a file of the format {wanted}")


def write_tensor_file(path: Path, format_word: str, description: Mapping[str, Any], arrays: Arrays) -> None:
    """Write the file, whole; the same content gives the same bytes. Other Python threads can run meanwhile.

    Args:
        path: of the file.
        format_word: which kind of file it is, in which version.
        description: JSON values.
        arrays: of numbers or truth values, by name.

    Raises:
        OSError: no room, no right, ...; an earlier file of that name is as it was.
        TypeError: the description, or the type of an array, can't be written.
    """
    text = json.dumps(description)
    packed = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in packed.items():
        if array.dtype.str not in _DTYPES:
            raise TypeError(f"{name} is an array of {array.dtype}, which can't be saved")
    stated = {"format": format_word, "description": text, "digest": digest_arrays(packed, text)}
    names = sorted(packed, key=lambda name: (-packed[name].itemsize, name))  # each array aligned to its items
    with replacing(path) as file:
        file.write(_render_header({name: packed[name] for name in names}, {_KEY: json.dumps(stated)}))
        for name in names:
            file.write(_view_bytes(packed[name]))


def read_tensor_file(path: Path, format_word: str, parse: Callable[[dict[str, Any], dict[str, np.ndarray]], _T]) -> _T:
    """Read and verify a file; `parse` makes something of its description and arrays.

    Raises:
        OtherVersionError: another version of doccls wrote it.
        TensorFileError: missing, torn, foreign, its content does not match its digest, or `parse` met something
            that it did not expect.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            stated = json.loads((file.metadata() or {}).get(_KEY, "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, *_DAMAGE) as error:
        raise TensorFileError(f"{path}: can't be read ({type(error).__name__}: {error})") from error
    found = stated.get("format") if isinstance(stated, dict) else None
    refuse_format(path, found, format_word)
    if not isinstance(text := stated.get("description"), str) or stated.get("digest") != digest_arrays(arrays, text):
        raise TensorFileError(f"{path}: its content does not match its digest: the file is damaged")
    try:
        return parse(json.loads(text), arrays)
    except TensorFileError:
        raise
    except _DAMAGE as error:
        raise TensorFileError(f"{path}: its description is damaged ({type(error).__name__}: {error})") from error


def digest_arrays(arrays: Arrays, text: str) -> str:
    """SHA-256 over a text and named arrays, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
        digest.update(_view_bytes(np.asarray(array, order="C")))
    return digest.hexdigest()


def _render_header(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file that holds the arrays in this order, one right after the other.

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


def _view_bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
