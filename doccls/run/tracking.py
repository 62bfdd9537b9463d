"""Weights & Biases behind one small interface: one group a run, one W&B run a fold; it never stops training."""

import netrc
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

from doccls.config.schema import Config
from doccls.run.runlog import RunLog
from doccls.run.signals import ending_at_once

_Mode = Literal["online", "offline", "disabled"]
_START_TIMEOUT_S = 20
_CONNECT_TIMEOUT_S = 3


class Tracker(Protocol):
    """Takes one fold's numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at an optimizer step."""


class _NoTracker:
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Nothing is tracked."""


class _WandbTracker:
    """Passes numbers on; whatever W&B raises is told once, and training goes on without it."""

    def __init__(self, run: Any, log: RunLog) -> None:
        self._run = run
        self._log = log

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._attempt(lambda: self._run.log(dict(values), step=step))

    def finish(self, exit_code: int) -> None:
        self._attempt(lambda: self._run.finish(exit_code=exit_code))

    def _attempt(self, act: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 (a tracker must not end a training of days, whatever ails it)
            self._log.line(f"[TRACKING] W&B failed ({type(error).__name__}: {error}); training goes on without it")
            self._run = None


@contextmanager
def track_fold(config: Config, run_dir: Path | None, fold: int, log: RunLog) -> Iterator[Tracker]:
    """A tracker for one fold; `run_dir` None (every process but the main one) tracks nothing."""
    if run_dir is None or not config.tracking.wandb:
        yield _NoTracker()
        return
    with ending_at_once():  # it may wait long for a server
        run = _start_wandb(config, run_dir, fold, log)
    if run is None:
        yield _NoTracker()
        return
    tracker = _WandbTracker(run, log)
    try:
        yield tracker
    except BaseException:
        tracker.finish(exit_code=1)
        raise
    tracker.finish(exit_code=0)


def _start_wandb(config: Config, run_dir: Path, fold: int, log: RunLog) -> Any:
    import wandb  # a second of imports that most runs don't need

    for mode in _choose_modes():
        try:
            settings = wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_START_TIMEOUT_S,
                disable_git=True,
                save_code=False,
                program="doccls.train",
            )
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
        except Exception as error:  # noqa: BLE001 (as above)
            log.line(f"[TRACKING] W&B {mode} did not start ({type(error).__name__}); training goes on")
            continue
        log.line(f"[TRACKING] W&B {mode} | group={run_dir.name} name={run_dir.name}-fold{fold}")
        return run
    return None


def _choose_modes() -> tuple[_Mode, ...]:
    """Online, if there is a key and the server answers, with offline to fall back on; else offline at once."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return ("disabled",)
    if os.environ.get("WANDB_MODE") == "offline":
        return ("offline",)
    import wandb

    try:
        url = urlsplit(wandb.Settings().base_url)
    except ValueError:  # the environment holds settings that W&B refuses
        return ("offline",)
    return ("online", "offline") if url.hostname and _has_key(url.hostname) and _answers(url) else ("offline",)


def _has_key(host: str) -> bool:
    """From the environment or .netrc. (`wandb.login` would ask the server, and wait long where there is none.)"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        stored = netrc.netrc(os.environ.get("NETRC"))
        return any(stored.authenticators(name) is not None for name in (host, "api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(url: SplitResult) -> bool:
    if getproxies():  # the way out is not a plain connection: leave it to W&B to find out
        return True
    try:
        with socket.create_connection((url.hostname, url.port or 443), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
