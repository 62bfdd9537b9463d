"""The order: each global batch is the same at any number of processes and any micro-batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from doccls.data.order import BatchPlan

plans = st.builds(
    lambda seed, fold, count, batch, epochs: BatchPlan(seed, fold, np.arange(count) * 3 + 1, batch, epochs),
    st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(1, 50), st.integers(1, 60), st.integers(1, 3),
)  # fmt: skip


@given(plans, st.integers(1, 9), st.none() | st.integers(1, 8), st.data())
def test_a_global_batch_is_the_same_at_any_split(
    plan: BatchPlan, world_size: int, micro: int | None, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, plan.total_steps - 1))
    whole = plan.list_batch(step)
    parts = [plan.split_batch(step, rank, world_size, micro) for rank in range(world_size)]
    together = [int(index) for rank in parts for part in rank for index in part]
    assert sorted(together) == sorted(whole.tolist())
    assert len(set(together)) == len(together) == plan.size
    shares = [sum(map(len, rank)) for rank in parts]
    assert max(shares) - min(shares) <= 1
    for rank in parts:
        sizes = [len(part) for part in rank]
        assert micro is None or max(sizes, default=0) <= micro
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
        assert micro is not None or len(rank) == 1


@given(plans)
def test_an_epoch_takes_samples_without_repeats_and_leaves_out_less_than_a_batch(plan: BatchPlan) -> None:
    for epoch in range(plan.epochs):
        first = epoch * plan.steps_per_epoch
        seen = np.concatenate([plan.list_batch(first + step) for step in range(plan.steps_per_epoch)])
        assert len(set(seen.tolist())) == len(seen)
        assert set(seen.tolist()) <= set(plan.samples.tolist())
        assert len(plan.samples) - len(seen) < plan.size


@given(plans)
def test_every_batch_has_one_size_and_int64_indices(plan: BatchPlan) -> None:
    assert plan.steps_per_epoch >= 1
    assert plan.total_steps == plan.epochs * plan.steps_per_epoch
    for step in range(plan.total_steps):
        assert plan.list_batch(step).shape == (plan.size,)
        assert plan.list_batch(step).dtype == np.int64


def test_fewer_samples_than_a_batch_are_one_batch_of_all() -> None:
    plan = BatchPlan(0, 0, np.asarray([4, 7, 9]), 32, 2)
    assert (plan.size, plan.steps_per_epoch, plan.total_steps) == (3, 1, 2)
    assert sorted(plan.list_batch(1).tolist()) == [4, 7, 9]


def test_a_rank_beyond_the_batch_gets_one_empty_share() -> None:
    plan = BatchPlan(0, 0, np.arange(2), 2, 1)
    assert [part.tolist() for part in plan.split_batch(0, 2, 3, None)] == [[]]


def test_seed_fold_and_epoch_each_give_another_order_and_the_same_gives_the_same() -> None:
    def first(seed: int, fold: int, step: int) -> list[int]:
        return BatchPlan(seed, fold, np.arange(40), 40, 3).list_batch(step).tolist()

    orders = [first(1, 0, 0), first(2, 0, 0), first(1, 1, 0), first(1, 0, 1), first(1, 0, 2)]
    assert len({tuple(order) for order in orders}) == 5
    assert first(1, 0, 0) == orders[0]
    assert orders[0] != list(range(40))


def test_the_rest_left_out_is_another_one_each_epoch() -> None:
    plan = BatchPlan(0, 0, np.arange(11), 10, 8)
    left = [next(iter(set(range(11)) - set(plan.list_batch(step).tolist()))) for step in range(8)]
    assert len(set(left)) > 2


def test_batches_of_an_earlier_step_come_again_unchanged() -> None:
    plan = BatchPlan(5, 1, np.arange(100), 8, 10)
    before = plan.list_batch(3).tolist()
    for step in range(plan.total_steps):
        plan.list_batch(step)
    assert plan.list_batch(3).tolist() == before
