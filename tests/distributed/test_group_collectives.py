"""Collective operations outside the step: prediction, calls on the main process, agreement on validated weights."""

import json

import numpy as np
import pytest
from rank_launcher import launch_ranks
from rank_programs import COUNTS
from tiny_runs import PLAIN, Trainer


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_sample_is_predicted_once_even_if_fewer_than_ranks(trainer: Trainer, world_size: int) -> None:
    folder = trainer.new_folder()
    argv = [str(trainer.config), str(folder)]
    ranks = launch_ranks("rank_programs:predict_counts", argv, folder, world_size)
    assert [rank.code for rank in ranks] == [0] * world_size, [rank.stderr for rank in ranks]
    for count in COUNTS:
        for rank in range(world_size):
            result = np.load(folder / f"count{count}_rank{rank}.npz")
            samples = 3 * np.arange(count) + 1
            assert result["indices"].tolist() == samples.tolist()
            assert result["logits"].dtype == np.float32
            expected = np.stack([samples, -samples, samples * samples], axis=1)
            np.testing.assert_allclose(result["logits"], expected.reshape(count, 3), rtol=1e-5)


def test_results_and_errors_of_main_process_reach_all_ranks(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    ranks = launch_ranks("rank_programs:return_and_raise_on_main", [str(trainer.config), str(folder)], folder, 3)
    assert [rank.code for rank in ranks] == [0, 0, 0], [rank.stderr for rank in ranks]
    for rank in range(3):
        answers = json.loads((folder / f"rank{rank}.json").read_text())
        assert answers == [["answer of", 0], "refused by rank 0", None]


def test_waiting_for_all_ranks_may_exceed_the_collective_timeout(trainer: Trainer) -> None:
    ranks = launch_ranks("rank_programs:exceed_collective_timeout", [str(trainer.config)], trainer.new_folder(), 2)
    assert [rank.stdout for rank in ranks] == ["patient\n", "patient\n"]
    assert ranks[0].code == 1 and "Timed out waiting 2000ms" in ranks[0].stderr


def test_unexpected_error_on_main_process_ends_all_ranks(trainer: Trainer) -> None:
    folder = trainer.new_folder()
    ranks = launch_ranks("rank_programs:fail_on_main", [str(trainer.config)], folder, 2)
    assert [rank.code for rank in ranks] == [1, 1], [rank.stderr for rank in ranks]
    assert "ZeroDivisionError" in ranks[0].stderr


@pytest.mark.parametrize("ema", ["null", "0.8"])
def test_ranks_validate_the_same_weights_with_batch_norm(trainer: Trainer, ema: str) -> None:
    sets = (*PLAIN, "data.valid_fold=1", "model.name=test_resnet", f"train.ema_decay={ema}")
    run = trainer.train(*sets, world_size=2, program="rank_programs:record_weights")
    first, second = (json.loads((run.folder / f"rank{rank}.json").read_text()) for rank in range(2))
    assert [len(modules) for modules in first["validated"]] == [1 if ema == "null" else 2] * 2
    assert first["validated"] == second["validated"]
    # Before that they differed: each rank's batches gave it its own running means.
    for digests, peer_digests in zip(first["trained"], second["trained"], strict=True):
        assert all(digest != peer for digest, peer in zip(digests, peer_digests, strict=True))
