"""`doccls blend RUN RUN ...`: the weights by which several runs predict together, in a folder like a run's."""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from doccls.config.paths import find_output_problem, is_absent, is_file, list_entries
from doccls.errors import UserError
from doccls.oof.blend import (
    BlendResult,
    Candidate,
    CandidateScore,
    blend_parts,
    compare_blends,
)
from doccls.oof.blend_record import NO_THRESHOLDS, BlendMember, read_record, render_record
from doccls.oof.bootstrap import GAIN_LEVEL, encode_groups
from doccls.oof.calibrate import assign_parts
from doccls.oof.comparable import Damage, find_damage_problem, find_differences
from doccls.oof.merge import MergedOof, load_merged, summarize_merged, write_merged
from doccls.oof.metrics import probabilities
from doccls.oof.summary import Summary
from doccls.run.fingerprint import digest_json, read_provenance
from doccls.run.paths import RunPaths, check_run_id, find_run
from doccls.system.atomic_files import remove_leftovers, write_text

_DIGESTS = {
    "data_digest": "the data (files, labels or groups, or the rule of their version that makes pixels of files)",
    "folds_digest": "the folds",
}
_TITLES = {"single": "best single run", "equal": "equal weights", "selection": "selection"}
_TINIEST = np.finfo(np.float64).tiny  # stands for a probability of 0 in logarithms


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run whose folds are all finished, with its out-of-fold predictions."""

    paths: RunPaths
    merged: MergedOof
    summary: Summary

    @property
    def damage(self) -> str | None:
        """The level of its damaged copies; None without any."""
        return None if self.summary.damaged is None else self.summary.damaged.level


# --- command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doccls blend`."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="run folders, two or more: <exp_dir>/YYYYMMDD/<run_id>; on the same data and folds",
    )  # fmt: skip
    parser.add_argument(
        "--run-id", metavar="NAME", help="name of the blend's folder, beside the first run's (default: blend-<digest>)"
    )


def blend(arguments: argparse.Namespace) -> int:
    """Choose the weights, write the blend's folder, and return the exit code.

    Raises:
        UserError: the runs can't be blended, or the folder has other content.
    """
    given = [_load_run(folder) for folder in arguments.runs]
    _check_comparable(given)
    # In an order that does not depend on the command line, so that equal members give equal bytes.
    runs = sorted(given, key=lambda run: run.merged.fingerprint)
    folder = _locate_blend(given[0].paths, runs, arguments.run_id)
    problem = find_damage_problem([_describe_damage(run) for run in runs])
    if problem is not None:
        print(f"[WARNING] {problem}: the clean scores decide")
        runs = [replace(run, merged=replace(run.merged, damaged_logits_NC=None)) for run in runs]
    result, merged, summary = blend_runs(runs)
    members = _list_members(folder, runs, result)
    write_text(folder.blend, render_record(members, result, summary))  # first: it claims the folder
    write_merged(folder, merged, summary)
    for line in list_results(members, result):
        print(f"[BLEND] {line}")
    print(f"[BLEND] {folder.root}\n[BLEND] next: doccls predict {shlex.quote(str(folder.root))}")
    return 0


def _load_run(folder: Path) -> FinishedRun:
    paths = find_run(folder)
    if is_file(paths.blend):
        raise UserError(f"RUN {paths.root}: a blend; name the runs that it was made of, and further ones")
    try:
        return FinishedRun(paths, *load_merged(paths, NO_THRESHOLDS))
    except UserError as error:
        raise UserError(f"RUN {paths.root}: can't be blended until all of its folds are finished: {error}") from error


def _locate_blend(first: RunPaths, runs: Sequence[FinishedRun], run_id: str | None) -> RunPaths:
    """Return the blend's folder, beside that of the `first` run on the command line.

    Raises:
        UserError: it can't be written, or it has other content than a blend of these runs.
    """
    fingerprints = [run.merged.fingerprint for run in runs]
    name = f"blend-{digest_json(fingerprints)[:6]}" if run_id is None else check_run_id(run_id)
    folder = RunPaths(first.root.parent / name)
    problem = find_output_problem(folder.root)
    if problem is not None:
        raise UserError(f"the folder of the blend: {problem}")
    if is_absent(folder.root):
        return folder
    remove_leftovers(folder.blend)  # of a command that was killed
    if is_file(folder.blend):
        members = read_record(folder).members
        if [member.fingerprint for member in members] == fingerprints:
            return folder
        content = f"a blend of {', '.join(member.path for member in members)}"
    elif any(list_entries(folder.root)):
        content = "other files than those of a blend"
    else:
        return folder
    raise UserError(f"{folder.root} has {content}: choose another --run-id, or delete that folder")


def _list_members(folder: RunPaths, runs: Sequence[FinishedRun], result: BlendResult) -> list[BlendMember]:
    return [
        BlendMember(
            Path(os.path.relpath(run.paths.root, folder.root)).as_posix(),
            run.merged.fingerprint,
            weight,
            run.summary.macro_f1,
            None if run.summary.damaged is None else run.summary.damaged.macro_f1,
        )
        for run, weight in zip(runs, result.best.weights, strict=True)
    ]


# --- runs that can be blended ----------------------------------------------------------------------------------------


def _check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Check that there are several different runs on the same rows, labels and folds.

    Raises:
        UserError: there are not; lists what differs between the first run and each other.
    """
    if len(runs) < 2:
        raise UserError("RUN: a blend needs at least two runs")
    named: dict[str, RunPaths] = {}
    for run in runs:
        earlier = named.setdefault(run.merged.fingerprint, run.paths)
        if earlier is not run.paths:
            what = "is named twice" if earlier == run.paths else f"is the same run as {earlier.root}, or a copy of it"
            raise UserError(f"RUN {run.paths.root} {what}: a blend needs different runs (another model, size, ...)")
    first, *others = runs
    problems = [
        f"{run.paths.root}: {problem}"
        for run in others
        for problem in (*find_differences(first.merged, run.merged), *_compare_snapshots(first.paths, run.paths))
    ]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise UserError(
            f"only runs on the same rows, labels and folds can be blended; compared with {first.paths.root}:\n"
            f"{listed}\n(folds follow project.seed, unless data.fold_seed is set or train.csv has a column `fold`: "
            "train runs with other seeds with data.fold_seed = the first run's project.seed)"
        )


