"""A name and a home folder for a user whom the machine does not know, as with `docker run --user 12345`."""

import os
import stat
import sys
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

_NAME_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # in which `getpass.getuser` looks


def complete_user(environment: MutableMapping[str, str]) -> None:
    """Set USER and HOME if neither the environment nor the machine's list of users states them.

    Libraries ask for them: without, some raise, and others create a folder called `~`. The home folder is one that only
    this user may enter, for temporary files; caches in it outlast the process.
    """
    if sys.platform == "win32" or _is_known():
        return
    uid = os.getuid()
    if not any(environment.get(name) for name in _NAME_VARIABLES):
        environment["USER"] = f"uid{uid}"
    if not environment.get("HOME"):
        with suppress(OSError):  # no folder for temporary files: whoever needs one will say so
            environment["HOME"] = str(_make_home(uid))


def _is_known() -> bool:
    import pwd  # not on Windows

    try:
        return bool(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return False


def _make_home(uid: int) -> Path:
    """Return the user's folder among the temporary ones, or a new one if that belongs to somebody else."""
    folder = Path(tempfile.gettempdir(), f"doccls-home-{uid}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
