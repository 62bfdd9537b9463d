"""One run at world sizes 1, 2 and 3: the same global batches, each row once, each line and file written once."""

import re

import numpy as np
import pytest
from sklearn.metrics import f1_score
from tiny_runs import COUNT, FOLD_SIZES, PLAIN, Run, Trainer

SIZES = (1, 2, 3)
FOLDS = range(len(FOLD_SIZES))


def _mask(line: str) -> str:
    """Mask what may differ between runs: ids, paths, numbers."""
    line = re.sub(r"v001-[0-9a-f]{6}|run\d\d|run_\d+-\d+_", "*", line.replace("device=cpu:0", "device=cpu"))
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", line)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("fold", FOLDS)
def test_step_losses_are_the_same_at_each_world_size(plain_runs: dict[int, Run], world_size: int, fold: int) -> None:
    alone = plain_runs[1].list_step_losses(fold)
    steps_per_epoch = (COUNT - FOLD_SIZES[fold]) // 11
    assert len(alone) == 2 * steps_per_epoch
    assert len(set(alone)) > 1
    np.testing.assert_allclose(plain_runs[world_size].list_step_losses(fold), alone, rtol=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_epoch_losses_and_learning_rates_are_the_same_at_each_world_size(
    plain_runs: dict[int, Run], world_size: int
) -> None:
    for alone, grouped in zip(plain_runs[1].read_metrics(), plain_runs[world_size].read_metrics(), strict=True):
        assert (grouped["fold"], grouped["epoch"], grouped["lr"]) == (alone["fold"], alone["epoch"], alone["lr"])
        assert grouped["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
        assert grouped["valid_loss"] == pytest.approx(alone["valid_loss"], rel=1e-4)


@pytest.mark.parametrize("world_size", SIZES)
def test_each_row_is_predicted_in_exactly_one_fold(plain_runs: dict[int, Run], world_size: int) -> None:
    run = plain_runs[world_size]
    rows = [run.predictions(fold).indices_N for fold in FOLDS]
    assert [len(fold_rows) for fold_rows in rows] == list(FOLD_SIZES)
    assert sorted(np.concatenate(rows).tolist()) == list(range(COUNT))
    merged = np.load(run.root / "oof" / "oof_logits.npy")
    assert merged.shape == (COUNT, 4)
    assert merged.dtype == np.float32
    assert np.isfinite(merged).all()
    assert len(np.unique(merged, axis=0)) == COUNT  # no two rows share logits
    for fold in FOLDS:
        np.testing.assert_array_equal(merged[run.predictions(fold).indices_N], run.predictions(fold).logits_NC)


def test_targets_are_the_same_at_each_world_size(plain_runs: dict[int, Run]) -> None:
    targets = [np.load(plain_runs[size].root / "oof" / "oof_targets.npy") for size in SIZES]
    np.testing.assert_array_equal(targets[0], np.arange(COUNT) % 4)
    np.testing.assert_array_equal(targets[1], targets[0])
    np.testing.assert_array_equal(targets[2], targets[0])


@pytest.mark.parametrize("world_size", [2, 3])
def test_logits_agree_within_float_tolerance_at_each_world_size(plain_runs: dict[int, Run], world_size: int) -> None:
    for fold in FOLDS:
        alone, grouped = plain_runs[1].predictions(fold), plain_runs[world_size].predictions(fold)
        assert grouped.info.best_epoch == alone.info.best_epoch
        np.testing.assert_allclose(grouped.logits_NC, alone.logits_NC, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world_size", SIZES)
def test_macro_f1_matches_scikit_learn_on_fold_predictions(plain_runs: dict[int, Run], world_size: int) -> None:
    run = plain_runs[world_size]
    logged = {(row["fold"], row["epoch"]): row["macro_f1"] for row in run.read_metrics()}
    for fold in FOLDS:
        predictions = run.predictions(fold)
        predicted_N = predictions.logits_NC.argmax(axis=1)
        expected = f1_score(predictions.targets_N, predicted_N, average="macro", zero_division=0)
        assert predictions.info.macro_f1 == expected
        assert logged[fold, predictions.info.best_epoch] == expected
        assert expected == max(score for (of_fold, _), score in logged.items() if of_fold == fold)


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_line_is_logged_once(plain_runs: dict[int, Run], world_size: int) -> None:
    def list_masked(run: Run) -> list[str]:
        # The best epoch may depend on the last bits of a logit, and [DATA] on the machine's speed.
        return [_mask(line) for line in run.lines if not line.startswith(("NEW_BEST", "[DATA] steps waited"))]

    assert len(list(plain_runs[world_size].folder.glob("logs/*"))) == 1
    assert list_masked(plain_runs[world_size]) == list_masked(plain_runs[1])
    assert f"processes={world_size}" in plain_runs[world_size].log.read_text()


@pytest.mark.parametrize("world_size", [2, 3])
def test_only_main_process_prints(plain_runs: dict[int, Run], world_size: int) -> None:
    main, *others = plain_runs[world_size].ranks
    assert main.stdout.splitlines()[-1] == "[EXIT] training finished successfully (see logs/* for details)"
    assert [rank.stdout for rank in others] == [""] * (world_size - 1)
    assert [rank.stderr for rank in others] == [""] * (world_size - 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_files_are_the_same_at_each_world_size(plain_runs: dict[int, Run], world_size: int) -> None:
    assert list(plain_runs[world_size].list_files()) == list(plain_runs[1].list_files())


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradient_accumulation_keeps_the_losses(trainer: Trainer, plain_runs: dict[int, Run], world_size: int) -> None:
    micro = trainer.train(*PLAIN, "data.valid_fold=1", "train.micro_batch_size=3", world_size=world_size)
    np.testing.assert_allclose(micro.list_step_losses(1), plain_runs[1].list_step_losses(1), rtol=1e-4)
    alone = plain_runs[1].predictions(1)
    np.testing.assert_allclose(micro.predictions(1).logits_NC, alone.logits_NC, rtol=1e-3, atol=1e-4)


def test_loader_workers_with_more_processes_than_validation_batches(
    trainer: Trainer, plain_runs: dict[int, Run]
) -> None:
    workers = trainer.train(*PLAIN, "data.valid_fold=0", "data.num_workers=1", world_size=3)
    np.testing.assert_array_equal(workers.predictions(0).logits_NC, plain_runs[3].predictions(0).logits_NC)


def test_bf16_with_several_processes(trainer: Trainer, plain_runs: dict[int, Run]) -> None:
    run = trainer.train(*PLAIN, "data.valid_fold=1", "train.amp=bf16", world_size=2)
    assert any("precision=bf16" in line for line in run.lines)
    np.testing.assert_allclose(run.list_step_losses(1), plain_runs[1].list_step_losses(1), rtol=0.05)
