"""Paths as users state them: expanded and resolved, and what is wrong with them in words.

`Path.exists`, `is_file`, `resolve` and `glob` raise for some paths (a loop of links, a name that is too long, a folder
without permission), so paths that a user states are only inspected by the functions here.
"""

import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from doccls.errors import UserError

PathKind = Literal["file", "config file", "folder", "run folder"]
_FILE_KINDS = ("file", "config file")
RELATIVE_RULE = "paths in a config are relative to the config file"
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095  # of Linux; the second without the final NUL
_MARGIN_BYTES = 256  # for the names of files in an output folder
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)\}|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class PathError(UserError):
    """A stated path can't be made absolute; the message is the reason, without the path."""


# --- from what is stated to an absolute path -------------------------------------------------------------------------


def resolve_path(
    stated: str,
    base: Path | None = None,
    variables: Mapping[str, str] | None = None,
    follows_broken_links: bool = False,
) -> Path:
    """Expand `~` and variables, make the path absolute and follow its links; it need not exist.

    Args:
        stated: the path as the user wrote it.
        base: the folder that it is relative to; None: the working directory.
        variables: the values of `$NAME` and `${NAME}`; None: `$` is an ordinary character.
        follows_broken_links: give the target of a link even if it does not exist, as a folder to create; otherwise the
            link stays, so that a message about it names what the user stated.

    Raises:
        PathError: a variable is unset, the home folder or the working directory is unknown, or a character can't be
            part of a path.
    """
    if "\0" in stated:
        raise PathError("a path can't contain a NUL character")
    expanded = _expand_home(stated, base)
    if variables is not None:
        expanded = _expand_home(_expand_variables(expanded, base, variables), base)
    try:
        absolute = Path(os.path.abspath(expanded if base is None else base / expanded))  # noqa: PTH100 (collapses `..`)
        str(absolute).encode()
        resolved = _follow_links(expanded if base is None else base / expanded, absolute)
        str(resolved).encode()
    except UnicodeEncodeError as error:
        raise PathError(_describe_encoding(expanded if base is None else str(base / expanded))) from error
    except FileNotFoundError as error:
        raise PathError(
            "the working directory no longer exists: change to another one, or state an absolute path"
        ) from error
    if follows_broken_links or os.path.lexists(resolved):
        return resolved
    has_broken_link = any(_is_broken_link(part) for part in (absolute, *absolute.parents))
    return absolute if has_broken_link else resolved


def resolve_option(path: Path, option: str) -> Path:
    """Make a path of the command line absolute.

    Raises:
        UserError: it can't be; names the option and the path.
    """
    try:
        return resolve_path(str(path))
    except PathError as error:
        raise UserError(f"{option} {format_path(path)}: {error}") from error


