"""Several ranks on GPUs predict each sample once and have the losses of one process."""

from __future__ import annotations

import numpy as np
import pytest
from rank_launcher import launch_ranks
from tiny_runs import COUNT, PLAIN, Run, Trainer

GROUP = {"ACCELERATE_USE_CPU": "false"}  # compute on GPUs, with the rendezvous that `doccls-launch` uses for CPU ranks
LOSS_RTOL = 5e-3  # for float32 sums in another order


def train_two_ranks(trainer: Trainer, program: str, **variables: str) -> Run:
    folder, environment = trainer.new_folder(), {**trainer.environment, **variables}
    arguments = trainer.arguments((*PLAIN, "train.amp=false"), folder)
    run = Run(launch_ranks(program, arguments, folder / "console", 2, environment), folder)
    assert run.codes == [0, 0], run.stderr
    return run


def assert_same_losses(run: Run, trainer: Trainer) -> None:
    logits = np.load(run.root / "oof" / "oof_logits.npy")
    assert logits.shape == (COUNT, 4) and np.isfinite(logits).all()
    alone = trainer.train(*PLAIN, "train.amp=false")
    losses = [[row["train_loss"] for row in each.read_metrics()] for each in (run, alone)]
    np.testing.assert_allclose(*losses, rtol=LOSS_RTOL)


def test_two_ranks_share_one_gpu_over_gloo(trainer: Trainer, device: str) -> None:
    """Each rank acts as the only one on its machine."""
    variables = {**GROUP, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if device == "cuda" else {}
    assert_same_losses(train_two_ranks(trainer, "gpu_programs:train_over_gloo", **variables), trainer)


def test_two_ranks_on_two_gpus_over_nccl(trainer: Trainer, device: str) -> None:
    import torch

    if device == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs one GPU per rank; this machine has fewer than two")
    assert_same_losses(train_two_ranks(trainer, "doccls.train:main", **GROUP), trainer)
