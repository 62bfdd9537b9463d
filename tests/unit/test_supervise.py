"""Supervision: whole launches with failures of all kinds, simulated; and what becomes of a fold, case by case."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import cycle, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doccls.run.heartbeat import Cause
from launcher.devices import Device, list_cpus
from launcher.plan import Slot, make_slots
from launcher.supervise import (
    MEMORY_OUTCOMES,
    MOST_TAKEN_PORTS,
    Ending,
    Finish,
    FoldState,
    LaunchState,
    Outcome,
    Policy,
    Start,
    Stop,
    Wait,
    choose_micro_batch_size,
    end_fold,
    judge,
    next_action,
    start_fold,
    stop_launch,
)

RESTARTED = (Outcome.CRASHED, Outcome.HUNG)
ENDED = (Outcome.DONE, Outcome.USER_ERROR, Outcome.STOPPED)
SLOTS = make_slots(list_cpus(3), 1)


# --- whole launches --------------------------------------------------------------------------------------------------


@dataclass
class Attempts:
    """What the simulation itself knows of one fold."""

    endings: list[Ending] = field(default_factory=list)
    not_before_s: float = 0.0

    @property
    def outcomes(self) -> list[Outcome]:
        return [ending.outcome for ending in self.endings]


@dataclass
class Simulation:
    """A launch whose folds' attempts last and end as a script says; it checks each action against its own books."""

    state: LaunchState
    policy: Policy
    packing: int
    script: list[tuple[Ending, float]]
    stop_s: float | None
    lag_s: float
    """How late the launcher looks."""
    lost: set[Device] = field(default_factory=set)
    """Devices of processes that could not be killed."""

    def __post_init__(self) -> None:
        self.slots = self.state.slots
        """All, at the beginning."""

    def run(self) -> dict[int, Attempts]:
        """Until `next_action` says that it is over; it has to end by itself."""
        script, now_s, asked_to_leave = cycle(self.script), 0.0, 0
        most_images = {one.fold: one.micro_batch_size for one in self.state.folds}
        books = {one.fold: Attempts() for one in self.state.folds}
        running: dict[int, tuple[Slot, float, Ending]] = {}
        while True:
            if self.stop_s is not None and now_s >= self.stop_s:
                self.state = stop_launch(self.state)
            action = next_action(self.state, self.policy, now_s)
            if isinstance(action, Finish):
                break
            if isinstance(action, Stop):
                asked_to_leave += 1
                self.state = stop_launch(self.state)
                continue
            if isinstance(action, Start):
                fold, slot = action.fold, action.slot
                assert not self.state.stopping and fold not in running, "started twice at once"
                assert now_s >= books[fold].not_before_s, "started before its back-off"
                self.check_may_start(books[fold], most_images[fold])
                ending, duration_s = next(script)
                self.state = start_fold(self.state, fold, slot)
                running[fold] = (slot, now_s + duration_s, ending)
                assert self.lost.isdisjoint(slot.devices), "on a device that a process still holds"
                self.check_devices([slot for slot, _, _ in running.values()])
                continue
            self.check_none_waits_in_vain(action, [slot for slot, _, _ in running.values()], now_s, books)
            later = [end_s for _, end_s, _ in running.values()]
            later += [] if action.until_s is None else [action.until_s]
            later += [self.stop_s] if self.stop_s is not None and self.stop_s > now_s else []
            now_s = max(now_s, min(later)) + self.lag_s
            for fold in [fold for fold, (_, end_s, _) in running.items() if end_s <= now_s]:
                slot, _, ending = running.pop(fold)
                self.note_end(books[fold], ending, now_s)
                if ending.stays:
                    self.lost.update(slot.devices)
                self.state = end_fold(self.state, fold, ending, self.policy, now_s)
                assert self.state.find(fold).slot is None and self.state.find(fold).status != "running"
            assert [one.fold for one in self.state.folds] == list(books), "lost a fold"
            assert {one.fold for one in self.state.folds if one.status == "running"} == set(running)
        assert not running
        assert asked_to_leave == (1 if self.stop_s is None and self.state.stopping else asked_to_leave)
        return books

    def check_may_start(self, before: Attempts, most_images: int) -> None:
        counts = Counter(before.outcomes)
        assert not any(counts[one] for one in ENDED)
        assert sum(counts[one] for one in RESTARTED) <= self.policy.max_restarts
        assert counts[Outcome.PORT_TAKEN] <= MOST_TAKEN_PORTS
        assert sum(counts[one] for one in MEMORY_OUTCOMES) <= (most_images - 1).bit_length(), (
            "there was nothing left to halve"
        )
        errors = [ending.error for ending in before.endings if ending.outcome in RESTARTED and ending.error is not None]
        assert all(one != after for one, after in pairwise(errors)), "an error that came back was not believed"

    def check_devices(self, taken: list[Slot]) -> None:
        assert len({slot.number for slot in taken}) == len(taken), "two folds in one slot"
        uses = Counter(device for slot in taken for device in slot.devices)
        assert max(uses.values()) <= self.packing, "more folds on a device than may share it"

    def check_none_waits_in_vain(
        self, action: Wait, running: list[Slot], now_s: float, books: dict[int, Attempts]
    ) -> None:
        """A fold that might start waits for a slot only: there is none free. And the wait ends when one may."""
        waiting = [one.fold for one in self.state.folds if one.status == "waiting"]
        may = [fold for fold in waiting if books[fold].not_before_s <= now_s]
        assert self.state.stopping or not may or set(self.state.slots) <= set(running)
        next_s = min((books[fold].not_before_s for fold in waiting if fold not in may), default=None)
        assert action.until_s == (None if self.state.stopping else next_s)

    def note_end(self, book: Attempts, ending: Ending, now_s: float) -> None:
        earlier = sum(one in RESTARTED for one in book.outcomes)
        book.endings.append(ending)
        if ending.outcome in RESTARTED:
            wait_s = self.policy.backoff_s * 2**earlier
            book.not_before_s = now_s + min(wait_s, self.policy.longest_backoff_s)
        if ending.outcome in (Outcome.LEFT, Outcome.PORT_TAKEN):
            book.not_before_s = now_s + self.policy.backoff_s


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    packing, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    slots = make_slots(list_cpus(draw(st.integers(ranks, 3 * ranks))), ranks, packing)
    folds = draw(st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True))
    times = st.integers(0, 80).map(lambda quarters: quarters / 4)  # whole quarters add up exactly
    errors, stays = st.sampled_from([None, None, "here", "there"]), st.sampled_from([False, False, False, True])
    endings = st.builds(Ending, st.sampled_from(Outcome), errors, stays)
    ends = st.lists(st.tuples(endings, times), min_size=1, max_size=12).filter(
        lambda script: any(ending.outcome is not Outcome.LEFT for ending, _ in script)  # which comes further each time
    )
    backoffs = st.sampled_from([0.0, 0.5, 2.0])
    policy = Policy(draw(st.integers(0, 3)), draw(st.booleans()), draw(backoffs), 3.0, draw(st.booleans()))
    sizes = st.integers(1, 9)
    state = LaunchState(tuple(FoldState(fold, micro_batch_size=draw(sizes)) for fold in folds), slots)
    return Simulation(
        state, policy, packing, draw(ends), draw(st.none() | times), draw(st.sampled_from([0.0, 0.25, 5]))
    )