def leave_deleted_folder() -> None:
    """Change to the root folder if the working directory no longer exists: MKL, which torch loads, can't start there.

    Call it once all paths of the command line are absolute.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        os.chdir("/")


def _expand_home(stated: str, base: Path | None) -> str:
    expanded = os.path.expanduser(stated)  # noqa: PTH111 (Path takes the `~x` of `./~x` for a user)
    if stated.startswith("~") and expanded == stated and not os.path.lexists(stated if base is None else base / stated):
        user = stated.partition("/")[0]
        raise PathError(f"the home folder {user} is unknown" + (": the variable HOME is not set" * (user == "~")))
    return expanded


def _expand_variables(stated: str, base: Path | None, variables: Mapping[str, str]) -> str:
    """Replace variables, except in a name that exists as it is written, such as the folder `a$b`."""
    for match in _VARIABLE.finditer(stated):
        if "/" in match[0]:  # as in `${NAME:-/default}`
            _find_value(match, variables)
    expanded = ""
    for index, name in enumerate(stated.split("/")):
        prefix = f"{expanded}/" if index else ""
        if _VARIABLE.search(name) and not os.path.lexists(Path(base or "", prefix + name)):
            name = _VARIABLE.sub(lambda match: _find_value(match, variables), name)
        expanded = prefix + name
    return expanded


def _follow_links(path: str | Path, absolute: Path) -> Path:
    """Return the path without links; `absolute` if a link on the way may not be read, which a check then reports."""
    try:
        return Path(os.path.realpath(path))
    except PermissionError:
        return absolute


def _is_broken_link(path: Path) -> bool:
    try:
        if not path.is_symlink():
            return False
        path.stat()
    except OSError:
        return True
    return False


def _describe_encoding(path: str) -> str:
    """Return why a path can't be recorded as UTF-8: its bytes are not, or this locale's file names are not."""
    encoding = sys.getfilesystemencoding()
    with suppress(UnicodeEncodeError):  # it has characters that the locale lacks
        try:
            path.encode(encoding, "surrogateescape").decode()
        except UnicodeDecodeError:
            encoding = "utf-8"
    if encoding == "utf-8":
        return "not valid UTF-8, and files of a run record paths as UTF-8: rename that folder"
    name = next((name for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), None)
    stated = "LC_ALL, LC_CTYPE and LANG are not set" if name is None else f"{name}={os.environ[name]}"
    return (
        f"the locale ({stated}) reads file names as {encoding.upper()}, which lacks characters of this path: set "
        "PYTHONUTF8=1, or choose a locale of UTF-8 such as LC_ALL=C.UTF-8"
    )


def _find_value(match: re.Match[str], variables: Mapping[str, str]) -> str:
    name = match["bare"] or match["braced"] or ""
    if not _NAME.fullmatch(name):
        raise PathError(f"{match[0]} is not a variable: only $NAME and ${{NAME}} are replaced")
    if not variables.get(name):
        raise PathError(f"the environment variable {name} is {'empty' if name in variables else 'not set'}")
    return variables[name]


# --- what stands at a path -------------------------------------------------------------------------------------------


def find_problem(path: Path, kind: PathKind) -> str | None:
    """Return why the file can't be read or the folder not be listed, with its path; None if it can be.

    Nothing is read: a FIFO or a device, which might block, is not a file.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) if kind in _FILE_KINDS else stat.S_ISDIR(mode)):
            return f"not a {kind}: {format_path(path)} (it is {_name_type(mode)})"
        if kind in _FILE_KINDS:
            path.open("rb").close()
        else:
            os.scandir(path).close()
    except (OSError, ValueError) as error:
        return describe_error(error, path, kind)
    if kind not in _FILE_KINDS and not _has_access(path, os.X_OK):
        return f"no permission to use the files in it: {format_path(path)}"
    return None


def find_output_problem(path: Path) -> str | None:
    """Return why no file can be written into the folder, which need not exist yet; None if nothing is known."""
    if len(os.fsencode(path)) > _MAX_PATH_BYTES - _MARGIN_BYTES:
        return f"too long: {format_path(path)} (with the names of its files over {_MAX_PATH_BYTES} bytes)"
    for folder in (path, *path.parents):
        try:
            mode = folder.stat().st_mode
        except FileNotFoundError as error:
            if folder.is_symlink():
                return describe_error(error, folder, "folder")
            continue
        except (OSError, ValueError) as error:
            return describe_error(error, path, "folder")
        if not stat.S_ISDIR(mode):
            return f"not a folder: {format_path(folder)} (it is {_name_type(mode)})"
        if not _has_access(folder, os.W_OK | os.X_OK):
            return f"no permission to write into {format_path(folder)}"
        names = path.relative_to(folder).parts
        too_long = next((name for name in names if len(os.fsencode(name)) > _MAX_NAME_BYTES), None)
        return None if too_long is None else f"too long: {format_path(path)} ({_describe_length(path)})"
    return f"no such folder: {format_path(path)}"


def find_file_output_problem(
    output: Path, kind: str, suffix: str, earlier: str, is_earlier: Callable[[Path], bool]
) -> str | None:
    """Return why a page or picture that a user asks for can't be written; None if it can be.

    Args:
        output: the path of the file.
        kind: what it is, as in `the report's name`.
        suffix: how its name must end.
        earlier: what it may replace, as in `exists and is not an earlier report`.
        is_earlier: whether the file that exists is such a one.
    """
    shown = format_path(output)
    if output.suffix.lower() != suffix:
        return f"the {kind}'s name must end in {suffix}: {shown}"
    problem = find_problem(output.parent, "folder") or find_output_problem(output.parent)
    if problem is not None or is_absent(output):
        return problem
    problem = find_problem(output, "file")
    if problem is None and not is_earlier(output):
        problem = f"{shown} exists and is not an earlier {earlier}: remove it or choose another name"
    return problem


