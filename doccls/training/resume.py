"""A fold goes on where it was: saving its state beside the training, and taking it up."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import nn

from doccls.run.runlog import RunLog
from doccls.run.signals import Interrupted
from doccls.training.loop import Engine
from doccls.training.processes import await_all, gather_rows
from doccls.training.starts import Start
from doccls.training.state import Progress, SavedState, read_state, write_state

_EMA = "ema."


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


class StateKeeper:
    """Saves one fold's states, in turn over the older of its two files, beside the training."""

    def __init__(
        self,
        paths: Sequence[Path],
        start: Start | None,
        interval_s: float,
        accelerator: Accelerator,
        log: RunLog,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """`check_owner` is called before each write, and may raise."""
        newest = paths.index(start.path) if start is not None else -1
        self._paths, self._next = paths, (newest + 1) % len(paths)
        self._interval_s, self._accelerator, self._log = interval_s, accelerator, log
        self._check_owner = check_owner
        self._saved_s = time.monotonic()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="doccls-state")
        self._writing: Future[None] | None = None

    def is_due(self) -> bool:
        """Whether a state is to be saved; true on the main process alone, so that its clock decides."""
        return self._accelerator.is_main_process and time.monotonic() - self._saved_s >= self._interval_s

    def save(self, engine: Engine, identity: str, progress: Progress, wait: bool) -> None:
        """Save; with `wait` it is on disk when any rank returns. All ranks must call, the main process writes.

        A disk that takes no more ends nothing: a warning says what it said, and the file before stays.
        """
        buffers = gather_rows(self._accelerator, _pack_buffers(engine))
        self._saved_s = time.monotonic()
        if self._accelerator.is_main_process:
            self._begin(engine, identity, progress, buffers)
        if wait:
            self.settle()
            await_all(self._accelerator)

    def _begin(self, engine: Engine, identity: str, progress: Progress, buffers: torch.Tensor) -> None:
        """Copy the state and have it written beside the training."""
        self._check_owner()
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

    def settle(self) -> None:
        """Wait for what is being written; a failure is told."""
        if self._writing is None:
            return
        try:
            self._writing.result()
            self._next = (self._next + 1) % len(self._paths)
        except (OSError, TypeError) as error:  # TypeError: an optimizer that keeps what no file can hold
            self._log.line(f"[WARNING] the fold's state was not saved: {error}; the one before stays")
        self._writing = None

    def close(self) -> None:
        """Nothing is being written any more."""
        self.settle()
        self._writer.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after a stop, on which all ranks have agreed, none leaves before the state is on disk.

        Whoever started them may end those that outlive the first to leave.
        """
        self.close()
        if isinstance(error, Interrupted):
            await_all(self._accelerator)


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
