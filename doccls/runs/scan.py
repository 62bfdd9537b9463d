"""The folders of runs, and which files are in them; no file is read, and no link is followed."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from doccls.config.paths import describe_error
from doccls.run.paths import DAY


@dataclass(frozen=True)
class RunFolders:
    """The folders in an experiments folder that may be runs, and what was left out."""

    folders: tuple[Path, ...]  # sorted
    links: tuple[Path, ...]  # in the place of a day's or a run's folder
    problems: tuple[str, ...]  # days that can't be listed, in words


@dataclass(frozen=True)
class FileEntry:
    """A regular file."""

    size_bytes: int  # its length, not rounded up to blocks
    modified_s: float  # seconds since 1970


@dataclass(frozen=True)
class FolderScan:
    """What is in a run's folder. Names are relative to it, with slashes."""

    files: dict[str, FileEntry]
    links: frozenset[str]
    size_bytes: int  # of all files; hard links count once, symbolic links not at all
    problems: tuple[str, ...]  # folders that can't be listed, in words


def list_run_folders(exp_dir: Path) -> RunFolders:
    """List the folders `YYYYMMDD/<run_id>`.

    Raises:
        OSError: the folder can't be listed.
    """
    days, links = _list_subfolders(exp_dir)
    folders: list[Path] = []
    problems: list[str] = []
    links = [day for day in links if DAY.fullmatch(day.name)]
    for day in days:
        if DAY.fullmatch(day.name):
            try:
                found, found_links = _list_subfolders(day)
            except OSError as error:
                problems.append(describe_error(error, day, "folder"))
                continue
            folders += found
            links += found_links
    return RunFolders(tuple(folders), tuple(links), tuple(problems))


def _list_subfolders(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the subfolders and the links, each sorted."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    folders = [folder / entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    return folders, [folder / entry.name for entry in found if entry.is_symlink()]


def scan_folder(root: Path) -> FolderScan:
    """List all files below the folder."""
    files: dict[str, FileEntry] = {}
    links: set[str] = set()
    problems: list[str] = []
    counted: set[tuple[int, int]] = set()
    size_bytes = 0
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix) as entries:
                found = _read_states(prefix, entries)
        except OSError as error:
            problems.append(describe_error(error, root / prefix, "folder"))
            continue
        for name, state in found:
            if stat.S_ISDIR(state.st_mode):
                pending.append(f"{name}/")
            elif stat.S_ISLNK(state.st_mode):
                links.add(name)
            elif stat.S_ISREG(state.st_mode):
                files[name] = FileEntry(state.st_size, state.st_mtime)
                if (state.st_dev, state.st_ino) not in counted:
                    counted.add((state.st_dev, state.st_ino))
                    size_bytes += state.st_size
    return FolderScan(files, frozenset(links), size_bytes, tuple(sorted(problems)))


def _read_states(prefix: str, entries: Iterable[os.DirEntry[str]]) -> list[tuple[str, os.stat_result]]:
    states = []
    for entry in entries:
        with suppress(FileNotFoundError):  # a process that works on the run has just removed it
            states.append((f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)))
    return states
