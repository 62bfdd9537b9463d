"""Supervision: simulated launches with failures of all kinds, and the state of a fold after each kind of ending."""

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
    MAX_PORT_CONFLICTS,
    MEMORY_OUTCOMES,
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
    classify_exit,
    end_fold,
    next_action,
    start_fold,
    stop_folds,
    stop_launch,
)

RESTARTED = (Outcome.CRASHED, Outcome.HUNG)
ENDED = (Outcome.DONE, Outcome.USER_ERROR, Outcome.STOPPED)
SLOTS = make_slots(list_cpus(3), 1)


# --- simulated launches ----------------------------------------------------------------------------------------------


@dataclass
class Attempts:
    """The simulation's own record of one fold."""

    endings: list[Ending] = field(default_factory=list)
    not_before_s: float = 0.0

    @property
    def outcomes(self) -> list[Outcome]:
        return [ending.outcome for ending in self.endings]


@dataclass
class Simulation:
    """A launch whose attempts last and end as a script says; actions are checked against the simulation's records."""

    state: LaunchState
    policy: Policy
    packing: int
    script: list[tuple[Ending, float]]
    stop_s: float | None
    lag_s: float  # how late the launcher polls
    lost: set[Device] = field(default_factory=set)  # devices of processes that could not be killed

    def __post_init__(self) -> None:
        self.initial_slots = self.state.slots

    def run(self) -> dict[int, Attempts]:
        """Run until `next_action` finishes the launch; it has to end by itself."""
        script, now_s, stops = cycle(self.script), 0.0, 0
        sizes = {fold_state.job: fold_state.micro_batch_size for fold_state in self.state.folds}
        records = {fold: Attempts() for fold in sizes}
        running: dict[int, tuple[Slot, float, Ending]] = {}
        while True:
            if self.stop_s is not None and now_s >= self.stop_s:
                self.state = stop_launch(self.state)
            action = next_action(self.state, self.policy, now_s)
            if isinstance(action, Finish):
                break
            if isinstance(action, Stop):
                stops += 1
                self.state = stop_launch(self.state)
                continue
            if isinstance(action, Start):
                fold, slot = action.job, action.slot
                assert not self.state.stopping and fold not in running, "started twice at once"
                assert now_s >= records[fold].not_before_s, "started before its back-off"
                self.check_may_start(records[fold], sizes[fold])
                ending, duration_s = next(script)
                self.state = start_fold(self.state, fold, slot)
                running[fold] = (slot, now_s + duration_s, ending)
                assert self.lost.isdisjoint(slot.devices), "on a device that a process still holds"
                self.check_devices([slot for slot, _, _ in running.values()])
                continue
            self.check_wait_is_needed(action, [slot for slot, _, _ in running.values()], now_s, records)
            later = [end_s for _, end_s, _ in running.values()]
            later += [] if action.until_s is None else [action.until_s]
            later += [self.stop_s] if self.stop_s is not None and self.stop_s > now_s else []
            now_s = max(now_s, min(later)) + self.lag_s
            for fold in [fold for fold, (_, end_s, _) in running.items() if end_s <= now_s]:
                slot, _, ending = running.pop(fold)
                self.record_end(records[fold], ending, now_s)
                if ending.is_stuck:
                    self.lost.update(slot.devices)
                self.state = end_fold(self.state, fold, ending, self.policy, now_s)
                assert self.state.find(fold).slot is None and self.state.find(fold).status != "running"
            assert [fold_state.job for fold_state in self.state.folds] == list(records), "lost a fold"
            assert {fold_state.job for fold_state in self.state.list_by_status("running")} == set(running)
        assert not running
        assert stops == (1 if self.stop_s is None and self.state.stopping else stops)
        return records

    def check_may_start(self, before: Attempts, micro_batch_size: int) -> None:
        counts = Counter(before.outcomes)
        assert not any(counts[outcome] for outcome in ENDED)
        assert sum(counts[outcome] for outcome in RESTARTED) <= self.policy.max_restarts
        assert counts[Outcome.PORT_TAKEN] <= MAX_PORT_CONFLICTS
        halvings = sum(counts[outcome] for outcome in MEMORY_OUTCOMES)
        assert halvings <= (micro_batch_size - 1).bit_length(), "there was nothing left to halve"
        errors = [ending.error for ending in before.endings if ending.outcome in RESTARTED and ending.error is not None]
        assert all(error != after for error, after in pairwise(errors)), "restarted after a repeated error"

    def check_devices(self, taken: list[Slot]) -> None:
        assert len({slot.number for slot in taken}) == len(taken), "two folds in one slot"
        uses = Counter(device for slot in taken for device in slot.devices)
        assert max(uses.values()) <= self.packing, "more folds on a device than may share it"

    def check_wait_is_needed(
        self, action: Wait, running: list[Slot], now_s: float, records: dict[int, Attempts]
    ) -> None:
        """A fold that may start waits only if no slot is free, and the wait ends when the next one may start."""
        waiting = [fold_state.job for fold_state in self.state.list_by_status("waiting")]
        ready = [fold for fold in waiting if records[fold].not_before_s <= now_s]
        assert self.state.stopping or not ready or set(self.state.slots) <= set(running)
        next_s = min((records[fold].not_before_s for fold in waiting if fold not in ready), default=None)
        assert action.until_s == (None if self.state.stopping else next_s)

    def record_end(self, record: Attempts, ending: Ending, now_s: float) -> None:
        earlier = sum(outcome in RESTARTED for outcome in record.outcomes)
        record.endings.append(ending)
        if ending.outcome in RESTARTED:
            wait_s = self.policy.backoff_s * 2**earlier
            record.not_before_s = now_s + min(wait_s, self.policy.max_backoff_s)
        if ending.outcome in (Outcome.PREEMPTED, Outcome.PORT_TAKEN):
            record.not_before_s = now_s + self.policy.backoff_s


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    packing, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    slots = make_slots(list_cpus(draw(st.integers(ranks, 3 * ranks))), ranks, packing)
    folds = draw(st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True))
    times = st.integers(0, 80).map(lambda quarters: quarters / 4)  # quarters add up exactly
    errors, is_stuck = st.sampled_from([None, None, "here", "there"]), st.sampled_from([False, False, False, True])
    endings = st.builds(Ending, st.sampled_from(Outcome), errors, is_stuck)
    ends = st.lists(st.tuples(endings, times), min_size=1, max_size=12).filter(
        lambda script: any(
            ending.outcome is not Outcome.PREEMPTED for ending, _ in script
        )  # such a fold restarts for ever
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
def test_every_launch_ends_without_overfilled_slots_or_lost_folds(simulation: Simulation) -> None:
    records = simulation.run()
    state, policy = simulation.state, simulation.policy
    for fold_state in state.folds:
        outcomes = records[fold_state.job].outcomes
        assert fold_state.slot is None and fold_state.status != "running"
        assert (fold_state.status == "done") == (Outcome.DONE in outcomes)
        assert fold_state.restarts <= policy.max_restarts
        if fold_state.status in ("waiting", "stopped"):
            no_slot_left = all(not simulation.lost.isdisjoint(slot.devices) for slot in simulation.initial_slots)
            stopped = state.stopping or Outcome.STOPPED in outcomes[-1:]
            assert stopped or no_slot_left, "not trained, though nobody asked for a stop"
        if fold_state.status == "failed":
            gave_up = sum(outcome in RESTARTED for outcome in outcomes) == policy.max_restarts + 1
            ends = [ending for ending in records[fold_state.job].endings if ending.outcome in RESTARTED]
            errors = [ending.error for ending in ends if ending.error is not None]
            is_repeated = errors[-1:] == errors[-2:-1] != []
            gave_up |= outcomes.count(Outcome.PORT_TAKEN) == MAX_PORT_CONFLICTS + 1
            assert gave_up or is_repeated or outcomes[-1] in (Outcome.USER_ERROR, Outcome.UNKILLABLE, *MEMORY_OUTCOMES)
    failed = bool(state.list_by_status("failed"))
    if simulation.stop_s is None:
        assert state.stopping == (failed and policy.fail_fast)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 3))
