"""Resuming a fold: find its resume point, restore it, and save checkpoints in the background while it trains."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import torch

from doccls.oof.predictions import find_damage
from doccls.run.metrics_log import remove_metrics_leftovers
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import remove_leftovers
from doccls.system.signals import Interrupted
from doccls.training.checkpoint import (
    BestWeights,
    ResumeCheckpoint,
    ResumePoint,
    find_resume_point,
    read_resume,
    write_best,
    write_resume,
)
from doccls.training.distributed import await_all, gather_rows, has_scaler, on_main
from doccls.training.engine import Engine, FoldProgress, LossMeter, RunContext


def find_resume_points(context: RunContext, folds: Sequence[int], allow_change: bool) -> dict[int, ResumePoint]:
    """Find where interrupted folds resume, and remove the temporary files that they left. All ranks must call.

    Raises:
        UserError: another number of processes saved them, and `allow_change` is false.
    """
    experiment = context.experiment

    def find() -> dict[int, ResumePoint]:
        world_size, fingerprint, paths = context.accelerator.num_processes, experiment.fingerprint, experiment.paths
        for fold in folds:
            for path in (*paths.resume_checkpoints(fold), paths.best_checkpoint(fold), paths.predictions(fold)):
                remove_leftovers(path)
            remove_metrics_leftovers(paths, fold)
            if (damage := find_damage(paths.predictions(fold))) is not None:
                context.log.line(f"[WARNING] {damage}: fold {fold} will be retrained")
        points = {
            fold: find_resume_point(paths, fingerprint, fold, world_size, allow_change, context.log) for fold in folds
        }
        return {fold: point for fold, point in points.items() if point is not None}

    return on_main(context.accelerator, find)


def describe_resume(point: ResumePoint, fold: int, steps_per_epoch: int, last_beat_s: float | None) -> str:
    """Format a log line; `last_beat_s` is the time of the interrupted process's last heartbeat."""
    repeated = "" if last_beat_s is None else f", repeating {max(0.0, last_beat_s - point.saved_s):.0f} s of work"
    when = datetime.fromtimestamp(point.saved_s).strftime("%H:%M:%S")
    epoch = (point.step - 1) // steps_per_epoch + 1
    return f"[RESUME] fold={fold} from step {point.step} (epoch {epoch}), saved {when}{repeated}"


def restore(engine: Engine, point: ResumePoint) -> FoldProgress:
    """Load the checkpoint into the engine and return the fold's progress. All ranks must call.

    Raises:
        TensorFileError: the file no longer exists, or not on this machine.
    """
    checkpoint = read_resume(point.path)
    assert checkpoint.step == point.step
    for name, module in engine.modules.items():
        module.load_state_dict(checkpoint.model[name])
    _load_buffers(engine, checkpoint.buffers_RB)
    _load_optimizer(engine.optimizer, checkpoint.optimizer)
    if checkpoint.scaler:
        engine.accelerator.scaler.load_state_dict(checkpoint.scaler)
    meter = LossMeter(list(checkpoint.losses), checkpoint.skipped_steps)
    best = checkpoint.best if point.keeps_best else None
    return FoldProgress(checkpoint.step, meter, best, list(checkpoint.rows))


