"""What a launch of a study would do: which fold of which run starts where and in which order; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.plan import Assignment, LaunchPlan, Slot, Workload, render_fold_command


@dataclass(frozen=True)
class PlannedFold:
    """A fold of a run in a slot."""

    run_id: str
    assignment: Assignment


@dataclass(frozen=True)
class StudyPlan:
    """The folds that a study trains, in waves over the slots that its runs share.

    A fold starts as soon as a slot is free: the waves show the order if all folds take equally long.
    """

    name: str
    runs: Mapping[str, LaunchPlan]  # by run id, each without waves of its own
    waves: tuple[tuple[PlannedFold, ...], ...]


def plan_study(
    name: str, plans: Mapping[str, LaunchPlan], workloads: Mapping[str, Workload],
    order: Sequence[tuple[str, int]], slots: Sequence[Slot],
) -> StudyPlan:  # fmt: skip
    """Plan a study; `order` has the run id and number of each missing fold, in the order in which they start."""
    folds = [
        PlannedFold(run_id, workloads[run_id].assign(fold, slots[number % len(slots)]))
        for number, (run_id, fold) in enumerate(order)
    ]
    waves = [tuple(folds[start : start + len(slots)]) for start in range(0, len(folds), len(slots))]
    return StudyPlan(name, {run_id: replace(plan, waves=()) for run_id, plan in plans.items()}, tuple(waves))


def render_study_plan(plan: StudyPlan) -> str:
    """Render the plan for people, with each fold's command line."""
    lines = [f"[PLAN] study {plan.name}: {sum(map(len, plan.waves))} folds of {len(plan.runs)} runs"]
    lines += [
        f"[WARNING] {warning}" for warning in dict.fromkeys(w for run in plan.runs.values() for w in run.warnings)
    ]
    for run in plan.runs.values():
        finished = f", finished before: folds {', '.join(map(str, run.finished))}" if run.finished else ""
        sizes = f"{run.batch_size} images a step, {run.images_at_a_time} at a time"
        lines.append(f"[PLAN] run {run.run_folder}: {sizes}{finished}")
    for number, wave in enumerate(plan.waves):
        for fold in wave:
            later = ", or in the first free slot" if number else ""
            name = f"{fold.run_id} fold {fold.assignment.fold}"
            lines.append(f"[PLAN] wave {number + 1}: {name} on {fold.assignment.slot.name}{later}")
            lines.append(f"           {render_fold_command(fold.assignment)}")
    return "\n".join(lines)


def describe_study_plan(plan: StudyPlan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return asdict(plan)
