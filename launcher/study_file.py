"""study.json: which runs a study has, for commands that only look at it."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from doccls.config.paths import is_file
from doccls.errors import UserError
from doccls.run.paths import RunPaths

_NAME = "study.json"


@dataclass(frozen=True)
class StudyEntry:
    """A run of a study; its folder may not exist yet."""

    paths: RunPaths
    num_folds: int


@dataclass(frozen=True)
class StudyFile:
    """The runs of a study."""

    name: str
    folder: Path
    runs: tuple[StudyEntry, ...]

    @property
    def lock(self) -> Path:
        """The lock of the launcher of the study."""
        return self.folder / "study.lock"


def find_study(path: Path) -> Path | None:
    """Return the study.json that a command's argument names, itself or by its folder; None if it names no study."""
    file = path if path.name == _NAME else path / _NAME
    with suppress(UserError):  # it is no run either, and that is reported
        return file if is_file(file) else None
    return None


def read_study(file: Path) -> StudyFile:
    """Read the runs of a study. They are in the experiments folder that the study is in, wherever that is now.

    Raises:
        UserError: the file is damaged.
    """
    exp_dir = file.parent.parent.parent
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        # The last two parts, day and run id, since other versions state more of the path.
        runs = tuple(
            StudyEntry(RunPaths(exp_dir.joinpath(*Path(run["folder"]).parts[-2:])), int(run["num_folds"]))
            for run in fields["runs"]
        )
        return StudyFile(str(fields["name"]), file.parent, runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: damaged ({error}). The next launch of the study writes it again; its runs are not affected"
        ) from error