class Checkpointer:
    """A background thread that saves one fold's best weights and resume checkpoints, one at a time.

    A resume checkpoint replaces the older of two, so that the newer one is never at risk, and is written only after the
    best weights on which it depends. Best weights that are still queued are replaced by better ones.
    """

    def __init__(
        self,
        engine: Engine,
        paths: RunPaths,
        fingerprint: str,
        resume_point: ResumePoint | None,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the checkpointer of a fold that resumes at `resume_point`, if any.

        `check_owner` is called before each write and may raise.
        """
        self._engine, self._fingerprint, self._check_owner = engine, fingerprint, check_owner
        self._best_path = paths.best_checkpoint(engine.plan.fold)
        self._paths = paths.resume_checkpoints(engine.plan.fold)
        newest = self._paths.index(resume_point.path) if resume_point is not None else -1
        self._next = (newest + 1) % len(self._paths)
        self._saved_s = time.monotonic()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="doccls-checkpoint")
        self._pending_resume: Future[None] | None = None
        self._pending_best: list[Future[None]] = []
        self._queued_best: BestWeights | None = None
        self._best_failed = False  # whether the newest best weights are missing on disk; for the writer's thread alone
        self._lock = Lock()

    def is_due(self) -> bool:
        """Return whether the interval has passed; true only on the main process, whose clock decides."""
        interval_s = self._engine.config.checkpoint_interval_s
        return self._engine.accelerator.is_main_process and time.monotonic() - self._saved_s >= interval_s

    def save(self, progress: FoldProgress, wait: bool = False) -> None:
        """Save a resume checkpoint; with `wait`, no rank returns before it is on disk. All ranks must call.

        A failed write, such as to a full disk, is only logged as a warning, and the previous file is kept.
        """
        accelerator = self._engine.accelerator
        buffers = gather_rows(accelerator, _pack_buffers(self._engine))
        self._saved_s = time.monotonic()
        if accelerator.is_main_process:
            self._check_owner()
            self._finish_resume_write()
            checkpoint = self._capture(progress, buffers)
            self._pending_resume = self._writer.submit(self._write_resume, self._paths[self._next], checkpoint)
        if wait:
            self._finish_resume_write()
            await_all(accelerator)

    def save_best(self, best: BestWeights) -> None:
        """Queue the weights to be written. Only the main process may call.

        Raises:
            OSError: earlier ones could not be written.
        """
        self.check_best()
        with self._lock:
            self._queued_best = best
        self._pending_best.append(self._writer.submit(self._write_best))

    def check_best(self, wait: bool = False) -> None:
        """Check the writes of best weights that have ended; with `wait`, all of them.

        Raises:
            OSError: the weights could not be written.
        """
        while self._pending_best and (wait or self._pending_best[0].done()):
            self._pending_best.pop(0).result()

    def _write_best(self) -> None:
        with self._lock:
            best, self._queued_best = self._queued_best, None
        if best is not None:
            self._check_owner()  # checked now, since the process may have been suspended after queuing this
            self._best_failed = True
            write_best(self._best_path, best)
            self._best_failed = False

    def _write_resume(self, path: Path, checkpoint: ResumeCheckpoint) -> None:
        if self._best_failed:
            raise OSError("the best weights that it depends on could not be saved")
        self._check_owner()
        write_resume(path, checkpoint)

    def _capture(self, progress: FoldProgress, buffers_RB: torch.Tensor) -> ResumeCheckpoint:
        engine, accelerator = self._engine, self._engine.accelerator
        return ResumeCheckpoint(
            fingerprint=self._fingerprint,
            fold=engine.plan.fold,
            world_size=accelerator.num_processes,
            precision=accelerator.mixed_precision,
            saved_s=time.time(),
            step=progress.step,
            losses=tuple(progress.meter.losses),
            skipped_steps=progress.meter.skipped,
            rows=tuple(progress.rows),
            best=progress.best,
            model={name: copy_to_cpu(module.state_dict()) for name, module in engine.modules.items()},
            buffers_RB=buffers_RB,
            optimizer=copy_to_cpu(engine.optimizer.state_dict()),
            scaler=accelerator.scaler.state_dict() if has_scaler(accelerator) else {},
        )

    def _finish_resume_write(self) -> None:
        """Wait until the resume checkpoint is written; log a failure."""
        if self._pending_resume is None:
            return
        try:
            self._pending_resume.result()
            self._next = (self._next + 1) % len(self._paths)
        except (OSError, TypeError) as error:  # TypeError: the optimizer's state contains a value that can't be stored
            log = self._engine.log
            log.line(f"[WARNING] a resume checkpoint was not saved: {error}; the previous one is kept")
        self._pending_resume = None

    def close(self) -> None:
        """Wait until nothing is being written; log best weights that could not be saved."""
        self._finish_resume_write()
        self._writer.shutdown()
        for write in self._pending_best:
            if (error := write.exception()) is not None:
                self._engine.log.line(f"[WARNING] the best weights were not saved: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after a stop, on which all ranks have agreed, no rank returns before the checkpoint is on disk.

        Whatever started the ranks may kill the others once the first has exited.
        """
        self.close()
        if isinstance(error, Interrupted):
            await_all(self._engine.accelerator)


def average_buffers(engine: Engine) -> None:
    """Set all ranks' floating buffers (BatchNorm's statistics) to their mean. All ranks must call.

    It is computed in float64, where the mean of equal numbers is exact: a fold that resumes at an epoch's end repeats
    this.
    """
    if engine.accelerator.num_processes > 1:
        _load_buffers(engine, gather_rows(engine.accelerator, _pack_buffers(engine)).mean(0, keepdim=True))


def copy_to_cpu(tree: Any) -> Any:
    """Copy a tree of containers with its tensors to the CPU, where training does not change them."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: copy_to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copy_to_cpu(value) for value in tree]
    return tree


def _list_buffers(engine: Engine) -> list[torch.Tensor]:
    """List the buffers that may differ between ranks: BatchNorm's running statistics."""
    return [buffer for module in engine.modules.values() for buffer in module.buffers() if buffer.is_floating_point()]


def _pack_buffers(engine: Engine) -> torch.Tensor:
    """Concatenate this rank's buffers as (n,) float64 on the CPU, which represents every smaller float exactly."""
    flat = [buffer.detach().reshape(-1).cpu().double() for buffer in _list_buffers(engine)]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *flat])


def _load_buffers(engine: Engine, buffers_RB: torch.Tensor) -> None:
    """Load this rank's buffers or, if another number of ranks saved them, their mean, as before a validation."""
    accelerator = engine.accelerator
    is_same_size = len(buffers_RB) == accelerator.num_processes
    own = buffers_RB[accelerator.process_index] if is_same_size else buffers_RB.mean(0)
    offset = 0
    for buffer in _list_buffers(engine):
        buffer.copy_(own[offset : offset + buffer.numel()].view(buffer.shape))
        offset += buffer.numel()


def _load_optimizer(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load the state with moments in their own dtype and in the memory layout of their weights.

    torch's own `load_state_dict` gives them the weights' dtype and the saved layout, which changes roundings and so the
    last bits.
    """
    optimizer.load_state_dict(state_dict)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, saved in state_dict["state"].items():
        parameter = parameters[number]
        for name, value in saved.items():
            loaded = optimizer.state[parameter][name]
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                loaded = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor):
                loaded = value.to(loaded.device)
            optimizer.state[parameter][name] = loaded
