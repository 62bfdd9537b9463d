"""Weights & Biases behind one small interface: one group a run, one W&B run a fold; it never stops training."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from doccls.config.schema import Config
from doccls.run.runlog import RunLog

_START_TIMEOUT_S = 20


class Tracker(Protocol):
    """Takes one fold's numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at an optimizer step."""


class _NoTracker:
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Nothing is tracked."""


class _WandbTracker:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)


@contextmanager
def track_fold(config: Config, run_dir: Path | None, fold: int, log: RunLog) -> Iterator[Tracker]:
    """A tracker for one fold; `run_dir` None (every process but the main one) tracks nothing."""
    if run_dir is None or not config.tracking.wandb:
        yield _NoTracker()
        return
    run = _start_wandb(config, run_dir, fold, log)
    if run is None:
        yield _NoTracker()
        return
    try:
        yield _WandbTracker(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _start_wandb(config: Config, run_dir: Path, fold: int, log: RunLog) -> Any:
    import wandb  # a second of imports that most runs don't need

    settings = wandb.Settings(
        console="off",
        silent=True,
        init_timeout=_START_TIMEOUT_S,
        disable_git=True,
        save_code=False,
        program="doccls.train",
    )
    for mode in ("online", "offline") if _has_key() else ("offline",):
        try:
            run = wandb.init(
                project=config.tracking.project or config.project.name,
                entity=config.tracking.entity,
                group=run_dir.name,
                name=f"{run_dir.name}-fold{fold}",
                job_type="fold",
                config=config.model_dump(mode="json", exclude={"provenance"}) | {"fold": fold},
                dir=run_dir,
                mode=mode,
                reinit="finish_previous",
                settings=settings,
            )
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            log.line(f"[TRACKING] W&B {mode} did not start ({type(error).__name__}); training goes on")
            continue
        log.line(f"[TRACKING] W&B {mode} | group={run_dir.name} name={run_dir.name}-fold{fold}")
        return run
    return None


def _has_key() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    import wandb

    return bool(wandb.api.api_key)
