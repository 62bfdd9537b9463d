"""The sampler: each global batch is the same for any number of processes and any micro-batch size."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from doccls.data.sampler import (
    BatchDivision,
    BatchPlace,
    BatchPlan,
    find_epoch,
    iterate_fold,
    list_evaluation,
    list_prediction,
    list_step,
)

plans = st.builds(
    lambda seed, fold, count, batch, epochs: BatchPlan(seed, fold, np.arange(count) * 3 + 1, batch, epochs),
    st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(1, 50), st.integers(1, 60), st.integers(1, 3),
)  # fmt: skip


@given(plans, st.integers(1, 9), st.none() | st.integers(1, 8), st.data())
def test_global_batch_is_the_same_for_any_division(
    plan: BatchPlan, world_size: int, micro: int | None, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, plan.total_steps - 1))
    batch = plan.list_batch(step)
    division = BatchDivision(plan.batch_size, world_size, micro)
    ranks = [division.split(batch, rank) for rank in range(world_size)]
    indices = [int(index) for micro_batches in ranks for samples in micro_batches for index in samples]
    assert sorted(indices) == sorted(batch.tolist())
    assert len(set(indices)) == len(indices) == plan.size
    rank_sizes = [sum(map(len, micro_batches)) for micro_batches in ranks]
    assert max(rank_sizes) - min(rank_sizes) <= 1
    for micro_batches in ranks:
        sizes = [len(samples) for samples in micro_batches]
        assert micro is None or max(sizes, default=0) <= micro
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
        assert micro is not None or len(micro_batches) == 1
        assert max(sizes) <= division.images_at_a_time <= division.per_rank
    assert division.find_smallest(plan.size) == min(
        len(samples) for micro_batches in ranks for samples in micro_batches
    )


@given(plans)
def test_epoch_has_no_repeats_and_drops_less_than_a_batch(plan: BatchPlan) -> None:
    for epoch in range(plan.epochs):
        first = epoch * plan.steps_per_epoch
        seen = np.concatenate([plan.list_batch(first + step) for step in range(plan.steps_per_epoch)])
        assert len(set(seen.tolist())) == len(seen)
        assert set(seen.tolist()) <= set(plan.samples.tolist())
        assert len(plan.samples) - len(seen) < plan.size


@given(plans)
def test_all_batches_have_the_same_size_and_int64_indices(plan: BatchPlan) -> None:
    assert plan.steps_per_epoch >= 1
    assert plan.total_steps == plan.epochs * plan.steps_per_epoch
    for step in range(plan.total_steps):
        assert plan.list_batch(step).shape == (plan.size,)
        assert plan.list_batch(step).dtype == np.int64


def test_fewer_samples_than_a_batch_give_one_batch() -> None:
    plan = BatchPlan(0, 0, np.asarray([4, 7, 9]), 32, 2)
    assert (plan.size, plan.steps_per_epoch, plan.total_steps) == (3, 1, 2)
    assert sorted(plan.list_batch(1).tolist()) == [4, 7, 9]


def test_rank_beyond_the_batch_gets_one_empty_micro_batch() -> None:
    assert [samples.tolist() for samples in BatchDivision(2, 3, None).split(np.arange(2), 2)] == [[]]


def test_order_depends_on_seed_fold_and_epoch() -> None:
    def first(seed: int, fold: int, step: int) -> list[int]:
        return BatchPlan(seed, fold, np.arange(40), 40, 3).list_batch(step).tolist()

    orders = [first(1, 0, 0), first(2, 0, 0), first(1, 1, 0), first(1, 0, 1), first(1, 0, 2)]
    assert len({tuple(order) for order in orders}) == 5
    assert first(1, 0, 0) == orders[0]
    assert orders[0] != list(range(40))


def test_dropped_samples_differ_between_epochs() -> None:
    plan = BatchPlan(0, 0, np.arange(11), 10, 8)
    dropped = [next(iter(set(range(11)) - set(plan.list_batch(step).tolist()))) for step in range(8)]
    assert len(set(dropped)) > 2


def test_batch_of_an_earlier_step_can_be_listed_later() -> None:
    plan = BatchPlan(5, 1, np.arange(100), 8, 10)
    before = plan.list_batch(3).tolist()
    for step in range(plan.total_steps):
        plan.list_batch(step)
    assert plan.list_batch(3).tolist() == before


# --- the batches of a rank -------------------------------------------------------------------------------------------


def test_micro_batches_of_a_step_are_numbered_and_the_last_is_marked() -> None:
    plan = BatchPlan(1, 3, np.arange(11), 4, 2)
    requests = list_step(plan, 3, BatchDivision(4, 1, 3), 0)
    assert [request.place for request in requests] == [
        BatchPlace("train", 3, 1, 3, 0, False), BatchPlace("train", 3, 1, 3, 1, True)
    ]  # fmt: skip
    assert [index for request in requests for index in request.indices] == plan.list_batch(3).tolist()


@given(st.integers(0, 30), st.integers(1, 9), st.none() | st.integers(1, 8))
def test_evaluation_has_each_sample_once_without_padding(count: int, world_size: int, micro: int | None) -> None:
    samples, division = np.arange(count) * 2, BatchDivision(9, world_size, micro)
    place = BatchPlace("validate", 1, 2, 5)
    ranks = [list_evaluation(place, samples, division, rank) for rank in range(world_size)]
    indices = [index for requests in ranks for request in requests for index in request.indices]
    assert sorted(indices) == samples.tolist()
    for requests in ranks:
        assert all(0 < len(request.indices) <= division.images_at_a_time for request in requests)
        assert [request.place for request in requests] == [
            BatchPlace("validate", 1, 2, 5, number, number == len(requests) - 1) for number in range(len(requests))
        ]


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 8))
def test_prediction_has_the_same_batches_for_any_number_of_ranks(count: int, world_size: int, batch_size: int) -> None:
    samples, place = np.arange(count) * 2, BatchPlace("predict", 0)
    (alone,) = [list_prediction(place, samples, batch_size, 1, 0)]
    ranks = [list_prediction(place, samples, batch_size, world_size, rank) for rank in range(world_size)]
    assert [index for request in alone for index in request.indices] == samples.tolist()
    assert all(len(request.indices) == batch_size for request in alone[:-1])
    for rank, requests in enumerate(ranks):
        assert [request.indices for request in requests] == [request.indices for request in alone[rank::world_size]]
        assert [request.place.number for request in requests] == list(range(len(requests)))


def test_fold_is_epochs_of_steps_followed_by_validation() -> None:
    plan, division = BatchPlan(1, 0, np.arange(8), 4, 2), BatchDivision(4, 1, 3)
    places = [request.place for request in iterate_fold(plan, np.arange(2), division, 0)]
    stream = [(place.phase, place.epoch, place.step) for place in places]
    micro_batches = [("train", 0, 0)] * 2 + [("train", 0, 1)] * 2
    assert stream[:5] == [*micro_batches, ("validate", 0, 2)]
    assert stream[5:] == [("train", 1, 2)] * 2 + [("train", 1, 3)] * 2 + [("validate", 1, 4)]


@given(plans, st.integers(1, 3), st.none() | st.integers(1, 3))
def test_each_validation_is_repeated_on_damaged_pages(plan: BatchPlan, world_size: int, micro: int | None) -> None:
    division, valid = BatchDivision(plan.batch_size, world_size, micro), np.arange(7) * 3
    for rank in range(world_size):
        plain = list(iterate_fold(plan, valid, division, rank))
        both = list(iterate_fold(plan, valid, division, rank, with_damage=True))
        assert [request for request in both if request.place.phase != "validate_damaged"] == plain
        for epoch in range(plan.epochs):
            clean = [request for request in plain if request.place[:3] == ("validate", plan.fold, epoch)]
            start = both.index(clean[-1]) + 1 if clean else 0
            damaged = [(place._replace(phase="validate_damaged"), samples) for place, samples in clean]
            assert both[start : start + len(damaged)] == damaged


@given(plans, st.integers(1, 3), st.booleans(), st.data())
def test_resumed_fold_gets_the_remaining_batches(
    plan: BatchPlan, world_size: int, with_damage: bool, data: st.DataObject
) -> None:
    """At an epoch's end, the validation is still to be done."""
    step = data.draw(st.integers(0, plan.total_steps))
    division = BatchDivision(plan.batch_size, world_size, 3)
    valid = np.arange(7)
    requests = list(iterate_fold(plan, valid, division, 0, with_damage=with_damage))
    remaining = list(iterate_fold(plan, valid, division, 0, step, with_damage))
    num_skipped = len(requests) - len(remaining)
    assert remaining == requests[num_skipped:]
    first = requests[num_skipped].place
    assert first.step >= step and first.epoch == find_epoch(step, plan)
    skipped = [request.place for request in requests[:num_skipped]]
    assert not any(place.phase == "train" and place.step >= step for place in skipped)