@settings(max_examples=2 * settings.default.max_examples)
@given(simulations())
def test_whatever_fails_no_slot_is_overfilled_no_fold_is_lost_and_every_launch_ends(simulation: Simulation) -> None:
    books = simulation.run()
    state, policy = simulation.state, simulation.policy
    for one in state.folds:
        outcomes = books[one.fold].outcomes
        assert one.slot is None and one.status != "running"
        assert (one.status == "done") == (Outcome.DONE in outcomes)
        assert one.restarts <= policy.max_restarts
        if one.status == "waiting" or one.status == "stopped":
            nowhere = all(not simulation.lost.isdisjoint(slot.devices) for slot in simulation.slots)
            asked = state.stopping or Outcome.STOPPED in outcomes[-1:]
            assert asked or nowhere, "left undone, though nobody asked for an end"
        if one.status == "failed":
            gave_up = sum(outcome in RESTARTED for outcome in outcomes) == policy.max_restarts + 1
            ends = [ending for ending in books[one.fold].endings if ending.outcome in RESTARTED]
            errors = [ending.error for ending in ends if ending.error is not None]
            came_back = errors[-1:] == errors[-2:-1] != []
            gave_up |= outcomes.count(Outcome.PORT_TAKEN) == MOST_TAKEN_PORTS + 1
            assert gave_up or came_back or outcomes[-1] in (Outcome.USER_ERROR, Outcome.UNKILLABLE, *MEMORY_OUTCOMES)
    failed = any(one.status == "failed" for one in state.folds)
    if simulation.stop_s is None:
        assert state.stopping == (failed and policy.fail_fast)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 3))
