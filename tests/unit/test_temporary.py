"""Temporary folders and the folder of sockets, for any TMPDIR."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from doccls.errors import RankLocalError
from doccls.system import temporary
from doccls.system.temporary import avoid_spaces, choose_socket_folder, temporary_folder

# A program that makes the socket of a fork server and prints its address.
_PROGRAM = """
from multiprocessing.connection import Listener
from doccls.system.temporary import place_sockets
place_sockets()
with Listener(family="AF_UNIX") as listener:
    print(listener.address)
"""


@pytest.fixture
def tmpdir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a folder whose path is too long for sockets, in TMPDIR; tempfile asks for its default anew."""
    folder = tmp_path / ("scratch of the job #1 100% " + "x" * 80)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_sockets_are_bound_elsewhere_if_the_path_is_too_long(tmpdir: Path) -> None:
    assert choose_socket_folder() == Path("/tmp")
    with temporary_folder("some-") as folder:
        assert folder.parent == tmpdir  # for files it is long enough
    assert not folder.exists()


def test_sockets_are_bound_in_tmpdir_if_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="a #b %20 ", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert choose_socket_folder() == Path(folder)
        assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("name", ["missing", "file"])
def test_unusable_tmpdir_is_not_used(tmpdir: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmpdir / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmpdir / name))
    assert choose_socket_folder() == Path("/tmp")
    with temporary_folder("some-") as folder:
        assert folder.parent == Path("/tmp")


def test_error_names_tmpdir_and_each_folder_with_its_problem(tmpdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "_SHORT_FOLDERS", (str(tmpdir / "missing"),))
    with pytest.raises(RankLocalError) as caught:
        choose_socket_folder()
    assert f"{tmpdir}: AF_UNIX path too long; {tmpdir}/missing: No such file or directory" in str(caught.value)
    assert "Set TMPDIR to" in str(caught.value)


def test_error_without_any_temporary_folder_names_tmpdir(tmpdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/a']")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(RankLocalError, match="Set TMPDIR to") as caught, temporary_folder("some-"):
        pass
    assert f"(TMPDIR={tmpdir}): No usable temporary directory found in ['/a']" in str(caught.value)
    monkeypatch.setattr(temporary, "_SHORT_FOLDERS", ())
    with pytest.raises(RankLocalError, match="can't be written to"):
        choose_socket_folder()


def test_multiprocessing_binds_its_sockets_there(tmpdir: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("/tmp/pymp-") and done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).parent.exists() and list(tmpdir.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "it's", "tab\t"])
def test_temporary_files_leave_a_folder_that_compilers_can_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(temporary, "_SHORT_FOLDERS", (str(tmp_path / "missing"),))
    avoid_spaces()
    assert tempfile.gettempdir() == str(tmp_path / name)
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name / "torchinductor_me"))
    avoid_spaces()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == "/tmp"


def test_temporary_files_stay_in_a_folder_without_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    avoid_spaces()
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path)