def test_launch_without_failures_starts_each_fold_once(folds: int, devices: int, packing: int) -> None:
    state = LaunchState(tuple(map(FoldState, range(folds))), make_slots(list_cpus(devices), 1, packing))
    simulation = Simulation(state, Policy(), packing, [(Ending(Outcome.DONE), 1.0)], None, 0.0)
    records = simulation.run()
    assert all(record.outcomes == [Outcome.DONE] for record in records.values())
    assert all(fold_state.status == "done" for fold_state in simulation.state.folds)


# --- next action -----------------------------------------------------------------------------------------------------


def make_state(*folds: FoldState, stopping: bool = False) -> LaunchState:
    return LaunchState(folds, SLOTS, stopping)


def test_folds_start_in_order_in_free_slots() -> None:
    state = make_state(
        FoldState(4), FoldState(1), FoldState(7, "running", SLOTS[1]), FoldState(2), FoldState(3, "done")
    )
    assert next_action(state, Policy(), 0.0) == Start(4, SLOTS[0])
    state = start_fold(state, 4, SLOTS[0])
    assert next_action(state, Policy(), 0.0) == Start(1, SLOTS[2])
    assert next_action(start_fold(state, 1, SLOTS[2]), Policy(), 0.0) == Wait(None)
    assert next_action(stop_launch(state), Policy(), 0.0) == Wait(None)


