"""A study, configs and seeds as runs whose folds share one queue: its runs, their order, how they did; pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from doccls.errors import UserError

if TYPE_CHECKING:  # its import is slow, and `doccls-launch --help` has to be fast
    from doccls.oof.summary import Summary

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_FOREIGN = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_ID = 80


@dataclass(frozen=True)
class StudyRun:
    """A run of a study, before its config is loaded."""

    run_id: str
    config: Path
    seed: int | None  # None: the config's own

    @property
    def overrides(self) -> tuple[str, ...]:
        """The keys that the study sets, as in `--set`."""
        return () if self.seed is None else (f"project.seed={self.seed}",)


def check_study_name(name: str) -> str:
    """Return the name of a study.

    Raises:
        UserError: it can't be part of file names.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--study {name!r}: up to 40 letters, digits, dots, hyphens and underscores, the first a letter or digit"
        )
    return name


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse `--seeds`: different non-negative integers, separated by commas.

    Raises:
        UserError: they are not.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise UserError(f"--seeds {text!r}: must be integers of at least 0, separated by commas, such as 42,43,44")
    seeds = tuple(map(int, words))
    twice = next((seed for number, seed in enumerate(seeds) if seed in seeds[:number]), None)
    if twice is not None:
        raise UserError(f"--seeds {text!r}: {twice} is there twice")
    return seeds


def list_runs(name: str, configs: Sequence[Path], seeds: Sequence[int]) -> tuple[StudyRun, ...]:
    """List the runs of a study: each config with each seed, or with its own seed if there are none.

    The run id is made from the names of the study and of the config's file, and from the seed.

    Raises:
        UserError: two configs would give the same run id.
    """
    runs: dict[str, StudyRun] = {}
    for config in configs:
        stem = _FOREIGN.sub("-", config.stem).strip("-.") or "config"
        for seed in seeds or (None,):
            suffix = "" if seed is None else f"-s{seed}"
            run_id = f"{name}-{stem[: _MAX_ID - len(name) - len(suffix) - 1]}{suffix}"
            if run_id in runs:
                raise UserError(
                    f"--config {runs[run_id].config} and {config} would both be run {run_id}: rename one of the files"
                )
            runs[run_id] = StudyRun(run_id, config, seed)
    return tuple(runs.values())


@dataclass(frozen=True)
class Work:
    """The folds of a run that wait for a slot, and what is known about how long one takes."""

    run: int  # its number in the study
    folds: tuple[int, ...]
    units: float  # expected work of a fold: epochs x pages x pixels
    measured_s: float | None  # mean time of the run's finished folds; None without any


def order_folds(works: Sequence[Work]) -> list[tuple[int, int]]:
    """Return (run, fold) in the order in which they start: those that are expected to take longest first.

    So the last folds to end are short, and slots idle little (Graham, Bounds on Multiprocessing Timing Anomalies,
    1969). Where folds are expected to take equally long, those of one run start one after another. Finished folds of a
    run say how long its others take; runs without any are compared by their expected work, at the rate of the others.
    """
    rates = [work.measured_s / work.units for work in works if work.measured_s is not None and work.units]
    rate = sum(rates) / len(rates) if rates else 1.0

    def expect(work: Work) -> float:
        return work.units * rate if work.measured_s is None else work.measured_s

    ordered = sorted(works, key=lambda work: (-expect(work), work.run))
    return [(work.run, fold) for work in ordered for fold in work.folds]


@dataclass(frozen=True)
class Standing:
    """How a run of a study did."""

    run_id: str
    folder: str
    config: str
    seed: int | None
    finished: int  # folds
    num_folds: int
    device_hours: float | None  # of its finished epochs; None without any
    settings: Mapping[str, str]  # config keys that differ among the runs of the study
    summary: "Summary | None"  # None unless it is merged
    problem: str | None = None  # why it is not merged


def rank_runs(standings: Sequence[Standing]) -> list[Standing]:
    """Order runs by their score, on damaged copies if all have one, else on clean pages; unmerged ones come last."""
    summaries = [standing.summary for standing in standings if standing.summary is not None]
    by_damaged = all(summary.damaged is not None for summary in summaries)

    def score(standing: Standing) -> float:
        if standing.summary is None:
            return float("-inf")
        damaged = standing.summary.damaged
        return damaged.macro_f1 if by_damaged and damaged is not None else standing.summary.macro_f1

    return sorted(standings, key=lambda standing: (-score(standing), standing.run_id))


def render_leaderboard(standings: Sequence[Standing]) -> list[str]:
    """Render the runs, the best first, as lines of a table."""
    ranked = rank_runs(standings)
    width = max(len(standing.run_id) for standing in ranked)
    lines = [f"{'':>2}  {'run':<{width}}  {'clean':<21}  {'damaged':<21}  device-hours  differing keys"]
    for place, standing in enumerate(ranked, 1):
        settings = " ".join(f"{key}={value}" for key, value in standing.settings.items())
        hours = "" if standing.device_hours is None else f"{standing.device_hours:.2f}"
        lines.append(
            f"{place:>2}  {standing.run_id:<{width}}  {_format_scores(standing)}  {hours:>12}  {settings}".rstrip()
        )
        if standing.problem is not None:
            lines.append(f"      {standing.problem}")
    return lines


def _format_scores(standing: Standing) -> str:
    summary = standing.summary
    if summary is None:
        return f"{f'{standing.finished} of {standing.num_folds} folds':<21}  {'':<21}"
    clean = _format_score(summary.macro_f1, summary.macro_f1_low, summary.macro_f1_high)
    damaged = summary.damaged
    if damaged is None:
        return f"{clean:<21}  {'-':<21}"
    return f"{clean:<21}  {_format_score(damaged.macro_f1, damaged.macro_f1_low, damaged.macro_f1_high):<21}"


def _format_score(value: float, low: float, high: float) -> str:
    return f"{value:.4f} [{low:.3f}, {high:.3f}]"


def describe_study(name: str, standings: Sequence[Standing]) -> dict[str, object]:
    """Describe the study as JSON values, the best run first."""
    return {"name": name, "runs": [_describe_standing(standing) for standing in rank_runs(standings)]}


def _describe_standing(standing: Standing) -> dict[str, object]:
    described: dict[str, object] = {
        "run_id": standing.run_id,
        "folder": standing.folder,
        "config": standing.config,
        "seed": standing.seed,
        "finished_folds": standing.finished,
        "num_folds": standing.num_folds,
        "device_hours": standing.device_hours,
        "settings": dict(standing.settings),
        "problem": standing.problem,
    }
    summary = standing.summary
    if summary is not None:
        described["clean"] = _describe_score(summary.macro_f1, summary.macro_f1_low, summary.macro_f1_high)
        if summary.damaged is not None:
            damaged = summary.damaged
            described["damaged"] = _describe_score(damaged.macro_f1, damaged.macro_f1_low, damaged.macro_f1_high)
    return described


def _describe_score(value: float, low: float, high: float) -> dict[str, float]:
    return {"macro_f1": value, "low": low, "high": high}
