"""Atomic files: an existing file stays until the new one is complete."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from doccls.errors import UserError
from doccls.system.atomic_files import WriteError, remove_leftovers, replacing, write_array, write_once, write_text
from doccls.training.checkpoint import BestWeights, write_best


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_existing_file_is_unchanged_when_writing_fails(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), replacing(tmp_path / "a") as file:
        file.write(b"half of the new")
        raise error
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, WriteError), (errno.EROFS, WriteError), (errno.EDQUOT, WriteError),
                         (errno.EIO, OSError), (errno.ESTALE, OSError)]
)  # fmt: skip
@pytest.mark.parametrize("where", ["write", "sync", "rename"])
def test_disk_error_names_file_and_errno_and_is_user_error_if_fixable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[OSError], where: str
) -> None:
    write_text(tmp_path / "a", "old")

    def fail(*others: object) -> None:
        raise OSError(number, os.strerror(number))

    if where == "sync":
        monkeypatch.setattr("doccls.system.atomic_files.os.fsync", fail)
    if where == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as caught, replacing(tmp_path / "a") as file:
        file.write(b"half of the new")
        if where == "write":
            fail()
    assert isinstance(caught.value, UserError) == (kind is WriteError)
    assert str(tmp_path / "a") in str(caught.value) and str(int(number)) in str(caught.value)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_full_disk_keeps_previous_best_weights(small_disk: Path) -> None:
    weights = {f"w{number}": torch.ones(100_000) for number in range(4)}  # 1.6 MB; torch writes them in many calls
    best = BestWeights(weights, "x", 0, 1, 0.5, "raw", ("a",), (0.0,), (1.0,), "no", {})
    write_best(small_disk / "best.pth", best)
    before = (small_disk / "best.pth").read_bytes()
    with pytest.raises(WriteError, match=r"can't write .*best\.pth: No space left on device \(errno 28\)"):
        write_best(small_disk / "best.pth", best)
    assert (small_disk / "best.pth").read_bytes() == before
    assert [path.name for path in small_disk.iterdir()] == ["best.pth"]


def test_no_file_appears_when_first_write_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), replacing(tmp_path / "deep" / "a") as file:
        file.write(b"half")
        raise ValueError("x")
    assert not list((tmp_path / "deep").iterdir())


def test_readers_see_old_content_until_the_block_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_content_is_synced_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = Path.replace

    def rename(self: Path, target: Path) -> Path:
        calls.append("rename")
        return real(self, target)

    monkeypatch.setattr("doccls.system.atomic_files.os.fsync", lambda descriptor: calls.append("sync"))
    monkeypatch.setattr(Path, "replace", rename)
    write_text(tmp_path / "a", "x")
    assert calls == ["sync", "rename", "sync"]


def test_text_is_utf8_with_unchanged_line_endings_and_folders_are_created(tmp_path: Path) -> None:
    write_text(tmp_path / "b" / "c" / "a.txt", "ü\n\r\n€")
    assert (tmp_path / "b" / "c" / "a.txt").read_bytes() == "ü\n\r\n€".encode()


def test_array_round_trips_and_gives_same_bytes_in_any_layout(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_array(tmp_path / "a.npy", array)
    write_array(tmp_path / "b.npy", np.asfortranarray(array))
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_array_that_needs_pickle_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        write_array(tmp_path / "a.npy", np.array([{}], dtype=object))
    assert not list(tmp_path.iterdir())


def test_write_once_keeps_first_content(tmp_path: Path) -> None:
    path = tmp_path / "once.txt"
    assert write_once(path, "first\n") == "first\n"
    assert write_once(path, "second\n") == "first\n"
    assert [file.name for file in tmp_path.iterdir()] == ["once.txt"]


def test_concurrent_write_once_calls_all_return_the_same_content(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda number: write_once(tmp_path / "once.txt", f"{number}\n" * 100), range(32)))
    assert len(set(contents)) == 1 and len(contents[0].splitlines()) == 100


def test_only_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    kept = ["a[1].pth", ".a[1].pth.tmp", ".b.pth.0123abcd.tmp", "a1.pth"]
    for name in (*kept, ".a[1].pth.0123abcd.tmp", ".a[1].pth.ffff0000.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a[1].pth")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)
    remove_leftovers(tmp_path / "nowhere" / "x")