def check_paths(
    inputs: Mapping[str, tuple[Path | None, PathKind]] = MappingProxyType({}),
    outputs: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Check that each config key's file or folder can be read, and that files can be written into each output folder.

    Raises:
        UserError: some can't be; lists each with its key and absolute path.
    """
    found = {key: "not set" if path is None else find_problem(path, kind) for key, (path, kind) in inputs.items()}
    found |= {key: find_output_problem(path) for key, path in outputs.items()}
    problems = [f"{key}: {problem}" for key, problem in found.items() if problem is not None]
    if problems:
        raise UserError("\n".join([*problems, f"({RELATIVE_RULE})"]))


def is_absent(path: Path) -> bool:
    """Return whether there is plainly nothing at the path, not even a broken link."""
    try:
        path.stat()
    except FileNotFoundError:
        return not any(part.is_symlink() for part in (path, *path.parents))
    except (OSError, ValueError):
        return False
    return False


def is_file(path: Path) -> bool:
    """Return whether there is a regular file.

    Raises:
        UserError: that can't be known, as in a folder without permission.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(describe_error(error, path, "file")) from error


def is_folder(path: Path) -> bool:
    """Return whether there is a folder; False also where that can't be known."""
    mode = _find_mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _find_mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return None


def list_entries(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of all files and of all subfolders, in no order; a broken link counts as a file.

    Raises:
        OSError: there is no such folder, or it can't be listed.
    """
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            (folders if _leads_to_folder(entry) else files).append(entry.name)
    return files, folders


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links, a link into a folder without permission
        return False


def list_matching(folder: Path, pattern: str) -> list[Path]:
    """Return the regular files whose entire name matches the regular expression, sorted by name; none without a folder.

    Raises:
        UserError: the folder can't be listed.
    """
    try:
        names = sorted(name for name in list_entries(folder)[0] if re.fullmatch(pattern, name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(describe_error(error, folder, "folder")) from error
    return [folder / name for name in names if stat.S_ISREG(_find_mode(folder / name) or 0)]


def read_regular_file(path: Path) -> tuple[os.stat_result, bytes]:
    """Return the state of a regular file just before it was read, and its bytes.

    Raises:
        OSError: it can't be read, or is a FIFO, a device or the like, which might block; `strerror` says which.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, f"not a file: it is {_name_type(state.st_mode)}", str(path))
    return state, path.read_bytes()


# --- wording ---------------------------------------------------------------------------------------------------------


def format_path(path: Path) -> str:
    """Return the path as text; in quotes and with escapes if it has line breaks or bytes that are not UTF-8."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def describe_error(error: OSError | ValueError, path: Path, kind: PathKind) -> str:
    """Describe an error of a system call about the path in words, with the path and the part of it that is at fault."""
    shown = format_path(path)
    if not isinstance(error, OSError):  # from the conversion of the path to bytes
        return f"not a valid path: {shown} ({error})"
    match error.errno:
        case errno.ENOTDIR if (found := _find_mode(path)) is not None:  # it was listed as a folder
            return f"not a {kind}: {shown} (it is {_name_type(found)})"
        case errno.ENOENT | errno.ENOTDIR:
            note = _describe_absence(path)
            return f"no such {kind}: {shown}{f' ({note})' if note else ''}"
        case errno.ELOOP:
            return f"a loop of symbolic links: {shown}"
        case errno.ENAMETOOLONG:
            return f"too long: {shown} ({_describe_length(path)})"
        case errno.EACCES | errno.EPERM:
            closed = next((folder for folder in reversed(path.parents) if not _has_access(folder, os.X_OK)), None)
            return f"no permission: {shown}" + (f" ({format_path(closed)} may not be entered)" if closed else "")
    return f"can't be used: {shown} ({error.strerror or error})"


def _describe_absence(path: Path) -> str:
    """Return which part of the path is at fault; empty if just its last name is missing."""
    for part in (*reversed(path.parents), path):
        try:
            mode = part.stat().st_mode
        except OSError:
            if part.is_symlink():
                return f"{format_path(part)} is a link to {format_path(part.readlink())}, which does not exist"
            return f"there is no {format_path(part)}" if part != path else ""
        if not stat.S_ISDIR(mode):
            return f"{format_path(part)} is {_name_type(mode)}"
    return ""


def _describe_length(path: Path) -> str:
    longest = max(len(os.fsencode(name)) for name in path.parts)
    if longest > _MAX_NAME_BYTES:
        return f"a name in it has {longest} bytes, and at most {_MAX_NAME_BYTES} are allowed"
    return f"it has {len(os.fsencode(path))} bytes, and at most {_MAX_PATH_BYTES} are allowed"


def _name_type(mode: int) -> str:
    names = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return names.get(stat.S_IFMT(mode), "of another kind")


def _has_access(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)