def test_a_launch_without_failures_starts_each_fold_once(folds: int, devices: int, packing: int) -> None:
    state = LaunchState(tuple(map(FoldState, range(folds))), make_slots(list_cpus(devices), 1, packing))
    simulation = Simulation(state, Policy(), packing, [(Ending(Outcome.DONE), 1.0)], None, 0.0)
    books = simulation.run()
    assert all(book.outcomes == [Outcome.DONE] for book in books.values())
    assert all(one.status == "done" for one in simulation.state.folds)


# --- what starts -----------------------------------------------------------------------------------------------------


def make_state(*folds: FoldState, stopping: bool = False) -> LaunchState:
    return LaunchState(folds, SLOTS, stopping)


def test_folds_start_in_their_order_in_the_free_slots() -> None:
    state = make_state(
        FoldState(4), FoldState(1), FoldState(7, "running", SLOTS[1]), FoldState(2), FoldState(3, "done")
    )
    assert next_action(state, Policy(), 0.0) == Start(4, SLOTS[0])
    state = start_fold(state, 4, SLOTS[0])
    assert next_action(state, Policy(), 0.0) == Start(1, SLOTS[2])
    assert next_action(start_fold(state, 1, SLOTS[2]), Policy(), 0.0) == Wait(None)
    assert next_action(stop_launch(state), Policy(), 0.0) == Wait(None)


def test_a_fold_waits_out_its_back_off_and_lets_others_go_first() -> None:
    state = make_state(FoldState(0, ready_s=5.0), FoldState(1))
    assert next_action(state, Policy(), 4.9) == Start(1, SLOTS[0])
    assert next_action(state, Policy(), 5.0) == Start(0, SLOTS[0])
    both = make_state(FoldState(0, ready_s=5.0), FoldState(1, ready_s=3.0))
    assert next_action(both, Policy(), 1.0) == Wait(3.0)
    assert next_action(stop_launch(both), Policy(), 1.0) == Finish()


def test_a_failure_stops_the_others_once_where_that_was_asked_for() -> None:
    state = make_state(FoldState(0, "failed"), FoldState(1, "running", SLOTS[0]), FoldState(2))
    assert next_action(state, Policy(), 0.0) == Start(2, SLOTS[1])
    assert next_action(state, Policy(fail_fast=True), 0.0) == Stop()
    assert next_action(stop_launch(state), Policy(fail_fast=True), 0.0) == Wait(None)


@pytest.mark.parametrize(
    ("state", "fold"),
    [
        (make_state(FoldState(0), FoldState(1, "running", SLOTS[0])), 0),  # its slot is taken
        (make_state(FoldState(0, "running", SLOTS[1])), 0),
        (make_state(FoldState(0, "done")), 0),
        (make_state(FoldState(0, "failed")), 0),
        (make_state(FoldState(0), stopping=True), 0),
    ],
)
def test_a_start_that_must_not_be_is_a_defect(state: LaunchState, fold: int) -> None:
    with pytest.raises(AssertionError):
        start_fold(state, fold, SLOTS[0])


def test_an_end_of_what_does_not_run_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        end_fold(make_state(FoldState(0)), 0, Ending(Outcome.DONE), Policy(), 0.0)


@pytest.mark.parametrize(
    ("folds", "stopping", "over"),
    [
        ([], False, True),
        ([FoldState(0, "done"), FoldState(1, "failed"), FoldState(2, "stopped")], False, True),
        ([FoldState(0)], False, False), ([FoldState(0)], True, True), ([FoldState(0, ready_s=9.0)], False, False),
        ([FoldState(0, "running", SLOTS[0])], True, False), ([FoldState(0, "running", SLOTS[0])], False, False),
    ],
)  # fmt: skip
def test_a_launch_is_over_when_nothing_runs_and_nothing_will(
    folds: list[FoldState], stopping: bool, over: bool
) -> None:
    action = next_action(make_state(*folds, stopping=stopping), Policy(), 0.0)
    assert isinstance(action, Finish) == over


# --- what becomes of a fold ------------------------------------------------------------------------------------------


def end(
    outcome: Outcome, policy: Policy | None = None, stopping: bool = False, error: str | None = None, **changes: Any
) -> FoldState:
    """Fold 0 after an attempt that ended so at 100 s."""
    before = replace(FoldState(0, "running", SLOTS[0], micro_batch_size=8), **changes)
    ending = Ending(outcome, error)
    state = end_fold(make_state(before, FoldState(1), stopping=stopping), 0, ending, policy or Policy(), 100.0)
    assert state.find(1) == FoldState(1)
    return state.find(0)