def test_other_folds_start_during_a_folds_back_off() -> None:
    state = make_state(FoldState(0, ready_s=5.0), FoldState(1))
    assert next_action(state, Policy(), 4.9) == Start(1, SLOTS[0])
    assert next_action(state, Policy(), 5.0) == Start(0, SLOTS[0])
    both = make_state(FoldState(0, ready_s=5.0), FoldState(1, ready_s=3.0))
    assert next_action(both, Policy(), 1.0) == Wait(3.0)
    assert next_action(stop_launch(both), Policy(), 1.0) == Finish()


def test_failure_stops_other_folds_once_with_fail_fast() -> None:
    state = make_state(FoldState(0, "failed"), FoldState(1, "running", SLOTS[0]), FoldState(2))
    assert next_action(state, Policy(), 0.0) == Start(2, SLOTS[1])
    assert next_action(state, Policy(fail_fast=True), 0.0) == Stop()
    assert next_action(stop_launch(state), Policy(fail_fast=True), 0.0) == Wait(None)


@pytest.mark.parametrize(
    ("state", "fold"),
    [
        (make_state(FoldState(0), FoldState(1, "running", SLOTS[0])), 0),  # the slot is taken
        (make_state(FoldState(0, "running", SLOTS[1])), 0),
        (make_state(FoldState(0, "done")), 0),
        (make_state(FoldState(0, "failed")), 0),
        (make_state(FoldState(0), stopping=True), 0),
    ],
)
def test_invalid_start_raises_assertion_error(state: LaunchState, fold: int) -> None:
    with pytest.raises(AssertionError):
        start_fold(state, fold, SLOTS[0])


def test_end_of_fold_that_does_not_run_raises_assertion_error() -> None:
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
def test_launch_finishes_when_no_fold_runs_or_will_start(folds: list[FoldState], stopping: bool, over: bool) -> None:
    action = next_action(make_state(*folds, stopping=stopping), Policy(), 0.0)
    assert isinstance(action, Finish) == over


# --- the state after an ending ---------------------------------------------------------------------------------------


def end(
    outcome: Outcome, policy: Policy | None = None, stopping: bool = False, error: str | None = None, **changes: Any
) -> FoldState:
    """Return fold 0 after an attempt that ended with the outcome at 100 s."""
    before = replace(FoldState(0, "running", SLOTS[0], micro_batch_size=8), **changes)
    ending = Ending(outcome, error)
    state = end_fold(make_state(before, FoldState(1), stopping=stopping), 0, ending, policy or Policy(), 100.0)
    assert state.find(1) == FoldState(1)
    return state.find(0)


@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("restarts", [0, 2])
def test_done_and_user_error_are_final(stopping: bool, restarts: int) -> None:
    expected = FoldState(0, "done", None, 8, restarts)
    assert end(Outcome.DONE, stopping=stopping, restarts=restarts) == expected
    assert end(Outcome.USER_ERROR, stopping=stopping, restarts=restarts) == replace(expected, status="failed")


