"""Atomic files: an existing file stays until the new one is complete."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from doccls.errors import UserError
from doccls.system import atomic_files, signals
from doccls.system.atomic_files import (
    WriteError,
    read_bytes,
    read_text,
    remove_leftovers,
    replacing,
    restore_files,
    write_array,
    write_bytes,
    write_text,
)
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
    # The disk has 3 MiB, of which the file that exists takes 1.5.
    message = r"can't write .*best\.pth: No space left on device \(errno 28\): 1\.5 MiB needed, 1\.[45] MiB free"
    with pytest.raises(WriteError, match=message):
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


def test_only_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    kept = ["a[1].pth", ".a[1].pth.tmp", ".b.pth.0123abcd.tmp", "a1.pth", ".a[1].pth.json.0123abcd.tmp"]
    for name in (*kept, ".a[1].pth.0123abcd.tmp", ".a[1].pth.fold1-ffff0000.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a[1].pth")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)
    remove_leftovers(tmp_path / "nowhere" / "x")


# --- what a file system may lack -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "amounts"), [(errno.ENOSPC, ": 9 bytes needed, 2.0 MiB free"),
                                                 (errno.EDQUOT, ": 9 bytes needed"), (errno.EROFS, "")])  # fmt: skip
def test_full_disk_tells_what_is_needed_and_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, amounts: str
) -> None:
    monkeypatch.setattr("doccls.system.disk.measure_free", lambda folder: 2 * 2**20)
    monkeypatch.setattr(Path, "replace", refuse(number))
    with pytest.raises(WriteError) as caught:
        write_bytes(tmp_path / "a", b"123456789")
    assert str(caught.value).endswith(f"(errno {number}){amounts}")


def refuse(
    number: int, when: Callable[..., bool] = lambda *others: True, call: Callable[..., Any] | None = None
) -> Any:
    """Return a function that fails with this errno when its arguments fulfil the condition, and else makes the call."""

    def act(*arguments: Any) -> Any:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        assert call is not None
        return call(*arguments)

    return act


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EACCES", "EBADF", "ENOSYS"])
def test_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    synced: list[int] = []

    def is_folder(descriptor: int) -> bool:
        synced.append(descriptor)
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)

    monkeypatch.setattr(atomic_files.os, "fsync", refuse(getattr(errno, name), is_folder, os.fsync))
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and len(synced) == 2
    monkeypatch.setattr(atomic_files.os, "fsync", refuse(errno.EIO, is_folder, os.fsync))
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a", "new")


def target_exists(source: Any, target: Any, *others: Any) -> bool:
    return Path(target).exists()


REFUSALS = ["EACCES", "EBUSY", "ETXTBSY", "EPERM", "EEXIST"]


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("name", REFUSALS)
def test_file_that_cannot_be_replaced_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, durable: bool
) -> None:
    write_text(tmp_path / "a", "old")
    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, refuse(getattr(errno, name), target_exists, getattr(os, call)))
    with replacing(tmp_path / "a", durable=durable) as file:
        file.write(b"new")
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_file_that_is_open_is_replaced_when_its_readers_have_closed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can't be moved aside either, as on Windows shares."""
    write_text(tmp_path / "a", "old")
    waits_s: list[float] = []
    monkeypatch.setattr(atomic_files.time, "monotonic", lambda: sum(waits_s))
    monkeypatch.setattr(atomic_files.time, "sleep", waits_s.append)
    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, refuse(errno.EACCES, lambda *others: sum(waits_s) < 3, getattr(os, call)))
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and 3 <= sum(waits_s) < 3.5
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["EPERM", "ENOSYS"])
def test_file_system_without_renames_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(atomic_files, "_IN_USE_S", 0.0)
    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, refuse(getattr(errno, name)))
    with pytest.raises(WriteError, match=rf"/a: {os.strerror(getattr(errno, name))} \(errno \d+\)$"):
        write_text(tmp_path / "a", "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", REFUSALS)
