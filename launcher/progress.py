"""What a live view shows of the folds of runs, derived from their status, heartbeats and metrics; pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from doccls.run.heartbeat import Beat
from doccls.run.metrics_log import EpochMetrics
from launcher.estimate import Pace, estimate_fold_s, estimate_left_s, estimate_queue_s, measure_pace, measure_steps
from launcher.ledger import Attempt, format_duration
from launcher.status import FoldStatus, RunStatus, State
from launcher.supervise import Outcome

ACTIVE = (State.RUNNING, State.WAITING, State.UNKNOWN)
_CLOCK_ERROR_S = 5.0  # how far the clocks of two machines may be apart


@dataclass(frozen=True)
class RunEvidence:
    """The status of a run, and what its files say of the progress of its folds."""

    run_id: str
    status: RunStatus
    beats: tuple[Beat, ...] = ()
    epochs: Mapping[int, Sequence[EpochMetrics]] = field(default_factory=dict)  # by fold
    attempts: tuple[Attempt, ...] = ()  # of all launches
    num_epochs: int = 0  # of each fold; 0 if unknown


@dataclass(frozen=True)
class FoldProgress:
    """A row of a live view."""

    run: str  # what tells its run from the others of the view; empty if there are none
    fold: int
    state: State
    slot: str = ""
    phase: str = ""  # of a running fold
    epoch: int = 0  # 1-based; 0 before the first
    epochs: int = 0  # 0 if unknown, as `steps`
    step: int = 0
    steps: int = 0
    images_per_s: float | None = None
    best: float | None = None  # macro-F1 of the best epoch so far
    left_s: float | None = None
    restarts: int = 0
    scores: tuple[float, ...] = ()  # macro-F1 of each epoch
    remark: str = ""  # the first line of a problem

    @property
    def name(self) -> str:
        """The fold and, where there are several, its run."""
        return f"{self.run} fold {self.fold}".lstrip()


@dataclass(frozen=True)
class Progress:
    """A live view: all folds of a run or a study."""

    title: str
    folds: tuple[FoldProgress, ...]
    left_s: float | None = None  # until the last fold is done
    is_launched: bool = False  # a launcher is active

    @property
    def is_active(self) -> bool:
        """Whether something may still change."""
        return self.is_launched or any(fold.state in ACTIVE for fold in self.folds)

    def count_states(self) -> Counter[State]:
        """Return the number of folds in each state."""
        return Counter(fold.state for fold in self.folds)


def derive_progress(title: str, runs: Sequence[RunEvidence], is_launched: bool = False) -> Progress:
    """Derive the view of runs whose folds share one queue."""
    names = _shorten([run.run_id for run in runs])
    derived = [_derive_run(name, run) for name, run in zip(names, runs, strict=True)]
    known_s = [fold_s for _, fold_s in derived if fold_s is not None]
    mean_s = sum(known_s) / len(known_s) if known_s else None
    running_s, waiting_s = list[float | None](), list[float | None]()
    for folds, own_s in derived:
        fold_s = mean_s if own_s is None else own_s
        running_s += [fold_s if fold.left_s is None else fold.left_s for fold in folds if fold.state is State.RUNNING]
        waiting_s += [
            None if fold_s is None else fold_s * _find_missing_share(fold)
            for fold in folds
            if fold.state is State.WAITING
        ]
    is_launched = is_launched or any(run.status.launchers for run in runs)
    all_folds = tuple(fold for folds, _ in derived for fold in folds)
    return Progress(title, all_folds, estimate_queue_s(running_s, waiting_s), is_launched)


def _shorten(run_ids: Sequence[str]) -> list[str]:
    """Return the IDs without the words that all begin with, separated by hyphens; empty for a single run."""
    if len(run_ids) < 2:
        return [""] * len(run_ids)
    words = [run_id.split("-") for run_id in run_ids]
    shortest = min(map(len, words)) - 1  # each keeps a word
    common = next((place for place in range(shortest) if len({own[place] for own in words}) > 1), shortest)
    return ["-".join(own[common:]) for own in words]


def _derive_run(name: str, run: RunEvidence) -> tuple[list[FoldProgress], float | None]:
    """Return the folds of a run, and the seconds that one of them takes in all, as far as that is known."""
    most = max(run.epochs.values(), key=len, default=())
    folds, measured_s = [], list[float]()
    for status in run.status.folds:
        rows, beat = run.epochs.get(status.fold, ()), _find_beat(status, run.beats)
        pace = None if beat is None else measure_pace(beat, rows or most)
        if beat is not None and pace is not None:
            measured_s.append(estimate_fold_s(beat, pace))
        folds.append(_derive_fold(name, status, rows, beat, pace, run.num_epochs))
    finished_s = _measure_finished(run.attempts)
    times_s = finished_s or measured_s
    return folds, sum(times_s) / len(times_s) if times_s else None


def _find_beat(status: FoldStatus, beats: Sequence[Beat]) -> Beat | None:
    """Return the beat of the slowest process of a running fold; a killed process of an earlier attempt left others."""
    if status.state is not State.RUNNING:
        return None
    since_s = 0.0 if status.since is None else datetime.fromisoformat(status.since).timestamp() - _CLOCK_ERROR_S
    own = [beat for beat in beats if beat.fold == status.fold and beat.time_s >= since_s]
    return min(own, key=lambda beat: beat.step, default=None)


def _derive_fold(
    name: str,
    status: FoldStatus,
    rows: Sequence[EpochMetrics],
    beat: Beat | None,
    pace: Pace | None,
    num_epochs: int,
) -> FoldProgress:
    best = max(rows, key=lambda row: row.macro_f1 if row.selection_f1 is None else row.selection_f1, default=None)
    done = None if best is None else best.macro_f1
    epoch = rows[-1].epoch if rows else 0
    remark = "" if status.state in (State.DONE, State.RUNNING) else (status.remark or "").partition("\n")[0]
    return FoldProgress(
        run=name,
        fold=status.fold,
        state=status.state,
        slot=status.slot or "",
        phase="" if status.state is not State.RUNNING else "start" if beat is None else beat.phase,
        epoch=epoch if beat is None or not beat.epoch else beat.epoch,
        epochs=num_epochs,
        step=0 if beat is None else beat.step,
        steps=0 if beat is None else beat.epochs * beat.steps_per_epoch,
        images_per_s=_measure_images_per_s(beat, rows),
        best=done if status.macro_f1 is None else status.macro_f1,
        left_s=None if beat is None or pace is None else estimate_left_s(beat, pace),
        restarts=max(0, status.attempts - 1),
        scores=tuple(row.macro_f1 for row in rows),
        remark=remark,
    )


def _measure_images_per_s(beat: Beat | None, rows: Sequence[EpochMetrics]) -> float | None:
    """Return the training images per second of a running fold: in this epoch or, outside the training, in the last."""
    if beat is None:
        return None
    step_s = measure_steps(beat)
    if step_s is not None:
        return beat.batch_size / step_s
    return rows[-1].images_per_s if rows else None


def _measure_finished(attempts: Sequence[Attempt]) -> list[float]:
    """Return the seconds that folds took which were done at their first attempt."""
    return [
        (datetime.fromisoformat(attempt.ended) - datetime.fromisoformat(attempt.started)).total_seconds()
        for attempt in attempts
        if attempt.outcome == Outcome.DONE and attempt.number == 1 and attempt.ended is not None
    ]


def _find_missing_share(fold: FoldProgress) -> float:
    """Return the share of its epochs that a waiting fold has not trained yet."""
    return 1.0 if not fold.epochs else max(0.0, 1 - len(fold.scores) / fold.epochs)


def list_events(before: Progress | None, after: Progress) -> list[str]:
    """Return a line for each fold that has another state or has finished an epoch since `before`."""
    earlier = {} if before is None else {(fold.run, fold.fold): fold for fold in before.folds}
    lines = []
    for fold in after.folds:
        last = earlier.get((fold.run, fold.fold))
        if last is None or last.state is not fold.state or last.restarts != fold.restarts:
            lines.append(f"{fold.name}: {_describe_state(fold)}")
        elif len(fold.scores) > len(last.scores):
            lines.append(f"{fold.name}: {_describe_epoch(fold)}")
    return lines


def _describe_state(fold: FoldProgress) -> str:
    if fold.state is State.DONE:
        return f"done macro_f1={fold.best:.5f}"
    if fold.state is State.RUNNING:
        restarts = f", restart {fold.restarts}" if fold.restarts else ""
        return f"running{f' on {fold.slot}' if fold.slot else ''}{restarts}"
    return f"{fold.state}: {fold.remark}" if fold.remark else str(fold.state)


def _describe_epoch(fold: FoldProgress) -> str:
    total = f"/{fold.epochs}" if fold.epochs else ""
    left = "" if fold.left_s is None else f", {format_duration(fold.left_s)} left"
    return f"epoch {len(fold.scores)}{total} macro_f1={fold.scores[-1]:.5f}{left}"


def describe_totals(progress: Progress) -> str:
    """Return the title, how many folds are in each state, and how long they still take."""
    counts = progress.count_states()
    states = [f"{counts[state]} {state}" for state in State if counts[state] and state is not State.DONE]
    left = [] if progress.left_s is None else [f"{format_duration(progress.left_s)} left"]
    done = f"{counts[State.DONE]} of {len(progress.folds)} folds done"
    return f"{progress.title}: {', '.join([done, *states, *left])}"
