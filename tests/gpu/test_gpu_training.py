"""Training on a GPU completes with each precision, model and option, and resumes to the same bytes after a kill."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from gpu_programs import SAVED_STEP
from rank_launcher import launch_ranks
from tiny_runs import COUNT, RICH, Run, Trainer

EFFICIENTNET, SWIN = "model.name=test_efficientnet", "model.name=swin_tiny_patch4_window7_224"
SHORT = (
    "data.train_csv=folds.csv", "data.num_workers=0", "train.batch_size=8", "train.optimizer=adamw", "train.lr=3e-3",
    "train.log_interval=1",
)  # fmt: skip
ONE_FOLD = (*SHORT, "data.valid_fold=1", "train.epochs=3")
# With the tolerance between validated and predicted probabilities.
PRECISIONS = {"bf16": 2e-2, "fp16": 5e-3, "false": 1e-4}


def skip_fp16_on_cpu(device: str, precision: str) -> None:
    if device == "cpu" and precision == "fp16":
        pytest.skip("doccls refuses fp16 on a CPU")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fold_learns_and_predicts_all_rows(trainer: Trainer, device: str, precision: str) -> None:
    skip_fp16_on_cpu(device, precision)
    run = trainer.train(*SHORT, EFFICIENTNET, "data.valid_fold=1", "train.epochs=8", f"train.amp={precision}")
    losses = [row["train_loss"] for row in run.read_metrics()]
    assert losses[-1] < losses[0], losses
    predictions = run.predictions(1)
    assert len(predictions.indices_N) == 19 and np.isfinite(predictions.logits_NC).all()
    assert any(f"precision={'no' if precision == 'false' else precision}" in line for line in run.lines)
    assert any(line.startswith("[MODEL] kernels: deterministic=on") for line in run.lines)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_five_folds_are_merged(trainer: Trainer, device: str, precision: str) -> None:
    skip_fp16_on_cpu(device, precision)
    run = trainer.train(*SHORT, EFFICIENTNET, "data.train_csv=train.csv", "data.folds=5", f"train.amp={precision}")
    logits = np.load(run.root / "oof" / "oof_logits.npy")
    assert logits.shape == (COUNT, 4) and np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("model", "pooling"),
    [
        *((EFFICIENTNET, pooling) for pooling in ("null", "max", "avgmax", "catavgmax", "gem")),
        *((SWIN, pooling) for pooling in ("null", "gem")),
    ],
)
def test_killed_fold_resumes_to_the_same_bytes(trainer: Trainer, model: str, pooling: str) -> None:
    sets = (*ONE_FOLD, "train.epochs=2", model, f"model.pooling={pooling}", "model.drop_path_rate=0.1")
    uninterrupted = trainer.train(*sets, run_id="r")
    expected = uninterrupted.read_weights(1)
    folder = uninterrupted.folder  # used by all runs: it is in the config, and so in the checkpoint
    shutil.rmtree(folder)
    killed = trainer.run(*sets, run_id="r", folder=folder, program="gpu_programs:kill_in_step")
    assert killed.codes == [-9], killed.stderr
    resumed = trainer.train(*sets, run_id="r", folder=folder)
    expected_line = f"[RESUME] fold=1 from step {SAVED_STEP} "
    assert any(line.startswith(expected_line) for line in resumed.lines), "\n".join(resumed.lines)
    assert resumed.read_weights(1) == expected


@pytest.mark.timeout(400)  # two minutes on two cores
def test_compiled_model_trains(trainer: Trainer) -> None:
    run = trainer.train(*ONE_FOLD, EFFICIENTNET, "train.epochs=1", "train.compile=true")
    assert any("compile=on" in line for line in run.lines)
    assert np.isfinite(run.predictions(1).logits_NC).all()


def test_mixup_ema_and_accumulation_train(trainer: Trainer) -> None:
    run = trainer.train(*RICH, EFFICIENTNET, "data.valid_fold=1", "train.micro_batch_size=3")
    assert all(math.isfinite(row["train_loss"]) for row in run.read_metrics())
    assert len(run.predictions(1).indices_N) == 16


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_step_waits_for_the_gpu(trainer: Trainer, device: str, precision: str, mixup_alpha: float) -> None:
    """The CPU must run ahead between log lines, or the GPU idles."""
    skip_fp16_on_cpu(device, precision)
    sets = (
        "train.grad_clip_norm=1.0",
        "train.ema_decay=0.9",
        f"train.mixup_alpha={mixup_alpha}",
        "train.log_interval=100",
        f"train.amp={precision}",
    )
    trainer.train(*ONE_FOLD, *sets, EFFICIENTNET, program="gpu_programs:refuse_synchronization")


def test_steps_skipped_by_fp16_are_counted(trainer: Trainer, device: str) -> None:
    skip_fp16_on_cpu(device, "fp16")
    run = trainer.train(*ONE_FOLD, EFFICIENTNET, "train.amp=fp16", program="gpu_programs:with_large_scale")
    skipped = [line for line in run.lines if line.startswith("[EPOCH 1]") and "skipped_steps=" in line]
    assert skipped and "skipped_steps=0" not in skipped[0], skipped


@pytest.mark.parametrize("precision", PRECISIONS)
def test_predict_reproduces_validation_probabilities(
    trainer: Trainer, device: str, precision: str, tmp_path: Path
) -> None:
    skip_fp16_on_cpu(device, precision)
    run = trainer.train(*ONE_FOLD, EFFICIENTNET, f"train.amp={precision}")
    data, predictions = trainer.config.parent, run.predictions(1)
    (run.root / "oof" / "parts" / "fold1.safetensors").unlink()  # without OOF predictions nothing is calibrated
    arguments = ["predict", str(run.root), "--sample-csv", str(data / "train.csv"), "--image-dir", str(data / "train")]
    (done,) = launch_ranks("doccls.__main__:main", arguments, tmp_path / "predict", environment=trainer.environment)
    assert done.code == 0, done.stderr
    predicted = np.load(run.root / "test_probabilities.npy")
    exponents = np.exp(predictions.logits_NC - predictions.logits_NC.max(axis=1, keepdims=True))
    validated = exponents / exponents.sum(axis=1, keepdims=True)
    assert np.abs(predicted[predictions.indices_N] - validated).max() <= PRECISIONS[precision]


def test_process_with_hidden_gpu_is_rejected(trainer: Trainer) -> None:
    arguments, folder = trainer.arguments(ONE_FOLD, trainer.new_folder()), trainer.new_folder()
    variables = {"DOCCLS_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    run = Run(launch_ranks("doccls.train:main", arguments, folder, environment=variables), folder)
    assert run.codes == [1] and "this process was given a GPU" in run.stderr
