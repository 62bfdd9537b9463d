"""A fold goes on where it was: saving its state beside the training, finding the newest whole one, taking it up."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from doccls.errors import UserError
from doccls.run.runlog import RunLog
from doccls.training.checkpoint import CheckpointError, read_best
from doccls.training.loop import Engine
from doccls.training.processes import gather_rows
from doccls.training.state import Progress, SavedState, StateError, read_state, write_state

_EMA = "ema."


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


def take_up(engine: Engine, start: Start) -> Progress:
    """Put the saved state into the engine; how far that is. All ranks must call.

    Raises:
        StateError: the file is not there any more, or not on this machine.
    """
    state = read_state(start.path)
    assert state.progress.step == start.step
    engine.bare_model.load_state_dict({name: one for name, one in state.model.items() if not name.startswith(_EMA)})
    if engine.ema is not None:
        own = {name.removeprefix(_EMA): one for name, one in state.model.items() if name.startswith(_EMA)}
        engine.ema.module.load_state_dict(own)
    _put_buffers(engine, state.buffers_RB)
    _load_optimizer(engine.optimizer, state.optimizer)
    if state.scaler:
        engine.accelerator.scaler.load_state_dict(state.scaler)
    return state.progress


def describe_start(start: Start, fold: int, steps_per_epoch: int, last_seen_s: float | None) -> str:
    """For the log; `last_seen_s` is when the process that was killed gave its last sign."""
    again_s = max(0.0, last_seen_s - start.saved_s) if last_seen_s is not None else None
    again = "" if again_s is None else f", {again_s:.0f} s of work done again"
    when = datetime.fromtimestamp(start.saved_s).strftime("%H:%M:%S")
    epoch = (start.step - 1) // steps_per_epoch + 1
    return f"[RESUME] fold={fold} from step {start.step} (epoch {epoch}), saved {when}{again}"


class StateKeeper:
    """Saves one fold's states, in turn over the older of its two files, beside the training."""

    def __init__(
        self, paths: Sequence[Path], start: Start | None, interval_s: float, accelerator: Accelerator, log: RunLog
    ) -> None:
        newest = paths.index(start.path) if start is not None else -1
        self._paths, self._next = paths, (newest + 1) % len(paths)
        self._interval_s, self._accelerator, self._log = interval_s, accelerator, log
        self._saved_s = time.monotonic()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="doccls-state")
        self._writing: Future[None] | None = None

    def is_due(self) -> bool:
        """Whether a state is to be saved; true on the main process alone, so that its clock decides."""
        return self._accelerator.is_main_process and time.monotonic() - self._saved_s >= self._interval_s

    def save(self, engine: Engine, identity: str, progress: Progress, wait: bool) -> None:
        """Save; with `wait` it is on disk at the return. All ranks must call, the main process writes.

        A disk that takes no more ends nothing: a warning says what it said, and the file before stays.
        """
        buffers = gather_rows(self._accelerator, _pack_buffers(engine))
        self._saved_s = time.monotonic()
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        kept = {} if engine.ema is None else engine.ema.module.state_dict()
        ema = {_EMA + name: one for name, one in kept.items()}
        state = SavedState(
            identity=identity,
            fold=engine.plan.fold,
            world_size=self._accelerator.num_processes,
            precision=self._accelerator.mixed_precision,
            saved_s=time.time(),
            progress=progress,
            model=_copy(engine.bare_model.state_dict() | ema),
            buffers_RB=buffers,
            optimizer=_copy(engine.optimizer.state_dict()),
            scaler=scaler.state_dict() if scaler is not None and scaler.is_enabled() else {},
        )
        self.settle()
        self._writing = self._writer.submit(write_state, self._paths[self._next], state)
        self._next = (self._next + 1) % len(self._paths)
        if wait:
            self.settle()

    def settle(self) -> None:
        """Wait for what is being written; a failure is told."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except (OSError, TypeError) as error:  # TypeError: an optimizer that keeps what no file can hold
            self._log.line(f"[WARNING] the fold's state was not saved: {error}; training goes on")
        self._writing = None

    def close(self) -> None:
        """Nothing is being written any more."""
        self.settle()
        self._writer.shutdown()


def remove_states(paths: Sequence[Path]) -> None:
    """The fold is done: nothing will go on from them."""
    for path in paths:
        path.unlink(missing_ok=True)


def _copy(tree: Any) -> Any:
    """The same with its tensors on the CPU, where the training does not touch them."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_copy(value) for value in tree]
    return tree


def _list_buffers(engine: Engine) -> list[torch.Tensor]:
    """What ranks may hold different values of: the running statistics of BatchNorm."""
    modules: list[nn.Module] = [engine.bare_model, *([] if engine.ema is None else [engine.ema.module])]
    return [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]


def _pack_buffers(engine: Engine) -> torch.Tensor:
    """(n,) float64 on the CPU, which holds every smaller float exactly."""
    return torch.cat([torch.zeros(0), *(one.detach().reshape(-1).cpu() for one in _list_buffers(engine))]).double()


def _put_buffers(engine: Engine, buffers_RB: torch.Tensor) -> None:
    """This rank's own; of another number of ranks their mean, as before a validation."""
    accelerator = engine.accelerator
    same = len(buffers_RB) == accelerator.num_processes
    own = buffers_RB[accelerator.process_index] if same else buffers_RB.mean(0)
    place = 0
    for buffer in _list_buffers(engine):
        buffer.copy_(own[place : place + buffer.numel()].view(buffer.shape))
        place += buffer.numel()


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """torch's `load_state_dict`, with moments in their own dtype and the memory layout of their weights.

    torch gives them the weights' dtype and the saved layout: other roundings, and other last bits.
    """
    optimizer.load_state_dict(saved)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in saved["state"].items():
        parameter = parameters[number]
        for name, value in state.items():
            loaded = optimizer.state[parameter][name]
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                loaded = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor):
                loaded = value.to(loaded.device)
            optimizer.state[parameter][name] = loaded
