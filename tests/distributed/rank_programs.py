"""Programs that ranks run in these tests: `doccls.train` under observation, or a single collective."""

import functools
import hashlib
import json
import multiprocessing
import os
import resource
import tempfile
import threading
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
from doccls.training import distributed as distributed_module
from doccls.training import trainer as trainer_module
from doccls.training import validation as validation_module
from doccls.training.distributed import agree_on_stop, await_all, on_main, start_processes
from doccls.training.engine import RunContext
from doccls.training.evaluate import Normalizer, predict_logits

COUNTS = (0, 1, 2, 3, 7)
_T = TypeVar("_T")


def predict_counts(argv: list[str]) -> int:
    """Predict sets of 0 to 7 samples; each rank writes the result for each set. argv = config, folder."""
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
    """Train, then print the page faults that the last ten of twenty tensors of 64 MiB cause."""
    code = main(argv)
    for number in range(20):
        if number == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**24).fill_(1.0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    return code


def return_and_raise_on_main(argv: list[str]) -> int:
    """Let the main process return a value, raise a UserError, and return a value. argv = config, folder."""
    accelerator = start_processes(load_config(Path(argv[0])))
    rank = accelerator.process_index
    answers = [on_main(accelerator, lambda: ("answer of", rank))]
    try:
        on_main(accelerator, functools.partial(_refuse, rank))
    except UserError as error:
        answers.append(str(error))
    answers.append(on_main(accelerator, lambda: None))
    (Path(argv[1]) / f"rank{rank}.json").write_text(json.dumps(answers))
    accelerator.end_training()
    return 0


def exceed_collective_timeout(argv: list[str]) -> int:
    """Exceed the collective timeout: on the main process, before `await_all`, and in a collective. argv = config."""
    distributed_module._MIN_TIMEOUT_S = distributed_module._MARGIN_S = 1.0
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


def fail_on_main(argv: list[str]) -> int:
    """Raise an error that is not a UserError on the main process inside `on_main`. argv = config."""
    accelerator = start_processes(load_config(Path(argv[0])))
    try:
        on_main(accelerator, lambda: 1 // 0)
    finally:
        accelerator.end_training()
    return 0


def record_weights(argv: list[str]) -> int:
    """Train; each rank records the digests of the validated modules after each epoch's steps and at its validation."""
    digests: dict[str, list[list[str]]] = {"trained": [], "validated": []}

    def after_training(train_epoch: Callable[..., _T], engine: Any, *arguments: Any) -> _T:
        result = train_epoch(engine, *arguments)
        digests["trained"].append([_digest(module) for module in engine.modules.values()])
        return result

    def before_validation(predict: Callable[..., _T], models: list[nn.Module], *arguments: Any) -> _T:
        digests["validated"].append([_digest(model) for model in models])
        return predict(models, *arguments)

    _wrap(trainer_module, "train_epoch", after_training)
    _wrap(validation_module, "predict_logits", before_validation)
    code = main(argv)
    _record(digests)
    return code


def record_failure(argv: list[str]) -> int:
    """Train; each rank records the error that stopped its training."""

    def record_error(train_epoch: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return train_epoch(*arguments)
        except ValueError as error:
            _record([type(error).__name__, str(error)])
            raise

    _wrap(trainer_module, "train_epoch", record_error)
    return main(argv)


def delete_images(argv: list[str]) -> int:
    """Train; delete the images named by DOCCLS_TEST_LOSE after the data check and before training."""

    def delete(train_fold: Callable[..., _T], context: RunContext, *arguments: Any) -> _T:
        if context.accelerator.is_main_process:
            for name in os.environ["DOCCLS_TEST_LOSE"].split(","):
                (context.experiment.config.data.image_dir_train / name).unlink()
        context.accelerator.wait_for_everyone()
        return train_fold(context, *arguments)

    _wrap(trainer_module, "train_fold", delete)
    return main(argv)


def rendezvous_at_port(argv: list[str]) -> int:
    """Train with a rendezvous at MASTER_PORT instead of a file, as for a fold over several machines."""
    del os.environ[MEETING_FILE]
    return main(argv)


def train_with_default_temporary_folder(argv: list[str]) -> int:
    """Train with what TMPDIR says, not the folders of the process from which this one was forked."""
    tempfile.tempdir = None
    multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    return main(argv)


def train_in_thread(argv: list[str]) -> int:
    """Train in another thread than the main one, as a notebook or a service may."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(argv)))
    thread.start()
    thread.join()
    return codes[0]


class _Echo(nn.Module):
    """A model whose logits identify the page."""

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


def _wrap(module: Any, name: str, wrapper: Callable[..., Any]) -> None:
    setattr(module, name, functools.partial(wrapper, getattr(module, name)))


def _record(value: Any) -> None:
    """Write the value to this rank's file in the run's folder."""
    path = Path(os.environ["DOCCLS_TEST_FOLDER"]) / f"rank{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(value))