def test_file_that_stays_open_is_a_user_error_and_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_text(tmp_path / "a", "old")
    waits_s: list[float] = []
    monkeypatch.setattr(atomic_files.time, "monotonic", lambda: sum(waits_s))
    monkeypatch.setattr(atomic_files.time, "sleep", waits_s.append)
    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, refuse(getattr(errno, name)))
    with pytest.raises(WriteError, match=r"can't write .*/a: .*; is the file open in another program\?"):
        write_text(tmp_path / "a", "new")
    assert 10 <= sum(waits_s) < 11
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_file_is_moved_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a", "old")
    is_new = [True]  # whether the next rename to `a` is that of the new file

    def is_refused(source: Any, target: Any) -> bool:
        return Path(target).name == "a" and is_new.pop() if is_new else False

    monkeypatch.setattr(os, "replace", refuse(errno.EACCES, target_exists, os.replace))
    monkeypatch.setattr(os, "rename", refuse(errno.EIO, is_refused, os.rename))
    with pytest.raises(WriteError, match="Permission denied"), replacing(tmp_path / "a", durable=False) as file:
        file.write(b"new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_several_writers_of_a_file_that_cannot_be_replaced_all_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(atomic_files, "_READER_S", 0.0)
    monkeypatch.setattr(atomic_files, "_POLL_S", 0.001)
    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, refuse(errno.EACCES, target_exists, getattr(os, call)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: write_text(tmp_path / "a", f"{number}", f"fold{number}"), range(16)))
    for number in range(16):
        remove_leftovers(tmp_path / "a", f"fold{number}")
    assert int((tmp_path / "a").read_text()) in range(16)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_file_that_a_killed_process_had_moved_aside_is_moved_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a", "old")
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(target).name == "a":
            raise SystemExit("killed")
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", refuse(errno.EACCES, target_exists, os.replace))
        patch.setattr(os, "rename", rename)
        with replacing(tmp_path / "a", durable=False) as file:
            file.write(b"new")
    assert not (tmp_path / "a").exists()
    remove_leftovers(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def take_place(monkeypatch: pytest.MonkeyPatch, tries: int) -> None:
    """Have another process write the file `a` just after each of the first `tries` times that it is moved aside."""
    left = [None] * tries
    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, refuse(errno.EACCES, target_exists, getattr(os, call)))
    refusing = os.rename

    def rename(source: Any, target: Any) -> None:
        refusing(source, target)
        if Path(source).name == "a" and left:
            left.pop()
            Path(source).write_text("other")

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize("can_be_removed", [True, False])
def test_file_that_another_process_writes_while_the_earlier_one_is_aside_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_be_removed: bool
) -> None:
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(atomic_files, "_READER_S", 0.0)
    monkeypatch.setattr(atomic_files, "_IN_USE_S", 0.2)
    monkeypatch.setattr(atomic_files, "_POLL_S", 0.001)
    take_place(monkeypatch, tries=2)
    with monkeypatch.context() as patch:
        if not can_be_removed:
            patch.setattr(os, "unlink", refuse(errno.EACCES))
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    remove_leftovers(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_newest_of_several_files_that_were_moved_aside_is_moved_back(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "c", "a")):  # neither by name nor by the order of creation
        aside = tmp_path / f".a.0123abc{name}-{name}000.old.tmp"
        aside.write_text(name)
        os.utime(aside, (1000 - (number - 1) ** 2, 1000 - (number - 1) ** 2))
    remove_leftovers(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "c"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_of_a_folder_that_were_moved_aside_are_moved_back(tmp_path: Path) -> None:
    folder = tmp_path / "oof" / "views"
    folder.mkdir(parents=True)
    (tmp_path / ".launch.json.0123abcd-0a1b.old.tmp").write_text("launch")
    (tmp_path / ".metrics.jsonl.fold1-0123abcd-0a1b.old.tmp").write_text("metrics")
    (tmp_path / ".metrics.jsonl.fold2-0123abcd.tmp").write_text("is being written")
    (folder / ".fold0.safetensors.0123abcd-0a1b.old.tmp").write_text("views")
    (folder / "fold1.safetensors").write_text("new")
    (folder / ".fold1.safetensors.0123abcd-0a1b.old.tmp").write_text("old")
    restore_files(tmp_path)
    files = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "launch.json": "launch",
        "metrics.jsonl": "metrics",
        ".metrics.jsonl.fold2-0123abcd.tmp": "is being written",
        "oof/views/fold0.safetensors": "views",
        "oof/views/fold1.safetensors": "new",
    }
    restore_files(tmp_path / "nowhere")


def test_exit_while_a_file_is_aside_moves_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process exits, in another thread, between the two renames."""
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "replace", refuse(errno.EACCES, target_exists, os.replace))
    refusing, found = refuse(errno.EACCES, target_exists, os.rename), dict[str, str]()

    def rename(source: Any, target: Any) -> None:
        refusing(source, target)
        if Path(source).name == "a":
            with monkeypatch.context() as patch:
                patch.setattr(os, "_exit", lambda code: None)
                signals._exit("killed", 130)
            found.update((path.name, path.read_text()) for path in tmp_path.iterdir())

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Permission denied"), replacing(tmp_path / "a", durable=False) as file:
        file.write(b"new")
    assert found == {"a": "old"}


def test_reader_waits_for_a_file_that_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = tmp_path / ".a.fold1-0123abcd-0a1b.old.tmp"
    aside.write_text("ü")
    waits_s: list[float] = []

    def sleep(seconds: float) -> None:
        waits_s.append(seconds)
        if len(waits_s) == 3:
            aside.rename(tmp_path / "a")

    monkeypatch.setattr(atomic_files.time, "monotonic", lambda: sum(waits_s))
    monkeypatch.setattr(atomic_files.time, "sleep", sleep)
    assert read_text(tmp_path / "a") == "ü" and len(waits_s) == 3
    waits_s.clear()
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "b")
    assert not waits_s, "nothing is aside"
    (tmp_path / ".b.0123abcd-0a1b.old.tmp").touch()
    monkeypatch.setattr(atomic_files.time, "sleep", waits_s.append)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "b")
    assert 1 <= sum(waits_s) < 1.1