@pytest.mark.parametrize("outcome", RESTARTED)
def test_crashed_fold_restarts_with_growing_back_off_until_max_restarts(outcome: Outcome) -> None:
    policy = Policy(max_restarts=5, backoff_s=2.0, max_backoff_s=20.0)
    for restarts, wait_s in enumerate((2.0, 4.0, 8.0, 16.0, 20.0)):
        after = end(outcome, policy, restarts=restarts)
        assert after == FoldState(0, "waiting", None, 8, restarts + 1, 100.0 + wait_s)
    assert end(outcome, policy, restarts=5).status == "failed"
    assert end(outcome, Policy(max_restarts=0)).status == "failed"


def test_stopped_fold_is_not_restarted() -> None:
    assert end(Outcome.STOPPED, restarts=1).status == end(Outcome.STOPPED, stopping=True).status == "stopped"


def test_repeated_error_fails_fold() -> None:
    policy, here, there = Policy(max_restarts=9), Ending(Outcome.CRASHED, "here"), Ending(Outcome.CRASHED, "there")
    state = make_state(FoldState(0))
    for ending, status in (
        (here, "waiting"), (there, "waiting"), (Ending(Outcome.HUNG), "waiting"), (here, "waiting"), (here, "failed")
    ):  # fmt: skip
        state = end_fold(start_fold(state, 0, SLOTS[0]), 0, ending, policy, 0.0)
        assert state.find(0).status == status


@pytest.mark.parametrize("outcome", RESTARTED)
@pytest.mark.parametrize("restarts", [0, 1])
def test_fold_that_crashes_while_launch_stops_counts_as_stopped(outcome: Outcome, restarts: int) -> None:
    assert end(outcome, stopping=True, restarts=restarts).status == "stopped"


@pytest.mark.parametrize(("before", "after"), [(8, 4), (5, 3), (3, 2), (2, 1)])
def test_out_of_memory_halves_micro_batch_at_once_without_counting_restart(before: int, after: int) -> None:
    expected = FoldState(0, "waiting", None, after, 3)
    assert end(Outcome.OUT_OF_MEMORY, micro_batch_size=before, restarts=3) == expected
    stopped = end(Outcome.OUT_OF_MEMORY, stopping=True, micro_batch_size=before, restarts=3)
    assert stopped == replace(expected, status="stopped")


@pytest.mark.parametrize("outcome", MEMORY_OUTCOMES)
def test_out_of_memory_fails_fold_at_micro_batch_size_1_or_without_shrink(outcome: Outcome) -> None:
    assert end(outcome, micro_batch_size=1).status == "failed"
    assert end(outcome, micro_batch_size=8).status == "waiting"
    state = start_fold(LaunchState((FoldState(0, micro_batch_size=8),), SLOTS), 0, SLOTS[0])
    assert end_fold(state, 0, Ending(outcome), Policy(shrink=False), 0.0).find(0).status == "failed"


@pytest.mark.parametrize(("before", "status"), [(2, "failed"), (3, "waiting")])
def test_out_of_memory_leaves_mixup_pairs_of_images(before: int, status: str) -> None:
    fold = FoldState(0, micro_batch_size=before, min_micro_batch_size=2)
    state = start_fold(LaunchState((fold,), SLOTS), 0, SLOTS[0])
    after = end_fold(state, 0, Ending(Outcome.OUT_OF_MEMORY), Policy(), 0.0).find(0)
    assert (after.status, after.micro_batch_size) == (status, 2)


# --- exit classification ---------------------------------------------------------------------------------------------


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
def test_most_specific_cause_counts(codes: tuple[int, ...], causes: tuple[Cause | None, ...], outcome: Outcome) -> None:
    assert classify_exit(codes, causes, done=False, hung=False, stopping=False, advanced=False) is outcome
    assert classify_exit(codes[::-1], causes[::-1], done=False, hung=False, stopping=False, advanced=False) is outcome
    for advanced in (False, True):
        assert classify_exit(codes, causes, done=False, hung=True, stopping=False, advanced=advanced) is Outcome.HUNG
        for hung in (False, True):
            assert classify_exit(codes, causes, done=True, hung=hung, stopping=True, advanced=advanced) is Outcome.DONE


