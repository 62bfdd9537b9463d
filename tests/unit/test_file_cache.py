"""Files are read again only once they have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from doccls.system.atomic_files import write_text
from launcher.file_cache import FileCache


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path, reads = tmp_path / "file", list[str]()

    def read(path: Path) -> str:
        reads.append(path.read_text() if path.exists() else "none")
        return reads[-1]

    cache = FileCache()
    assert [cache.read(path, read), cache.read(path, read)] == ["none", "none"]
    for text in ("one", "two"):  # of the same size, and perhaps of the same time
        write_text(path, text)
        assert [cache.read(path, read), cache.read(path, read)] == [text, text]
    path.unlink()
    assert cache.read(path, read) == "none"
    assert reads == ["none", "one", "two", "none"]


def test_readers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    cache = FileCache()
    assert cache.read(tmp_path, str) == str(tmp_path)
    assert cache.read(tmp_path, len_of_name) == len(tmp_path.name)


def len_of_name(path: Path) -> int:
    return len(path.name)


def test_an_error_is_not_kept(tmp_path: Path) -> None:
    cache, path = FileCache(), tmp_path / "file"
    path.write_text("x")

    def fail(path: Path) -> str:
        raise ValueError(path)

    for _ in range(2):
        with pytest.raises(ValueError):
            cache.read(path, fail)
