"""The provenance of a run for its snapshot: versions, commit, command, machine."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from doccls import __version__
from doccls.config.load import redact_argument

_PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "albumentations", "opencv-python-headless", "numpy",
    "pillow", "scikit-learn", "pydantic", "safetensors", "wandb",
)  # fmt: skip


def describe_software() -> dict[str, Any]:
    """Return the versions of Python and of packages that affect results, and the commit if doccls runs from git."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"doccls": __version__} | {name: _version(name) for name in _PACKAGES},
        "git_commit": read_git_commit(Path(__file__).resolve().parents[2]),
    }


def render_command(argv: Sequence[str]) -> str:
    """Return the command line as a shell would accept it, with secrets redacted."""
    return shlex.join([sys.executable, *(redact_argument(word) for word in argv)])


def read_git_commit(folder: Path) -> str | None:
    """Return the commit checked out in `folder`, with `-dirty` if files differ; None outside git or without git."""
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
