"""A fold's checkpoints while it trains: finding where it resumes, restoring that, and saving beside the training."""

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
    """Where those of `folds` resume that were killed; what these left half-written is removed. All ranks must call.

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
                context.log.line(f"[WARNING] {damage}: fold {fold} is trained again")
        found = {
            fold: find_resume_point(paths, fingerprint, fold, world_size, allow_change, context.log) for fold in folds
        }
        return {fold: point for fold, point in found.items() if point is not None}

    return on_main(context.accelerator, find)


def describe_resume(point: ResumePoint, fold: int, steps_per_epoch: int, last_seen_s: float | None) -> str:
    """For the log; `last_seen_s` is when the process that was killed gave its last sign."""
    again_s = max(0.0, last_seen_s - point.saved_s) if last_seen_s is not None else None
    again = "" if again_s is None else f", {again_s:.0f} s of work done again"
    when = datetime.fromtimestamp(point.saved_s).strftime("%H:%M:%S")
    epoch = (point.step - 1) // steps_per_epoch + 1
    return f"[RESUME] fold={fold} from step {point.step} (epoch {epoch}), saved {when}{again}"


def restore(engine: Engine, point: ResumePoint) -> FoldProgress:
    """Put what was saved into the engine; how far that is. All ranks must call.

    Raises:
        TensorFileError: the file is not there any more, or not on this machine.
    """
    saved = read_resume(point.path)
    assert saved.step == point.step
    for name, module in engine.modules.items():
        module.load_state_dict(saved.model[name])
    _put_buffers(engine, saved.buffers_RB)
    _load_optimizer(engine.optimizer, saved.optimizer)
    if saved.scaler:
        engine.accelerator.scaler.load_state_dict(saved.scaler)
    best = saved.best if point.keeps_best else None
    return FoldProgress(saved.step, LossMeter(list(saved.losses), saved.skipped_steps), best, list(saved.rows))


class Checkpointer:
    """Saves one fold's best weights and resume checkpoints, one after the other, in a thread beside the training.

    A resume checkpoint replaces the older of two, so that the newer one is never at risk. It is on disk after the best
    weights that it relies on. Best weights that still wait for the disk give way to better ones.
    """

    def __init__(
        self,
        engine: Engine,
        paths: RunPaths,
        fingerprint: str,
        start: ResumePoint | None,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """`start` is where the fold resumes. `check_owner` is called before each write, and may raise."""
        self._engine, self._fingerprint, self._check_owner = engine, fingerprint, check_owner
        self._best_path = paths.best_checkpoint(engine.plan.fold)
        self._paths = paths.resume_checkpoints(engine.plan.fold)
        newest = self._paths.index(start.path) if start is not None else -1
        self._next = (newest + 1) % len(self._paths)
        self._saved_s = time.monotonic()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="doccls-checkpoint")
        self._writing: Future[None] | None = None
        self._writing_best: list[Future[None]] = []
        self._waiting_best: BestWeights | None = None
        self._best_failed = False
        """Whether the newest best weights that were to be written are not on disk; the writer's thread alone asks."""
        self._lock = Lock()

    def is_due(self) -> bool:
        """Whether the interval is over; true on the main process alone, so that its clock decides."""
        interval_s = self._engine.config.checkpoint_interval_s
        return self._engine.accelerator.is_main_process and time.monotonic() - self._saved_s >= interval_s

    def save(self, progress: FoldProgress, wait: bool = False) -> None:
        """Save a resume checkpoint; with `wait` it is on disk when any rank returns. All ranks must call.

        A disk that takes no more ends nothing: a warning says what it said, and the file before stays.
        """
        accelerator = self._engine.accelerator
        buffers = gather_rows(accelerator, _pack_buffers(self._engine))
        self._saved_s = time.monotonic()
        if accelerator.is_main_process:
            self._check_owner()
            self._settle()
            checkpoint = self._capture(progress, buffers)
            self._writing = self._writer.submit(self._write_resume, self._paths[self._next], checkpoint)
        if wait:
            self._settle()
            await_all(accelerator)

    def save_best(self, best: BestWeights) -> None:
        """Have the weights written. The main process calls.

        Raises:
            OSError: earlier ones could not be.
        """
        self.check_best()
        with self._lock:
            self._waiting_best = best
        self._writing_best.append(self._writer.submit(self._write_best))

    def check_best(self, wait: bool = False) -> None:
        """With `wait`, the best weights are on disk afterwards.

        Raises:
            OSError: they could not be written.
        """
        while self._writing_best and (wait or self._writing_best[0].done()):
            self._writing_best.pop(0).result()

    def _write_best(self) -> None:
        with self._lock:
            best, self._waiting_best = self._waiting_best, None
        if best is not None:
            self._check_owner()  # now, since the process may have stood still after it had queued this
            self._best_failed = True
            write_best(self._best_path, best)
            self._best_failed = False

    def _write_resume(self, path: Path, checkpoint: ResumeCheckpoint) -> None:
        if self._best_failed:
            raise OSError("the best weights that it relies on could not be saved")
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

    def _settle(self) -> None:
        """Wait for the resume checkpoint that is being written; a failure is logged."""
        if self._writing is None:
            return
        try:
            self._writing.result()
            self._next = (self._next + 1) % len(self._paths)
        except (OSError, TypeError) as error:  # TypeError: an optimizer that keeps what no file can hold
            log = self._engine.log
            log.line(f"[WARNING] a resume checkpoint was not saved: {error}; the one before it is kept")
        self._writing = None

    def close(self) -> None:
        """Nothing is being written any more; best weights that could not be saved are logged."""
        self._settle()
        self._writer.shutdown()
        for writing in self._writing_best:
            if (error := writing.exception()) is not None:
                self._engine.log.line(f"[WARNING] the best weights were not saved: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after a stop, on which all ranks have agreed, none leaves before its checkpoint is on disk.

        Whoever started them may end those that outlive the first to leave.
        """
        self.close()
        if isinstance(error, Interrupted):
            await_all(self._engine.accelerator)


def average_buffers(engine: Engine) -> None:
    """Give all ranks the mean of their floating buffers (BatchNorm's statistics). All ranks must call.

    In float64, where the mean of equal numbers is just that number: a fold that resumes at an epoch's end repeats it.
    """
    if engine.accelerator.num_processes > 1:
        _put_buffers(engine, gather_rows(engine.accelerator, _pack_buffers(engine)).mean(0, keepdim=True))


def copy_to_cpu(tree: Any) -> Any:
    """The same with its tensors on the CPU, where the training does not touch them."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: copy_to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copy_to_cpu(value) for value in tree]
    return tree


def _list_buffers(engine: Engine) -> list[torch.Tensor]:
    """What ranks may hold different values of: the running statistics of BatchNorm."""
    return [buffer for module in engine.modules.values() for buffer in module.buffers() if buffer.is_floating_point()]


def _pack_buffers(engine: Engine) -> torch.Tensor:
    """(n,) float64 on the CPU, which holds every smaller float exactly."""
    rows = [buffer.detach().reshape(-1).cpu().double() for buffer in _list_buffers(engine)]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *rows])


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
