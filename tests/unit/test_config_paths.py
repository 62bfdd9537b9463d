"""Paths that users state: how they are expanded, and what is wrong with them, in words."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from doccls.config.paths import (
    PathError,
    check_paths,
    find_output_problem,
    find_problem,
    list_entries,
    list_matching,
    read_regular_file,
    resolve_option,
    resolve_path,
)
from doccls.errors import UserError

# --- from what is stated to an absolute path -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "resolved"),
    [
        ("$DATA/train.csv", "/mnt/pages/train.csv"),
        ("${DATA}/train.csv", "/mnt/pages/train.csv"),
        ("${DATA}.csv", "/mnt/pages.csv"),
        ("x/$SET/y$SET", "BASE/x/v2/yv2"),
        ("$LITERAL/x", "BASE/$SET/x"),  # a value is not expanded again
        ("a$b/${c}/x", "BASE/a$b/${c}/x"),  # these folders exist
        ("a$b/$SET", "BASE/a$b/v2"),
        ("cost$/5$/$1", "BASE/cost$/5$/$1"),  # no variables
        ("$HOMELY/x", "HOME/x"),
        ("~/$SET", "HOME/v2"),
        ("./~user", "BASE/~user"),
    ],
)
def test_variables_are_expanded_except_in_names_that_exist(tmp_path: Path, stated: str, resolved: str) -> None:
    (tmp_path / "a$b" / "${c}").mkdir(parents=True)
    variables = {"DATA": "/mnt/pages", "SET": "v2", "LITERAL": "$SET", "HOMELY": "~"}
    expected = resolved.replace("BASE", str(tmp_path)).replace("HOME", os.path.realpath(Path.home()))
    assert str(resolve_path(stated, tmp_path, variables)) == expected


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ("$UNSET/x", "the environment variable UNSET is not set"),
        ("x/${UNSET}", "the environment variable UNSET is not set"),
        ("$EMPTY/x", "the environment variable EMPTY is empty"),
        ("${UNSET:-/x}", "only $NAME and ${NAME}"),
        ("${}", "only $NAME and ${NAME}"),
        ("~nosuchuser4711/x", "the home folder ~nosuchuser4711 is unknown"),
        ("a\0b", "NUL"),
        ("\udcff", "not valid UTF-8"),
        ("\ud800", "not valid UTF-8"),
    ],
)
def test_paths_that_can_not_be_expanded_are_refused_with_reason(tmp_path: Path, stated: str, reason: str) -> None:
    with pytest.raises(PathError) as caught:
        resolve_path(stated, tmp_path, {"EMPTY": ""})
    assert reason in str(caught.value)


@pytest.mark.parametrize("stated", ["\udcc3\udca9/x", "é"])
def test_locale_without_the_characters_of_a_path_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str
) -> None:
    """With LC_ALL=POSIX, Python may take file names for ASCII: `é` has the bytes C3 A9."""

    def look_up(path: object, *_: object, **__: object) -> str:
        return str(path).encode("ascii", "surrogateescape").decode("ascii", "surrogateescape")

    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(os.path, "realpath", look_up)
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PathError, match=r"LC_ALL, LC_CTYPE and LANG are not set.* reads file names as ASCII"):
        resolve_path(stated, tmp_path)
    monkeypatch.setenv("LANG", "POSIX")
    with pytest.raises(PathError, match=r"\(LANG=POSIX\) .*: set PYTHONUTF8=1, or choose a locale of UTF-8 such as"):
        resolve_path(stated, tmp_path)
    with pytest.raises(PathError, match="not valid UTF-8"):
        resolve_path("\udcff", tmp_path)


def test_dollar_is_ordinary_character_without_variables(tmp_path: Path) -> None:
    assert resolve_path("$UNSET/${x}", tmp_path) == tmp_path / "$UNSET" / "${x}"


def test_home_of_unknown_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(PathError, match="HOME is not set"):
        resolve_path("~/x", Path("/"))


def test_relative_path_in_deleted_folder_is_refused_and_absolute_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(PathError, match="working directory no longer exists"):
        resolve_path("x")
    assert resolve_path("/x") == Path("/x") and resolve_path("x", tmp_path) == tmp_path / "x"


def test_loops_and_long_names_resolve_so_that_their_key_can_be_reported(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert resolve_path("loop/x", tmp_path).name == "x"
    assert resolve_path("y" * 300, tmp_path) == tmp_path / ("y" * 300)


# --- what stands at a path -------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Return a folder with an entry of each kind."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop2")
    (tmp_path / "loop2").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket has at most 107 bytes
        server.bind("socket")
        os.chdir(here)
    return tmp_path


KINDS = [
    ("gone", "no such file: PATH", "no such folder: PATH"),
    ("gone/x", "no such file: PATH (there is no BASE/gone)", "no such folder: PATH (there is no BASE/gone)"),
    ("file", None, "not a folder: PATH (it is a file)"),
    ("folder", "not a file: PATH (it is a folder)", None),
    ("file/x", "no such file: PATH (BASE/file is a file)", "no such folder: PATH (BASE/file is a file)"),
    ("fifo", "not a file: PATH (it is a FIFO)", "not a folder: PATH (it is a FIFO)"),
    ("socket", "not a file: PATH (it is a socket)", "not a folder: PATH (it is a socket)"),
    ("/dev/zero", "not a file: PATH (it is a device)", "not a folder: PATH (it is a device)"),
    ("loop", "a loop of symbolic links: PATH", "a loop of symbolic links: PATH"),
    ("loop/x", "a loop of symbolic links: PATH", "a loop of symbolic links: PATH"),
    ("broken", "no such file: PATH (PATH is a link to nowhere, which does not exist)", "no such folder: PATH (PATH is"),
    ("y" * 256, "too long: PATH (a name in it has 256 bytes, and at most 255", "too long: PATH (a name in it has 256"),
    ("é" * 128, "too long: PATH (a name in it has 256 bytes", "too long: PATH (a name in it has 256 bytes"),
    ("y/" * 2100 + "z", "too long: PATH (it has ", "too long: PATH (it has "),
    ("a\nb", "no such file: QUOTED", "no such folder: QUOTED"),
]


@pytest.mark.parametrize(("name", "as_file", "as_folder"), KINDS, ids=[name[:9] for name, *_ in KINDS])
def test_problem_of_each_kind_is_described(places: Path, name: str, as_file: str | None, as_folder: str | None) -> None:
    path = places / name
    for kind, expected in (("file", as_file), ("folder", as_folder)):
        problem = find_problem(path, kind)  # type: ignore[arg-type]
        if expected is None:
            assert problem is None
        else:
            texts = {"PATH": str(path), "BASE": str(places), "QUOTED": repr(str(path))}
            for text, value in texts.items():
                expected = expected.replace(text, value)
            assert problem is not None and problem.startswith(expected)


def test_errors_name_each_key(places: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_paths({"a": (places, "file"), "b": (places / "file", "folder"), "c": (None, "file")})
    assert str(caught.value).splitlines() == [
        f"a: not a file: {places} (it is a folder)",
        f"b: not a folder: {places / 'file'} (it is a file)",
        "c: not set",
        "(paths in a config are relative to the config file)",
    ]
    check_paths({"a": (places, "folder"), "b": (places / "file", "file")})


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("folder", None),
        ("folder/new/deeper", None),
        ("file", "not a folder: BASE/file (it is a file)"),
        ("file/x", "no such folder: BASE/file/x (BASE/file is a file)"),
        ("fifo", "not a folder: BASE/fifo (it is a FIFO)"),
        ("loop", "a loop of symbolic links: BASE/loop"),
        ("broken/x", "no such folder: BASE/broken (BASE/broken is a link to nowhere"),
        ("y" * 256, "too long: BASE/"),
        ("new/" + "y" * 256, "too long: BASE/new/"),
        ("y/" * 2100, "too long: BASE/y"),
    ],
)
def test_problem_of_output_folder_is_known_before_it_is_created(places: Path, name: str, problem: str | None) -> None:
    found = find_output_problem(places / name)
    assert (found is None) if problem is None else (found or "").startswith(problem.replace("BASE", str(places)))
    assert not (places / "folder" / "new").exists()
    if problem is not None:
        with pytest.raises(UserError, match=r"^output\.exp_dir: "):
            check_paths({}, {"output.exp_dir": places / name})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_missing_permission_is_reported_with_folder_at_fault(tmp_path: Path) -> None:
    for name, mode in (("closed", 0o700), ("unlisted", 0o711), ("unentered", 0o744), ("fine", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
        (tmp_path / name).chmod(mode)
    (tmp_path / "fine" / "secret").touch(mode=0o600)
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        found = [
            find_problem(tmp_path / "closed" / "x", "file"),
            find_problem(tmp_path / "fine" / "secret", "file"),
            find_problem(tmp_path / "unlisted", "folder"),
            find_problem(tmp_path / "unentered", "folder"),
            find_problem(tmp_path / "unlisted" / "x", "file"),
            find_output_problem(tmp_path / "fine" / "new"),
        ]
    finally:
        os.seteuid(0)
    assert found == [
        f"no permission: {tmp_path / 'closed' / 'x'} ({tmp_path / 'closed'} may not be entered)",
        f"no permission: {tmp_path / 'fine' / 'secret'}",
        f"no permission: {tmp_path / 'unlisted'}",
        f"no permission to use the files in it: {tmp_path / 'unentered'}",
        None,
        f"no permission to write into {tmp_path / 'fine'}",
    ]


def test_existing_name_that_begins_with_tilde_is_taken_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "~runs4711").mkdir()
    assert resolve_path("~runs4711", tmp_path) == tmp_path / "~runs4711"
    monkeypatch.chdir(tmp_path)
    assert resolve_option(Path("~runs4711"), "RUN") == tmp_path / "~runs4711"


def test_link_that_may_not_be_read_is_left_to_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("doccls.config.paths.os.path.realpath", refuse)
    assert resolve_path("a/../b", tmp_path) == tmp_path / "b"


def test_parent_of_link_is_that_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "real" / "data").mkdir(parents=True)
    (tmp_path / "real" / "data" / "t.csv").touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to("../real/data")
    (tmp_path / "a" / "data").symlink_to("/nowhere4711")
    assert resolve_path("a/link/../data/t.csv", tmp_path) == tmp_path / "real" / "data" / "t.csv"


def test_listings_survive_entries_of_every_kind(places: Path) -> None:
    (places / os.fsdecode(b"\xff.jpg")).touch()
    assert set(list_entries(places)[0]) == {"file", "loop", "loop2", "broken", "fifo", "socket", "\udcff.jpg"}
    assert list_matching(places, "f.*|loop.*|broken|.*jpg") == [places / "file", places / "\udcff.jpg"]
    assert list_matching(places / "gone", ".*") == list_matching(places / "file", ".*") == []
    with pytest.raises(UserError, match="a loop of symbolic links"):
        list_matching(places / "loop", ".*")


@pytest.mark.parametrize(
    ("name", "reason"), [("fifo", "it is a FIFO"), ("folder", "it is a folder"), ("loop", "Too many")]
)
def test_only_regular_files_are_read(places: Path, name: str, reason: str) -> None:
    assert read_regular_file(places / "file")[1] == b"x"
    with pytest.raises(OSError, match=reason):
        read_regular_file(places / name)
