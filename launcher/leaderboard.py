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
    wanted: int = 0  # folds that its config trains
    # Mean macro-F1 of the finished folds, and on damaged copies: the score of a run that is not to be merged.
    mean: float | None = None
    mean_damaged: float | None = None
    problem: str | None = None  # why it is not merged

    @property
    def is_complete(self) -> bool:
        """Whether all that its config asks for is trained, and merged if that is all folds."""
        return self.summary is not None or (0 < self.wanted <= self.finished and self.wanted < self.num_folds)

    @property
    def score(self) -> float | None:
        """Its score on clean pages; None unless it is complete."""
        return self.summary.macro_f1 if self.summary is not None else self.mean if self.is_complete else None

    @property
    def score_damaged(self) -> float | None:
        """Its score on damaged copies; None unless it is complete, and without any."""
        if self.summary is not None:
            return None if self.summary.damaged is None else self.summary.damaged.macro_f1
        return self.mean_damaged if self.is_complete else None


def rank_runs(standings: Sequence[Standing]) -> list[Standing]:
    """Order runs by their score, on damaged copies if all have one, else on clean pages; unmerged ones come last."""
    by_damaged = all(standing.score_damaged is not None for standing in standings if standing.score is not None)

    def rank(standing: Standing) -> float:
        score = standing.score_damaged if by_damaged else standing.score
        return float("inf") if score is None else -score

    return sorted(standings, key=rank)


def render_leaderboard(standings: Sequence[Standing]) -> list[str]:
    """Render the runs, the best first, as lines of a table."""
    ranked = rank_runs(standings)
    width = max(len(standing.run_id) for standing in ranked)
    lines = [f"{'':>2}  {'run':<{width}}  {'clean':<21}  {'damaged':<21}  device-hours  differing keys"]
    for place, standing in enumerate(ranked, 1):
        settings = " ".join(f"{key}={value}" for key, value in standing.settings.items())
        hours = "" if standing.device_hours is None else f"{standing.device_hours:.2f}"
        number = "" if standing.score is None else str(place)
        lines.append(
            f"{number:>2}  {standing.run_id:<{width}}  {_format_scores(standing)}  {hours:>12}  {settings}".rstrip()
        )
        if standing.problem is not None:
            lines.append(f"      {standing.problem}")
    return lines


def _format_scores(standing: Standing) -> str:
    summary = standing.summary
    if summary is None:
        folds = f"{standing.finished} of {standing.num_folds} folds"
        if standing.score is None:
            return f"{folds:<21}  {'':<21}"
        damaged_text = "-" if standing.score_damaged is None else f"{standing.score_damaged:.4f}"
        return f"{f'{standing.score:.4f} ({folds})':<21}  {damaged_text:<21}"
    clean = _format_score(summary.macro_f1, summary.macro_f1_low, summary.macro_f1_high)
    damaged = summary.damaged
    if damaged is None:
        return f"{clean:<21}  {'-':<21}"
    return f"{clean:<21}  {_format_score(damaged.macro_f1, damaged.macro_f1_low, damaged.macro_f1_high):<21}"


def _format_score(value: float, low: float, high: float) -> str:
    return f"{value:.4f} [{low:.3f}, {high:.3f}]"
