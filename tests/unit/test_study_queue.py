"""Simulated queues of a study: every fold of every run is trained once, and no slot idles while a fold could start."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.devices import list_cpus
from launcher.plan import make_slots
from launcher.study import Work, order_folds
from launcher.supervise import (
    Ending,
    Finish,
    FoldState,
    LaunchState,
    Outcome,
    Policy,
    Start,
    Wait,
    end_fold,
    next_action,
    start_fold,
)

RUNS, FOLDS = 12, 5  # four configs x three seeds


@dataclass(frozen=True)
class Script:
    """How the attempts at one fold go."""

    durations_s: tuple[float, ...]  # of the attempts that crash, then of one that ends well
    loses_device: bool = False  # the first attempt can't be killed: its device is lost


@dataclass
class Run:
    """What happened to one fold."""

    starts_s: list[float] = field(default_factory=list)
    busy_s: float = 0.0
    end_s: float | None = None


def simulate(scripts: list[Script], devices: int, policy: Policy) -> tuple[LaunchState, list[Run]]:
    """Run the folds in the order of the list, and return the final state and what happened to each."""
    state = LaunchState(tuple(map(FoldState, range(len(scripts)))), make_slots(list_cpus(devices), 1))
    runs = [Run() for _ in scripts]
    events: list[tuple[float, int]] = []  # the ends of running attempts
    now_s = 0.0
    while not isinstance(action := next_action(state, policy, now_s), Finish):
        if isinstance(action, Start):
            script, run = scripts[action.job], runs[action.job]
            assert run.end_s is None and all(job != action.job for _, job in events), "started twice"
            duration_s = script.durations_s[len(run.starts_s)]
            run.starts_s.append(now_s)
            run.busy_s += duration_s
            heapq.heappush(events, (now_s + duration_s, action.job))
            state = start_fold(state, action.job, action.slot)
            continue
        assert isinstance(action, Wait)
        times_s = [events[0][0]] if events else []
        times_s += [] if action.until_s is None else [action.until_s]
        now_s = min(times_s)
        while events and events[0][0] <= now_s:
            _, job = heapq.heappop(events)
            state = end_fold(state, job, decide_ending(scripts[job], runs[job]), policy, now_s)
            if state.find(job).status != "waiting":
                runs[job].end_s = now_s
    return state, runs


def decide_ending(script: Script, run: Run) -> Ending:
    if script.loses_device:
        return Ending(Outcome.UNKILLABLE, is_stuck=True)
    return Ending(Outcome.DONE if len(run.starts_s) == len(script.durations_s) else Outcome.CRASHED)


@st.composite
def studies(draw: st.DrawFn) -> tuple[list[Script], int]:
    """Draw the scripts of all folds, in the order in which a study starts them, and the number of devices."""
    units = draw(st.lists(st.integers(1, 40).map(float), min_size=RUNS, max_size=RUNS))
    works = [Work(run, tuple(range(FOLDS)), effort, None) for run, effort in enumerate(units)]
    crashes = draw(st.lists(st.integers(0, 3), min_size=RUNS * FOLDS, max_size=RUNS * FOLDS))
    lost = draw(st.sets(st.integers(0, RUNS * FOLDS - 1), max_size=5))
    scripts = []
    for number, (run, fold) in enumerate(order_folds(works)):
        jitter = 1 + (run * 7 + fold * 3) % 5 / 8  # folds of a run don't take exactly as long
        durations_s = (*(units[run] / 4,) * crashes[number], units[run] * jitter)
        scripts.append(Script(durations_s, number in lost))
    return scripts, draw(st.sampled_from([8, 64]))


@settings(max_examples=50)
@given(studies())
def test_queue_keeps_the_list_scheduling_bound_and_loses_no_fold(study: tuple[list[Script], int]) -> None:
    scripts, devices = study
    policy = Policy(max_restarts=2)
    state, runs = simulate(scripts, devices, policy)
    lost = sum(script.loses_device for script in scripts)
    assert len(state.slots) == devices - lost
    for script, run, fold in zip(scripts, runs, state.folds, strict=True):
        attempts = min(len(script.durations_s), policy.max_restarts + 1)
        assert fold.status == ("done" if len(script.durations_s) <= attempts and not script.loses_device else "failed")
        assert len(run.starts_s) == (1 if script.loses_device else attempts)
    # Work over the devices that were never lost, and the longest chain of attempts and back-offs of one fold
    # (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
    work_s = sum(run.busy_s for run in runs)
    backoff_s = policy.backoff_s * (1 + 2)
    longest_s = max(run.busy_s for run in runs) + backoff_s
    makespan_s = max(run.end_s for run in runs if run.end_s is not None)
    assert makespan_s <= work_s / (devices - lost) + longest_s + 1e-6


def test_longest_first_leaves_little_idle() -> None:
    units = [40.0, 30.0, 20.0, 10.0] * 3
    works = [Work(run, tuple(range(FOLDS)), effort, None) for run, effort in enumerate(units)]
    scripts = [Script((units[run],)) for run, _ in order_folds(works)]
    _, runs = simulate(scripts, 8, Policy())
    best_s = max(sum(run.busy_s for run in runs) / 8, max(units))
    makespan_s = max(run.end_s or 0.0 for run in runs)
    assert makespan_s <= 1.1 * best_s
    _, in_turn = simulate([Script((units[run],)) for run in range(RUNS) for _ in range(FOLDS)], 8, Policy())
    assert makespan_s <= max(run.end_s or 0.0 for run in in_turn)
