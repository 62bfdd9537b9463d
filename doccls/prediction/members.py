"""The runs whose models predict together: one run by itself, or the members of a blend."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from doccls.config import Config
from doccls.config.paths import find_problem, is_file
from doccls.data.store import StoreChoice, choose_store
from doccls.errors import UserError
from doccls.oof.blend_record import BlendMember, read_record
from doccls.run.paths import RunPaths
from doccls.training.checkpoint import parse_config, read_best


@dataclass(frozen=True)
class ConfigChanges:
    """What the command line replaces in the configs of the trainings; None keeps a value."""

    sample_csv: Path | None = None
    image_dir_test: Path | None = None
    num_workers: int | None = None
    on_bad_image: str | None = None

    def apply(self, config: Config) -> Config:
        """Return the config of the prediction."""
        changes = {key: value for key, value in vars(self).items() if value is not None}
        data = config.data.model_copy(update=changes)
        # The training's num_processes says nothing about this machine.
        train = config.train.model_copy(update={"num_processes": None})
        return config.model_copy(update={"data": data, "train": train})


@dataclass(frozen=True)
class Member:
    """A run whose folds are averaged, as a member of a blend or by itself."""

    paths: RunPaths
    files: tuple[Path, ...]  # the checkpoints of its folds
    config: Config  # of its training, with the changes of the command line
    fingerprint: str
    classes: tuple[str, ...]
    precision: str  # in which it was validated: no (float32), fp16 or bf16
    recorded: BlendMember | None = None  # in the blend; None for a run by itself

    @property
    def weight(self) -> float:
        """The weight of its probabilities."""
        return 1.0 if self.recorded is None else self.recorded.weight

    @property
    def label(self) -> str:
        """What messages about it start with."""
        return "" if self.recorded is None else f"{self.paths.run_id}: "


def list_members(paths: RunPaths, changes: ConfigChanges) -> list[Member]:
    """Return the run, or the members of a blend that have weight.

    Raises:
        UserError: a member is not where the blend recorded it, or has no checkpoint.
    """
    if not is_file(paths.blend):
        return [_open_member(paths, changes, None)]
    members = []
    for recorded in read_record(paths).members:
        root = Path(os.path.normpath(paths.root / recorded.path))
        if recorded.weight == 0:
            continue
        problem = find_problem(root, "run folder")
        if problem is not None:
            raise UserError(
                f"{paths.blend}: member {recorded.path}: {problem}. If it was moved, move it back (members are found "
                "relative to the blend), or blend the runs again"
            )
        members.append(_open_member(RunPaths(root), changes, recorded))
    return members


def unify_data(members: Sequence[Member], has_sample: bool) -> list[Member]:
    """Return the members with the data config of the first one, so that all read the same pages in the same way.

    Raises:
        UserError: their configs name different samples or test images, and `has_sample` says that these are predicted.
    """
    options = (("sample_csv", "--sample-csv"), ("image_dir_test", "--image-dir")) if has_sample else ()
    for key, option in options:
        named = {member.paths.run_id: getattr(member.config.data, key) for member in members}
        if len(set(named.values())) > 1:
            listed = ", ".join(f"{run_id}: {path}" for run_id, path in named.items())
            raise UserError(f"the members of the blend differ in data.{key} ({listed}): choose it by {option}")
    data = members[0].config.data
    return [replace(member, config=member.config.model_copy(update={"data": data})) for member in members]


def choose_precision(members: Sequence[Member]) -> str:
    """Return the precision of all members; float32 if they differ, since a process computes in one."""
    precisions = {member.precision for member in members}
    return precisions.pop() if len(precisions) == 1 else "no"


def choose_member_store(member: Member) -> StoreChoice | None:
    """Choose the training's store; `auto` is beside the run, even if it was moved. A named folder may be missing."""
    output = member.config.output.model_copy(update={"exp_dir": member.paths.exp_dir})
    choice = choose_store(member.config.model_copy(update={"output": output}))
    return None if choice is None else replace(choice, required=False)


def check_checkpoints(member: Member) -> tuple[list[int], list[str]]:
    """Return the folds of a member's checkpoints, and warnings. The checkpoints are read one at a time.

    Raises:
        UserError: they belong to different runs, or to another than the blend was made of.
    """
    fingerprints, unfinished = {}, []
    for file in member.files:
        best = read_best(file)
        fingerprints[best.fold] = best.fingerprint
        if not is_file(member.paths.predictions(best.fold)):
            unfinished.append(best.fold)
    if len(set(fingerprints.values())) > 1:
        listed = ", ".join(f"fold {fold}: {fingerprint[:12]}" for fold, fingerprint in fingerprints.items())
        raise UserError(
            f"{member.label}the checkpoints belong to different runs ({listed}): probabilities can't be averaged"
        )
    found = next(iter(fingerprints.values()))
    if member.recorded is not None and found != member.recorded.fingerprint:
        raise UserError(
            f"{member.paths.root} is another run than the one that was blended (fingerprint {found[:12]} instead of "
            f"{member.recorded.fingerprint[:12]}): its weight means nothing for this one; blend the runs again"
        )
    num_files, num_folds = len(member.files), member.config.data.folds
    warnings = []
    if num_files < num_folds:
        warnings.append(f"{member.label}{num_files} of {num_folds} folds have a checkpoint; averaging over those")
    warnings += [f"{member.label}fold {fold} is not finished: using its best epoch so far" for fold in unfinished]
    return list(fingerprints), warnings


def _open_member(paths: RunPaths, changes: ConfigChanges, recorded: BlendMember | None) -> Member:
    files = paths.list_best_checkpoints()
    if not files:
        raise UserError(f"{paths.root}: no checkpoint ckpt/best_fold*.pth: no fold has finished an epoch")
    first = read_best(files[0])
    config = changes.apply(parse_config(first))
    return Member(paths, tuple(files), config, first.fingerprint, first.classes, first.precision, recorded)