@pytest.mark.parametrize(
    ("codes", "causes", "outcome"),
    [
        ((143,), (None,), Outcome.STOPPED), ((-15,), (None,), Outcome.STOPPED),
        ((143, 1), (None, Cause.ERROR), Outcome.STOPPED), ((-9,), (None,), Outcome.CRASHED),
        ((1,), (Cause.USER_ERROR,), Outcome.USER_ERROR), ((1,), (None,), Outcome.CRASHED),
    ],
)  # fmt: skip
def test_exit_after_stop_request_is_classified_as_stopped(
    codes: tuple[int, ...], causes: tuple[Cause | None, ...], outcome: Outcome
) -> None:
    for advanced in (False, True):
        assert classify_exit(codes, causes, done=False, hung=False, stopping=True, advanced=advanced) is outcome


@pytest.mark.parametrize("code", [130, 143, 138, 140, -15])
@pytest.mark.parametrize(("others", "causes"), [((), ()), ((1,), (Cause.ERROR,))])
def test_exit_after_foreign_stop_request_is_preempted_only_if_fold_advanced(
    code: int, others: tuple[int, ...], causes: tuple[Cause, ...]
) -> None:
    exits = (code, *others), (None, *causes)
    assert classify_exit(*exits, done=False, hung=False, stopping=False, advanced=True) is Outcome.PREEMPTED
    assert classify_exit(*exits, done=False, hung=False, stopping=False, advanced=False) is Outcome.CRASHED
    assert classify_exit((-9,), (None,), done=False, hung=False, stopping=False, advanced=True) is Outcome.CRASHED


@pytest.mark.parametrize("restarts", [0, 2])
def test_preemption_counts_no_restart(restarts: int) -> None:
    policy = Policy(max_restarts=2, backoff_s=3.0)
    state = start_fold(make_state(FoldState(0, restarts=restarts, error="here")), 0, SLOTS[0])
    after = end_fold(state, 0, Ending(Outcome.PREEMPTED), policy, 10.0).find(0)
    assert after == FoldState(0, restarts=restarts, error="here", ready_s=13.0)


@pytest.mark.parametrize("restarts", [0, 2])
def test_port_conflicts_count_no_restart_up_to_limit(restarts: int) -> None:
    policy = Policy(max_restarts=2, backoff_s=3.0)
    before = FoldState(0, restarts=restarts, error="here")
    state = make_state(before)
    for conflicts in range(1, MAX_PORT_CONFLICTS + 1):
        state = end_fold(start_fold(state, 0, SLOTS[0]), 0, Ending(Outcome.PORT_TAKEN), policy, 10.0)
        assert state.find(0) == replace(before, port_conflicts=conflicts, ready_s=13.0)
    state = end_fold(start_fold(state, 0, SLOTS[0]), 0, Ending(Outcome.PORT_TAKEN), policy, 10.0)
    assert state.find(0).status == "failed"
    assert end(Outcome.PORT_TAKEN, stopping=True).status == "stopped"


def test_many_restarts_do_not_overflow_back_off() -> None:
    policy = Policy(max_restarts=10**6)
    state = LaunchState((FoldState(0, restarts=5000),), SLOTS)
    state = end_fold(start_fold(state, 0, SLOTS[0]), 0, Ending(Outcome.CRASHED), policy, 7.0)
    assert state.find(0).ready_s == 7.0 + policy.max_backoff_s


# --- micro-batch size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "too_large", "chosen"),
    [(8, [], 8), (8, [8], 4), (8, [8, 4], 2), (8, [5], 3), (8, [1], 1), (1, [8], 1), (2, [8], 2), (8, [64], 8)],
)
def test_only_sizes_that_ran_out_of_memory_reduce_micro_batch_size(
    configured: int, too_large: list[int], chosen: int
) -> None:
    assert choose_micro_batch_size(configured, too_large) == chosen


def test_folds_that_are_stopped_do_not_start_again_and_others_go_on() -> None:
    state = LaunchState(tuple(map(FoldState, range(4))), SLOTS[:2])
    for job in (0, 1):
        state = start_fold(state, job, SLOTS[job])
    state = stop_folds(state, [0, 2])
    assert [fold_state.status for fold_state in state.folds] == ["running", "running", "stopped", "waiting"]
    state = end_fold(state, 0, Ending(Outcome.CRASHED), Policy(), 0.0)
    assert state.find(0).status == "stopped"
    assert next_action(state, Policy(), 0.0) == Start(3, SLOTS[0])
    state = end_fold(state, 1, Ending(Outcome.CRASHED), Policy(), 0.0)
    assert state.find(1).status == "waiting"
