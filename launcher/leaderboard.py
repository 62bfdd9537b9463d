"""The leaderboard of a study: its runs by their scores; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from doccls.oof.summary import Summary


@dataclass(frozen=True)
class Standing:
    """How a run of a study did."""

    run_id: str
    finished: int  # folds
    num_folds: int
    device_hours: float | None  # of its finished epochs; None without any
    settings: Mapping[str, str]  # config keys that differ among the runs of the study
    summary: Summary | None  # None unless it is merged
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

    return sorted(standings, key=lambda standing: -score(standing))


def render_leaderboard(standings: Sequence[Standing]) -> list[str]:
    """Render the runs, the best first, as lines of a table."""
    ranked = rank_runs(standings)
    width = max(len(standing.run_id) for standing in ranked)
    lines = [f"{'':>2}  {'run':<{width}}  {'clean':<21}  {'damaged':<21}  device-hours  differing keys"]
    for place, standing in enumerate(ranked, 1):
        settings = " ".join(f"{key}={value}" for key, value in standing.settings.items())
        hours = "" if standing.device_hours is None else f"{standing.device_hours:.2f}"
        number = "" if standing.summary is None else str(place)
        lines.append(
            f"{number:>2}  {standing.run_id:<{width}}  {_format_scores(standing)}  {hours:>12}  {settings}".rstrip()
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
