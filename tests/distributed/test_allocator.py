"""Training on a CPU keeps freed memory instead of returning it to the kernel, unless the user chose otherwise."""

import resource

import pytest
from rank_launcher import launch_ranks
from tiny_runs import PLAIN, Trainer

_PAGES_OF_TEN_TENSORS = 10 * 2**26 // resource.getpagesize()


@pytest.mark.parametrize(
    ("variables", "is_kept"),
    [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.x=1"}, False)],
)
def test_training_keeps_freed_memory_unless_user_set_the_allocator(
    trainer: Trainer, variables: dict[str, str], is_kept: bool
) -> None:
    folder = trainer.new_folder()
    argv = trainer.arguments((*PLAIN, "data.valid_fold=1", "train.epochs=1"), folder)
    (rank,) = launch_ranks("rank_programs:count_page_faults", argv, folder / "console", environment=variables)
    assert rank.code == 0, rank.stderr
    faults = int(rank.stdout.splitlines()[-1])
    assert faults < 0.1 * _PAGES_OF_TEN_TENSORS if is_kept else faults > 0.9 * _PAGES_OF_TEN_TENSORS