def _compare_snapshots(first: RunPaths, other: RunPaths) -> list[str]:
    """Return the digests in which the snapshots differ; none if one of the runs has no snapshot."""
    ours, theirs = read_provenance(first), read_provenance(other)
    if ours is None or theirs is None:
        return []
    return [f"{what} differ, by config.yaml" for name, what in _DIGESTS.items() if ours[name] != theirs[name]]


def _describe_damage(run: FinishedRun) -> Damage:
    provenance = read_provenance(run.paths)
    version = None if provenance is None else provenance["damage_version"]
    return Damage(run.paths.run_id, None if run.summary.damaged is None else run.summary.damaged.level, version)


# --- the blend -------------------------------------------------------------------------------------------------------


def blend_runs(runs: Sequence[FinishedRun]) -> tuple[BlendResult, MergedOof, Summary]:
    """Return the candidates, the blended OOF predictions, and their summary; pure.

    Each row is blended with weights that were chosen on other folds, so that the scores are those of unseen rows.
    """
    first = runs[0].merged
    used = np.setdiff1d(np.arange(len(first.ids)), first.skipped)
    unit_N = None if first.groups is None else encode_groups([first.groups[row] for row in used.tolist()])
    part_N = assign_parts(first.folds_N[used], unit_N)
    clean_RNC = _stack_probabilities([run.merged.logits_NC for run in runs], used)
    damaged = [run.merged.damaged_logits_NC for run in runs if run.merged.damaged_logits_NC is not None]
    damaged_RNC = _stack_probabilities(damaged, used) if damaged else None
    result = compare_blends(first.targets_N[used], part_N, clean_RNC, damaged_RNC, unit_N)

    def blend_logits(probs_RNC: np.ndarray) -> np.ndarray:
        logits_NC = np.full_like(first.logits_NC, np.nan)
        blended_NC = blend_parts(probs_RNC, part_N, result.best.part_weights)
        logits_NC[used] = np.log(np.maximum(blended_NC, _TINIEST))
        return logits_NC

    merged = replace(
        first,
        logits_NC=blend_logits(clean_RNC),
        damaged_logits_NC=None if damaged_RNC is None else blend_logits(damaged_RNC),
        fingerprint=digest_json([run.merged.fingerprint for run in runs]),
    )
    return result, merged, _summarize(runs, merged, result.best)