@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("restarts", [0, 2])
def test_done_and_user_errors_end_a_fold_at_once(stopping: bool, restarts: int) -> None:
    expected = FoldState(0, "done", None, 8, restarts)
    assert end(Outcome.DONE, stopping=stopping, restarts=restarts) == expected
    assert end(Outcome.USER_ERROR, stopping=stopping, restarts=restarts) == replace(expected, status="failed")


@pytest.mark.parametrize("outcome", RESTARTED)
def test_a_fold_that_died_is_restarted_later_each_time_and_then_given_up(outcome: Outcome) -> None:
    policy = Policy(max_restarts=5, backoff_s=2.0, longest_backoff_s=20.0)
    for restarts, wait_s in enumerate((2.0, 4.0, 8.0, 16.0, 20.0)):
        after = end(outcome, policy, restarts=restarts)
        assert after == FoldState(0, "waiting", None, 8, restarts + 1, 100.0 + wait_s)
    assert end(outcome, policy, restarts=5).status == "failed"
    assert end(outcome, Policy(max_restarts=0)).status == "failed"


def test_a_fold_that_left_when_asked_is_not_started_again() -> None:
    assert end(Outcome.STOPPED, restarts=1).status == end(Outcome.STOPPED, stopping=True).status == "stopped"


def test_an_error_that_comes_back_is_not_met_a_third_time() -> None:
    policy, here, there = Policy(max_restarts=9), Ending(Outcome.CRASHED, "here"), Ending(Outcome.CRASHED, "there")
    state = make_state(FoldState(0))
    for ending, status in (
        (here, "waiting"), (there, "waiting"), (Ending(Outcome.HUNG), "waiting"), (here, "waiting"), (here, "failed")
    ):  # fmt: skip
        state = end_fold(start_fold(state, 0, SLOTS[0]), 0, ending, policy, 0.0)
        assert state.find(0).status == status


@pytest.mark.parametrize("outcome", RESTARTED)
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_fold_that_died_while_all_stop_goes_on_another_time(outcome: Outcome, restarts: int) -> None:
    assert end(outcome, stopping=True, restarts=restarts).status == "stopped"


@pytest.mark.parametrize(("before", "after"), [(8, 4), (5, 3), (3, 2), (2, 1)])
def test_out_of_memory_halves_the_images_at_once_and_costs_no_restart(before: int, after: int) -> None:
    expected = FoldState(0, "waiting", None, after, 3)
    assert end(Outcome.OUT_OF_MEMORY, micro_batch_size=before, restarts=3) == expected
    stopped = end(Outcome.OUT_OF_MEMORY, stopping=True, micro_batch_size=before, restarts=3)
    assert stopped == replace(expected, status="stopped")


@pytest.mark.parametrize("outcome", MEMORY_OUTCOMES)
def test_out_of_memory_is_a_failure_with_one_image_or_where_shrinking_is_forbidden(outcome: Outcome) -> None:
    assert end(outcome, micro_batch_size=1).status == "failed"
    assert end(outcome, micro_batch_size=8).status == "waiting"
    state = start_fold(LaunchState((FoldState(0, micro_batch_size=8),), SLOTS), 0, SLOTS[0])
    assert end_fold(state, 0, Ending(outcome), Policy(shrink=False), 0.0).find(0).status == "failed"


# --- what an end means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "causes", "outcome"),
    [
        ((1,), (Cause.USER_ERROR,), Outcome.USER_ERROR), ((1,), (Cause.OUT_OF_MEMORY,), Outcome.OUT_OF_MEMORY),
        ((1,), (Cause.ERROR,), Outcome.CRASHED), ((1,), (None,), Outcome.CRASHED), ((-9,), (None,), Outcome.CRASHED),
        ((0,), (None,), Outcome.CRASHED), ((-9, 1), (None, Cause.ERROR), Outcome.CRASHED),
        ((1, 1), (Cause.ERROR, Cause.OUT_OF_MEMORY), Outcome.OUT_OF_MEMORY),
        ((1, 1), (Cause.ERROR, Cause.MEMORY_TAKEN), Outcome.MEMORY_TAKEN),
        ((1, 1), (Cause.MEMORY_TAKEN, Cause.OUT_OF_MEMORY), Outcome.OUT_OF_MEMORY),
        ((-6, 1), (None, Cause.USER_ERROR), Outcome.USER_ERROR),
        ((1, -9), (Cause.PORT_TAKEN, None), Outcome.PORT_TAKEN),
        ((1, 1), (Cause.PORT_TAKEN, Cause.ERROR), Outcome.PORT_TAKEN),
        ((1, 1), (Cause.PORT_TAKEN, Cause.USER_ERROR), Outcome.USER_ERROR),
        ((1,), (Cause.DOWNLOAD_FAILED,), Outcome.CRASHED),
        ((143,), (None,), Outcome.CRASHED), ((-15,), (None,), Outcome.CRASHED),
    ],
)  # fmt: skip
def test_the_cause_that_says_most_counts(
    codes: tuple[int, ...], causes: tuple[Cause | None, ...], outcome: Outcome
) -> None:
    assert judge(codes, causes, done=False, hung=False, stopping=False, advanced=False) is outcome
    assert judge(codes[::-1], causes[::-1], done=False, hung=False, stopping=False, advanced=False) is outcome
    for advanced in (False, True):
        assert judge(codes, causes, done=False, hung=True, stopping=False, advanced=advanced) is Outcome.HUNG
        for hung in (False, True):
            assert judge(codes, causes, done=True, hung=hung, stopping=True, advanced=advanced) is Outcome.DONE


