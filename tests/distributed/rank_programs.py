"""What ranks run in these tests beside `doccls.train` itself: programs that watch it, or one of its collectives."""

import functools
import hashlib
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from doccls.config import load_config, parse_override
from doccls.data.dataset import Batch
from doccls.data.sampler import BatchDivision, BatchPlace, BatchRequest, list_evaluation
from doccls.errors import UserError
from doccls.system.rank import MEETING_FILE
from doccls.train import main
from doccls.training import distributed as processes_room
from doccls.training import trainer as fold_room
from doccls.training.distributed import agree_on_stop, await_all, on_main, start_processes
from doccls.training.engine import RunContext
from doccls.training.evaluate import Normalizer, predict_logits

COUNTS = (0, 1, 2, 3, 7)
_T = TypeVar("_T")


def predict_counts(argv: list[str]) -> int:
    """argv = config, folder. Predict sets of 0 to 7 samples; each rank writes what it got of each."""
    accelerator = start_processes(load_config(Path(argv[0])))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    for count in COUNTS:
        samples = 3 * np.arange(count) + 1
        place, division = BatchPlace("predict", 0), BatchDivision(2 * world_size, world_size, None)
        batches = [_draw(request) for request in list_evaluation(place, samples, division, rank)]
        normalize = Normalizer((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), accelerator.device)
        indices, logits = predict_logits([_Echo()], batches, normalize, 3, accelerator)
        np.savez(Path(argv[1]) / f"count{count}_rank{rank}.npz", indices=indices, logits=logits[0])
    accelerator.end_training()
    return 0


def count_page_faults(argv: list[str]) -> int:
    """Train; say how many memory pages the kernel gives, after that, for the last ten of twenty tensors of 64 MiB."""
    code = main(argv)
    for number in range(20):
        if number == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**24).fill_(1.0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    return code


def act_on_main(argv: list[str]) -> int:
    """argv = config, folder. Let the main process answer, fail as a user would, and answer again."""
    accelerator = start_processes(load_config(Path(argv[0])))
    rank = accelerator.process_index
    told = [on_main(accelerator, lambda: ("answer of", rank))]
    try:
        on_main(accelerator, functools.partial(_refuse, rank))
    except UserError as error:
        told.append(str(error))
    told.append(on_main(accelerator, lambda: None))
    (Path(argv[1]) / f"rank{rank}.json").write_text(json.dumps(told))
    accelerator.end_training()
    return 0


def wait_patiently(argv: list[str]) -> int:
    """argv = config. Each in turn is later than a collective may take: where all wait for it, and then in one."""
    processes_room._MIN_TIMEOUT_S = processes_room._MARGIN_S = 1.0
    accelerator = start_processes(
        load_config(Path(argv[0]), overrides=[parse_override("train.collective_timeout_s=1")])
    )
    on_main(accelerator, lambda: time.sleep(4))
    if not accelerator.is_main_process:
        time.sleep(4)
    await_all(accelerator)
    print("patient", flush=True)
    if not accelerator.is_main_process:
        time.sleep(4)
    agree_on_stop(accelerator)
    return 0


def break_on_main(argv: list[str]) -> int:
    """argv = config. A bug (no UserError) strikes the main process inside `on_main`."""
    accelerator = start_processes(load_config(Path(argv[0])))
    try:
        on_main(accelerator, lambda: 1 // 0)
    finally:
        accelerator.end_training()
    return 0


def record_weights(argv: list[str]) -> int:
    """Train; each rank notes the digests of the validated modules, after each epoch's steps and at its validation."""
    notes: dict[str, list[list[str]]] = {"trained": [], "validated": []}

    def after_training(train_epoch: Callable[..., _T], engine: Any, *others: Any) -> _T:
        result = train_epoch(engine, *others)
        notes["trained"].append([_digest(module) for module in engine.modules.values()])
        return result

    def before_validation(predict: Callable[..., _T], models: list[nn.Module], *others: Any) -> _T:
        notes["validated"].append([_digest(model) for model in models])
        return predict(models, *others)

    _wrap(fold_room, "train_epoch", after_training)
    _wrap(fold_room, "predict_logits", before_validation)
    code = main(argv)
    _note(notes)
    return code


def record_failure(argv: list[str]) -> int:
    """Train; each rank notes what stopped its training."""

    def watch(train_epoch: Callable[..., _T], *others: Any) -> _T:
        try:
            return train_epoch(*others)
        except ValueError as error:
            _note([type(error).__name__, str(error)])
            raise

    _wrap(fold_room, "train_epoch", watch)
    return main(argv)


def lose_images(argv: list[str]) -> int:
    """Train, but the images named by DOCCLS_TEST_LOSE go after the data was checked and before it is trained on."""

    def lose(train_fold: Callable[..., _T], context: RunContext, *others: Any) -> _T:
        if context.accelerator.is_main_process:
            for name in os.environ["DOCCLS_TEST_LOSE"].split(","):
                (context.experiment.config.data.image_dir_train / name).unlink()
        context.accelerator.wait_for_everyone()
        return train_fold(context, *others)

    _wrap(fold_room, "train_fold", lose)
    return main(argv)


def meet_at_port(argv: list[str]) -> int:
    """As the ranks of a fold over several machines: at MASTER_PORT, not through a file."""
    del os.environ[MEETING_FILE]
    return main(argv)


class _Echo(nn.Module):
    """Logits that tell which page they are of."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        level = 255 * images.mean(dim=(1, 2, 3))
        return torch.stack([level, -level, level * level], dim=1)


def _draw(request: BatchRequest) -> Batch:
    indices = torch.tensor(request.indices)
    images = indices.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3)
    return Batch(images, torch.full_like(indices, -1), indices, request.place)


def _refuse(rank: int) -> None:
    raise UserError(f"refused by rank {rank}")


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _wrap(room: Any, name: str, around: Callable[..., Any]) -> None:
    setattr(room, name, functools.partial(around, getattr(room, name)))


def _note(value: Any) -> None:
    """Into this rank's file of the run's folder."""
    path = Path(os.environ["DOCCLS_TEST_FOLDER"]) / f"rank{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(value))