def _stack_probabilities(logits: Sequence[np.ndarray], used: np.ndarray) -> np.ndarray:
    return np.stack([probabilities(logits_NC[used]) for logits_NC in logits])


def _summarize(runs: Sequence[FinishedRun], merged: MergedOof, best: Candidate) -> Summary:
    notes = [
        f"a blend of {len(runs)} runs ({_TITLES[best.name]}); the weights of each fold's rows were chosen on the other "
        "folds",
        *(f"{run.paths.run_id}: {note}" for run in runs for note in run.summary.notes),
    ]
    # Damaged copies, if there are any, selected the weights.
    summary = summarize_merged(merged, tuple(notes), runs[0].damage or "none", "damaged", NO_THRESHOLDS)
    selection = "; ".join(dict.fromkeys(run.summary.selection for run in runs))
    return replace(summary, selection=selection)


# --- results in words ------------------------------------------------------------------------------------------------


def list_results(members: Sequence[BlendMember], result: BlendResult) -> list[str]:
    """Format the scores of the runs and of the candidates, which candidate is used and why, and its weights."""
    width = max(len(_TITLES["single"]), *(len(_name_member(member)) for member in members))
    rows = [("", "macro_f1", "damaged pages")]
    rows += [(_name_member(member), f"{member.macro_f1:.5f}", _format(member.macro_f1_damaged)) for member in members]
    rows += [
        (_TITLES[candidate.name], _format_score(candidate.clean), _format_score(candidate.damaged))
        for candidate in result.candidates
    ]
    lines = [f"{name:<{width}}  {clean:<22}  {damaged}".rstrip() for name, clean, damaged in rows]
    weights = ", ".join(f"{_name_member(member)} {member.weight:.2f}" for member in members)
    return [*lines, *explain_choice(result), f"weights: {weights}"]


def explain_choice(result: BlendResult) -> list[str]:
    """Format the gains that decide, and which candidate is used and why."""
    gains = [
        f"{_TITLES[candidate.name]} {score.gain:+.5f} [{score.gain_low:+.3f}, {score.gain_high:+.3f}]"
        for candidate in (result.selection, result.single)
        for score in (result.find_deciding_score(candidate),)
    ]
    interval = f"{GAIN_LEVEL:.0%} interval lies above 0"
    reasons = {
        "selection": f"since its gain's {interval}",
        "single": f"since only its gain's {interval}",
        "equal": f"since neither gain's {interval}",
    }
    return [
        f"gain over equal weights, {result.decided_by} pages: {', '.join(gains)}",
        f"used: {_TITLES[result.used]}, {reasons[result.used]}",
    ]


def _name_member(member: BlendMember) -> str:
    return Path(member.path).name


def _format(score: float | None) -> str:
    return "" if score is None else f"{score:.5f}"


def _format_score(score: CandidateScore | None) -> str:
    return "" if score is None else f"{score.macro_f1:.5f} [{score.macro_f1_low:.3f}, {score.macro_f1_high:.3f}]"