@pytest.mark.parametrize(
    ("codes", "causes", "outcome"),
    [
        ((143,), (None,), Outcome.STOPPED), ((-15,), (None,), Outcome.STOPPED),
        ((143, 1), (None, Cause.ERROR), Outcome.STOPPED), ((-9,), (None,), Outcome.CRASHED),
        ((1,), (Cause.USER_ERROR,), Outcome.USER_ERROR), ((1,), (None,), Outcome.CRASHED),
    ],
)  # fmt: skip
def test_a_fold_is_stopped_if_it_left_when_asked(
    codes: tuple[int, ...], causes: tuple[Cause | None, ...], outcome: Outcome
) -> None:
    for advanced in (False, True):
        assert judge(codes, causes, done=False, hung=False, stopping=True, advanced=advanced) is outcome


@pytest.mark.parametrize("code", [130, 143, 138, 140, -15])
@pytest.mark.parametrize(("others", "causes"), [((), ()), ((1,), (Cause.ERROR,))])
def test_a_fold_that_another_asked_to_leave_goes_on_if_it_came_further(
    code: int, others: tuple[int, ...], causes: tuple[Cause, ...]
) -> None:
    told = (code, *others), (None, *causes)
    assert judge(*told, done=False, hung=False, stopping=False, advanced=True) is Outcome.LEFT
    assert judge(*told, done=False, hung=False, stopping=False, advanced=False) is Outcome.CRASHED
    assert judge((-9,), (None,), done=False, hung=False, stopping=False, advanced=True) is Outcome.CRASHED


@pytest.mark.parametrize("restarts", [0, 2])
def test_to_leave_costs_no_restart(restarts: int) -> None:
    policy = Policy(max_restarts=2, backoff_s=3.0)
    state = start_fold(make_state(FoldState(0, restarts=restarts, error="here")), 0, SLOTS[0])
    after = end_fold(state, 0, Ending(Outcome.LEFT), policy, 10.0).find(0)
    assert after == FoldState(0, restarts=restarts, error="here", ready_s=13.0)


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_port_that_was_taken_costs_no_restart_until_it_is_no_coincidence(restarts: int) -> None:
    policy = Policy(max_restarts=2, backoff_s=3.0)
    before = FoldState(0, restarts=restarts, error="here")
    state = make_state(before)
    for taken in range(1, MOST_TAKEN_PORTS + 1):
        state = end_fold(start_fold(state, 0, SLOTS[0]), 0, Ending(Outcome.PORT_TAKEN), policy, 10.0)
        assert state.find(0) == replace(before, taken_ports=taken, ready_s=13.0)
    state = end_fold(start_fold(state, 0, SLOTS[0]), 0, Ending(Outcome.PORT_TAKEN), policy, 10.0)
    assert state.find(0).status == "failed"
    assert end(Outcome.PORT_TAKEN, stopping=True).status == "stopped"


def test_any_number_of_restarts_may_be_asked_for() -> None:
    policy = Policy(max_restarts=10**6)
    state = LaunchState((FoldState(0, restarts=5000),), SLOTS)
    state = end_fold(start_fold(state, 0, SLOTS[0]), 0, Ending(Outcome.CRASHED), policy, 7.0)
    assert state.find(0).ready_s == 7.0 + policy.longest_backoff_s


# --- what fits the memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "too_large", "chosen"),
    [(8, [], 8), (8, [8], 4), (8, [8, 4], 2), (8, [5], 3), (8, [1], 1), (1, [8], 1), (2, [8], 2), (8, [64], 8)],
)
def test_only_what_ran_out_of_memory_makes_pieces_smaller(own: int, too_large: list[int], chosen: int) -> None:
    assert choose_micro_batch_size(own, too_large) == chosen
