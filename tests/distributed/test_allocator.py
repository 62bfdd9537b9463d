"""Training on a CPU keeps freed memory, and gets no more from the kernel for each tensor; unless the user chose."""

import resource

import pytest
from rank_launcher import launch_ranks
from tiny_runs import PLAIN, Trainer

_PAGES_OF_TEN_TENSORS = 10 * 2**26 // resource.getpagesize()


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.x=1"}, False)],
)
def test_memory_that_training_frees_is_kept_unless_the_user_chose(
    trainer: Trainer, chosen: dict[str, str], kept: bool
) -> None:
    folder = trainer.new_folder()
    argv = trainer.arguments((*PLAIN, "data.valid_fold=1", "train.epochs=1"), folder)
    (rank,) = launch_ranks("rank_programs:count_page_faults", argv, folder / "console", environment=chosen)
    assert rank.code == 0, rank.stderr
    faults = int(rank.stdout.splitlines()[-1])
    assert faults < 0.1 * _PAGES_OF_TEN_TENSORS if kept else faults > 0.9 * _PAGES_OF_TEN_TENSORS
