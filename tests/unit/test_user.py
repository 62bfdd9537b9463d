"""A name and a home folder for a user without an entry in the machine's list of users."""

import os
import tempfile
from pathlib import Path

import pytest

from doccls.system import user
from doccls.system.user import complete_user


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make the user unknown, and return the home folder to expect."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(user, "_is_known", lambda: False)
    return tmp_path / f"doccls-home-{os.getuid()}"


def test_unknown_user_gets_a_name_and_a_private_folder(home: Path) -> None:
    for _ in range(2):  # the second process uses the same folder
        environment = {"HOME": ""}
        complete_user(environment)
        assert environment == {"USER": f"uid{os.getuid()}", "HOME": str(home)}
    assert home.stat().st_mode & 0o777 == 0o700


def test_stated_name_and_home_are_kept(home: Path) -> None:
    environment = {"LOGNAME": "me", "HOME": "/read-only"}
    complete_user(environment)
    assert environment == {"LOGNAME": "me", "HOME": "/read-only"} and not home.exists()


def test_known_user_needs_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user, "_is_known", lambda: True)
    environment: dict[str, str] = {}
    complete_user(environment)
    assert environment == {} and not home.exists()


@pytest.mark.parametrize("kind", ["open to others", "link"])
def test_folder_that_others_may_have_made_is_not_used(home: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "other").mkdir()
    if kind == "link":
        home.symlink_to(tmp_path / "other")
    else:
        home.mkdir()
        home.chmod(0o777)
    environment: dict[str, str] = {}
    complete_user(environment)
    assert environment["HOME"].startswith(f"{home}-") and Path(environment["HOME"]).stat().st_mode & 0o777 == 0o700


def test_without_temporary_folder_there_is_no_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(home / "missing"))
    environment: dict[str, str] = {}
    complete_user(environment)
    assert environment == {"USER": f"uid{os.getuid()}"}
