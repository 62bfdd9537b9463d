"""study.json: the runs of a study, and how each of them did."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from doccls.config.paths import resolve_option
from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import write_text
from doccls.system.tensor_file import TensorFileError, refuse_format
from launcher.leaderboard import Standing, rank_runs

_FORMAT = "doccls-study-1"


@dataclass(frozen=True)
class Member:
    """A run of a study."""

    run_id: str
    folder: str  # in the experiments folder: `YYYYMMDD/<run_id>`
    config: str
    seed: int | None  # None: the config's own
    num_folds: int
    settings: Mapping[str, str]  # config keys that differ among the runs that were launched together
    wanted: int  # number of folds that the config trains


@dataclass(frozen=True)
class Study:
    """A study and its runs, those of earlier commands included."""

    name: str
    resume_command: str  # trains the missing folds of the last command's runs
    members: tuple[Member, ...]

    def join(self, before: "Study | None") -> "Study":
        """Return the study with the runs of an earlier command that are not in this one after its own."""
        own = {member.run_id for member in self.members}
        others = () if before is None else tuple(member for member in before.members if member.run_id not in own)
        return replace(self, members=(*self.members, *others))


def locate_study_file(folder: Path) -> Path:
    """Return the study's file in its folder."""
    return folder / "study.json"


def locate_study_lock(folder: Path) -> Path:
    """Return the lock of the process that launches the folds of all runs on its machine."""
    return folder / "study.lock"


def locate_update_lock(folder: Path) -> Path:
    """Return the lock of the process that updates study.json, or blends the runs."""
    return folder / "update.lock"


def locate_member(folder: Path, member: Member) -> RunPaths:
    """Return the run of a study in `folder`, which is `<exp_dir>/studies/<name>`."""
    return RunPaths(folder.parent.parent / member.folder)


def find_study(folder: Path) -> Path | None:
    """Return the folder of the study that a command's argument names, or its study.json; None if it names no study."""
    root = resolve_option(folder, "RUN")
    root = root.parent if root.name == "study.json" else root
    with suppress(OSError):  # reading the run will say what is wrong with the folder
        return root if locate_study_file(root).is_file() or locate_study_lock(root).is_file() else None
    return None


def read_study(folder: Path) -> Study | None:
    """Read the study in the folder; None if it has no study.json.

    Raises:
        UserError: the file is damaged, or was written by another version of doccls.
    """
    path = locate_study_file(folder)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        refuse_format(path, fields["format"], _FORMAT)
        members = tuple(_parse(run) for run in fields["runs"])
        return Study(str(fields["name"]), str(fields["resume_command"]), members)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (TensorFileError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}). Delete it to continue: the runs keep their results") from error


def _parse(fields: Mapping[str, Any]) -> Member:
    member = Member(**{name: fields[name] for name in Member.__dataclass_fields__})
    day, _, run_id = member.folder.partition("/")
    if run_id != member.run_id or not day.isdecimal() or Path(run_id).name != run_id or run_id == "..":
        raise ValueError(f"folder {member.folder!r}")
    return member


def write_study(folder: Path, study: Study, standings: Sequence[Standing]) -> None:
    """Write the study atomically, the best run first; only the holder of the study's lock may call."""
    members = {member.run_id: member for member in study.members}
    described = {
        "format": _FORMAT,
        "name": study.name,
        "resume_command": study.resume_command,
        "runs": [asdict(members[standing.run_id]) | _describe(standing) for standing in rank_runs(standings)],
    }
    write_text(locate_study_file(folder), json.dumps(described, indent=2) + "\n")


def _describe(standing: Standing) -> dict[str, object]:
    described: dict[str, object] = {
        "finished_folds": standing.finished,
        "device_hours": standing.device_hours,
        "problem": standing.problem,
    }
    summary = standing.summary
    if summary is not None:
        described["clean"] = _describe_score(summary.macro_f1, summary.macro_f1_low, summary.macro_f1_high)
        if summary.damaged is not None:
            damaged = summary.damaged
            described["damaged"] = _describe_score(damaged.macro_f1, damaged.macro_f1_low, damaged.macro_f1_high)
    elif standing.score is not None:
        described["clean"] = {"macro_f1": standing.score}
        if standing.score_damaged is not None:
            described["damaged"] = {"macro_f1": standing.score_damaged}
    return described


def _describe_score(value: float, low: float, high: float) -> dict[str, float]:
    return {"macro_f1": value, "low": low, "high": high}
