"""Several ranks on GPUs: each sample once, and the losses of one process."""

from __future__ import annotations

import numpy as np
import pytest
from rank_launcher import launch_ranks
from tiny_runs import COUNT, PLAIN, Run, Trainer

GROUP = {"ACCELERATE_USE_CPU": "false"}
"""For ranks that meet as `doccls-launch` has them meet on CPUs, and compute on GPUs."""
TRAINED_ALIKE = 5e-3
"""How far losses may lie apart whose sums were taken in another order, in float32."""


def train_pair(trainer: Trainer, program: str, **variables: str) -> Run:
    folder, told = trainer.new_folder(), {**trainer.environment, **variables}
    arguments = trainer.arguments((*PLAIN, "train.amp=false"), folder)
    run = Run(launch_ranks(program, arguments, folder / "console", 2, told), folder)
    assert run.codes == [0, 0], run.stderr
    return run


def assert_trained_alike(run: Run, trainer: Trainer) -> None:
    logits = np.load(run.root / "oof" / "oof_logits.npy")
    assert logits.shape == (COUNT, 4) and np.isfinite(logits).all()
    alone = trainer.train(*PLAIN, "train.amp=false")
    losses = [[row["train_loss"] for row in one.read_metrics()] for one in (run, alone)]
    np.testing.assert_allclose(*losses, rtol=TRAINED_ALIKE)


def test_two_ranks_share_one_gpu_over_gloo(trainer: Trainer, device: str) -> None:
    """As two machines of one GPU each."""
    alike = {**GROUP, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if device == "cuda" else {}
    assert_trained_alike(train_pair(trainer, "gpu_programs:meet_over_gloo", **alike), trainer)


def test_two_ranks_on_two_gpus_over_nccl(trainer: Trainer, device: str) -> None:
    import torch

    if device == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for each rank, and there are not two")
    assert_trained_alike(train_pair(trainer, "doccls.train:main", **GROUP), trainer)
