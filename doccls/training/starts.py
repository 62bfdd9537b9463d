"""Where a fold goes on: the newest whole state that was saved of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from accelerate import Accelerator

from doccls.errors import UserError
from doccls.experiment import Experiment
from doccls.oof.parts import find_damage
from doccls.run.artifacts import remove_leftovers
from doccls.run.history import remove_metrics_leftovers
from doccls.run.runlog import RunLog
from doccls.training.checkpoint import CheckpointError, read_best
from doccls.training.processes import on_main
from doccls.training.state import SavedState, StateError, read_state


class ResumeError(UserError):
    """A fold can't go on with what was saved of it."""


@dataclass(frozen=True)
class Start:
    """Where a fold goes on."""

    path: Path
    step: int
    """Optimizer steps done."""
    saved_s: float
    """Seconds since 1970."""


def find_starts(
    experiment: Experiment, folds: Sequence[int], accelerator: Accelerator, allow_change: bool, log: RunLog
) -> dict[int, Start]:
    """Where those of `folds` go on that were killed; what these left half-written is removed. All ranks must call.

    Raises:
        ResumeError: another number of processes saved them, and `allow_change` is not said.
    """

    def find() -> dict[int, Start]:
        world_size, identity, paths = accelerator.num_processes, experiment.identity, experiment.paths
        for fold in folds:
            for path in (*paths.last_states(fold), paths.best_checkpoint(fold), paths.part(fold)):
                remove_leftovers(path)
            remove_metrics_leftovers(paths, fold)
            if (damage := find_damage(paths.part(fold))) is not None:
                log.line(f"[WARNING] {damage}: fold {fold} is trained again")
        found = {
            fold: find_start(
                paths.last_states(fold), paths.best_checkpoint(fold), identity, fold, world_size, allow_change, log
            )
            for fold in folds
        }
        return {fold: start for fold, start in found.items() if start is not None}

    return on_main(accelerator, find)


def find_start(
    paths: Sequence[Path], best: Path, identity: str, fold: int, world_size: int, allow_change: bool, log: RunLog
) -> Start | None:
    """The newest whole state of the fold; what can't be used is told and passed over. The main process calls.

    A state holds the best epoch's logits, and not its weights: these lie in `best`, and must be whole too.

    Raises:
        ResumeError: it was saved by another number of processes, and `allow_change` is not said.
    """
    found: list[tuple[Path, SavedState]] = []
    for path in paths:
        if not path.exists():
            continue
        try:
            state = read_state(path)
        except StateError as error:
            log.line(f"[WARNING] {error}: passed over")
            continue
        if (state.identity, state.fold) != (identity, fold):
            log.line(f"[WARNING] {path}: of another experiment or fold: passed over")
        elif (lack := _find_lack(best, state)) is not None:
            log.line(f"[WARNING] {path}: passed over, since its best weights are not there: {lack}")
        else:
            found.append((path, state))
    if not found:
        return None
    path, state = max(found, key=lambda one: one[1].progress.step)
    if state.world_size != world_size and not allow_change:
        raise ResumeError(
            f"fold {fold} was saved at step {state.progress.step} by {state.world_size} processes, and these are "
            f"{world_size}. Start {state.world_size}; or say --allow-world-size-change: the same batches follow, but "
            f"not the same bits; or delete {path.parent}/last_fold{fold}_*, and the fold begins again"
        )
    return Start(path, state.progress.step, state.saved_s)


def _find_lack(path: Path, state: SavedState) -> str | None:
    """What is wrong with the best weights that the state relies on; those of a later epoch will be written anew."""
    if state.progress.best is None:
        return None
    try:
        best = read_best(path)
    except CheckpointError as error:
        return str(error)
    if (best.identity, best.fold) != (state.identity, state.fold) or best.epoch < state.progress.best.epoch:
        return f"{path}: of another experiment, fold or epoch"
    return None


def describe_start(start: Start, fold: int, steps_per_epoch: int, last_seen_s: float | None) -> str:
    """For the log; `last_seen_s` is when the process that was killed gave its last sign."""
    again_s = max(0.0, last_seen_s - start.saved_s) if last_seen_s is not None else None
    again = "" if again_s is None else f", {again_s:.0f} s of work done again"
    when = datetime.fromtimestamp(start.saved_s).strftime("%H:%M:%S")
    epoch = (start.step - 1) // steps_per_epoch + 1
    return f"[RESUME] fold={fold} from step {start.step} (epoch {epoch}), saved {when}{again}"
