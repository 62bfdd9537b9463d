"""What a comparison of runs says: differences of scores, the pages on which they disagree, and their configs; pure."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np

from doccls.errors import UserError
from doccls.oof.bootstrap import bootstrap_accuracy_gap, bootstrap_gap, encode_groups
from doccls.oof.comparable import FOLDS, GROUPS, Damage, find_damage_problem, find_differences
from doccls.oof.merge import MergedOof
from doccls.oof.metrics import score_labels
from doccls.report.content import Command, PageResult, ReportContent, derive_content
from doccls.report.cost import Cost
from doccls.report.inputs import ReportInputs

MAX_RUNS = len(ascii_uppercase)
# The outcomes of a page that two runs predict: the first three are disagreements.
OUTCOMES = ("only first right", "only other right", "both wrong, differently", "both wrong, alike", "both right")
_NUM_DISAGREEMENTS = 3
_IDENTITY = ("run_id", "fingerprint")  # which the page's header names


@dataclass(frozen=True)
class RunRecord:
    """The files of one run that is compared."""

    inputs: ReportInputs
    cost: Cost
    damage_version: str | None  # None if it isn't recorded


@dataclass(frozen=True)
class ComparedRun:
    """A run or a blend as the page names and describes it."""

    letter: str
    content: ReportContent
    cost: Cost


@dataclass(frozen=True)
class Difference:
    """A score of a run minus that of the first run, with the paired bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_0(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class ScoreDifferences:
    """The differences on one kind of pages."""

    pages: str  # `clean` or `damaged`
    macro_f1: Difference
    accuracy: Difference
    num_changed: int  # pages whose predicted class differs


@dataclass(frozen=True)
class Pair:
    """The first run and another one."""

    letter: str  # of the other run
    differences: tuple[ScoreDifferences, ...]
    notes: tuple[str, ...]  # what limits this comparison
    outcomes: tuple[tuple[int, ...], ...]  # rows of train.csv by outcome, in the order of OUTCOMES


@dataclass(frozen=True)
class ClassRow:
    """The F1 of one class in each run."""

    label: str
    num_samples: int
    f1: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        """The F1 of each further run minus that of the first."""
        return tuple(f1 - self.f1[0] for f1 in self.f1[1:])

    @property
    def largest(self) -> float:
        """The largest absolute difference."""
        return max(map(abs, self.differences))


@dataclass(frozen=True)
class DifferingKey:
    """A key of config.yaml whose value is not the same in all runs."""

    key: str
    values: tuple[str | None, ...]  # of each run that has a config; None if that lacks the key


@dataclass(frozen=True)
class PagePredictions:
    """A page of train.csv and what each run predicts for it. Classes are indices."""

    row: int
    sample_id: str
    target: int
    predictions: tuple[tuple[int, float], ...]  # class and calibrated probability


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows, except for pictures of pages."""

    runs: tuple[ComparedRun, ...]
    classes: tuple[str, ...]
    interval_units: str  # what the bootstrap resamples: rows or groups
    notes: tuple[str, ...]
    pairs: tuple[Pair, ...]
    pages: tuple[PagePredictions, ...]
    class_rows: tuple[ClassRow, ...]  # the largest absolute difference first
    configured: tuple[str, ...]  # letters of the runs that have a config
    settings: tuple[DifferingKey, ...]
    provenance: tuple[DifferingKey, ...]
    commands: tuple[Command, ...]


def derive_comparison(records: Sequence[RunRecord]) -> Comparison:
    """Derive the content of the page from the files of two or more runs.

    Raises:
        UserError: the runs are not of the same rows, labels and classes.
    """
    check_comparable(records)
    merged = [record.inputs.merged for record in records]
    runs = tuple(
        ComparedRun(letter, derive_content(record.inputs), record.cost)
        for letter, record in zip(ascii_uppercase, records, strict=False)
    )
    groups = next((item.groups for item in merged if item.groups is not None), None)
    used = np.setdiff1d(np.arange(len(merged[0].ids)), merged[0].skipped)
    unit_N = None if groups is None else encode_groups([groups[row] for row in used.tolist()])
    pages = _pair_pages([run.content.pages for run in runs])
    settings, provenance = _compare_settings(runs)
    return Comparison(
        runs=runs,
        classes=merged[0].classes,
        interval_units="rows" if groups is None else "groups",
        notes=_list_notes(runs, groups is not None),
        pairs=tuple(
            _compare(records[0], record, run.letter, used, unit_N, sort_outcomes(pages, number))
            for number, (record, run) in enumerate(zip(records, runs, strict=True))
            if number
        ),
        pages=pages,
        class_rows=compare_classes([run.content for run in runs]),
        configured=tuple(run.letter for run in runs if run.content.settings),
        settings=settings,
        provenance=provenance,
        commands=_list_commands(records),
    )


# --- runs that can be compared ---------------------------------------------------------------------------------------


def check_comparable(records: Sequence[RunRecord]) -> None:
    """Check that the runs are different, and that their predictions are of the same rows, labels and classes.

    Raises:
        UserError: they are not; lists what differs between the first run and each other.
    """
    if len(records) > MAX_RUNS:
        raise UserError(f"RUN: {len(records)} runs, and a comparison takes at most {MAX_RUNS}")
    roots = [record.inputs.paths.root for record in records]
    twice = next((root for number, root in enumerate(roots) if root in roots[:number]), None)
    if twice is not None:
        raise UserError(f"RUN {twice} is named twice: a comparison needs different runs")
    first, *others = (record.inputs.merged for record in records)
    problems = [
        f"{root}: {problem}"
        for root, other in zip(roots[1:], others, strict=True)
        for problem in find_differences(first, other, _list_ignored(first, other))
    ]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        unfinished = "".join(
            f"\n- {record.inputs.paths.root}: folds {', '.join(map(str, record.inputs.missing_folds))} are not finished"
            for record in records
            if record.inputs.missing_folds
        )
        raise UserError(
            f"only runs on the same rows, labels and classes can be compared; compared with {roots[0]}:\n{listed}"
            f"{unfinished}"
        )


def _list_ignored(first: MergedOof, other: MergedOof) -> tuple[str, ...]:
    """Return the columns that may differ: pages are paired whatever their folds, and a blend records no groups."""
    return (FOLDS,) if first.groups is not None and other.groups is not None else (FOLDS, GROUPS)


def _list_notes(runs: Sequence[ComparedRun], has_groups: bool) -> tuple[str, ...]:
    notes = []
    if not has_groups and any(run.content.summary.interval_units == "groups" for run in runs):
        notes.append(
            "the pages are in groups (data.group_col), which blends don't record, so the intervals of the differences "
            "come from resampling rows, and are too narrow: name a run that is not a blend too"
        )
    for selection in dict.fromkeys(run.content.summary.selection for run in runs):
        letters = [run.letter for run in runs if run.content.summary.selection == selection]
        notes.append(selection if len(letters) == len(runs) else f"{_join(letters)}: {selection}")
    notes += [f"{run.letter}: {note}" for run in runs for note in run.content.summary.notes]
    return tuple(notes)


def _join(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


# --- scores ----------------------------------------------------------------------------------------------------------


def _compare(
    first: RunRecord,
    other: RunRecord,
    letter: str,
    used: np.ndarray,
    unit_N: np.ndarray | None,
    outcomes: tuple[tuple[int, ...], ...],
) -> Pair:
    ours, theirs = first.inputs.merged, other.inputs.merged
    targets_N, num_classes = ours.targets_N[used], len(ours.classes)

    def compare(pages: str, logits_NC: np.ndarray, others_NC: np.ndarray) -> ScoreDifferences:
        first_N, other_N = logits_NC[used].argmax(axis=1), others_NC[used].argmax(axis=1)
        return compare_scores(pages, targets_N, first_N, other_N, num_classes, unit_N)

    differences, notes = [compare("clean", ours.logits_NC, theirs.logits_NC)], []
    problem = find_damage_problem([_describe_damage(first), _describe_damage(other)])
    if problem is not None:
        notes.append(f"no difference on damaged copies: {problem}")
    elif ours.damaged_logits_NC is not None and theirs.damaged_logits_NC is not None:
        differences.append(compare("damaged", ours.damaged_logits_NC, theirs.damaged_logits_NC))
    elif ours.damaged_logits_NC is not None or theirs.damaged_logits_NC is not None:
        notes.append("no difference on damaged copies: only one of the two has predictions of them")
    return Pair(letter, tuple(differences), (*notes, *_list_pair_notes(first.inputs, other.inputs, letter)), outcomes)


def compare_scores(
    pages: str,
    targets_N: np.ndarray,
    first_N: np.ndarray,
    other_N: np.ndarray,
    num_classes: int,
    unit_N: np.ndarray | None = None,
) -> ScoreDifferences:
    """Return how much better the predicted classes `other_N` (n,) are than `first_N`, of the same rows."""
    f1 = score_labels(targets_N, other_N) - score_labels(targets_N, first_N)
    hits = float(np.mean(other_N == targets_N)) - float(np.mean(first_N == targets_N))
    return ScoreDifferences(
        pages,
        Difference(f1, *bootstrap_gap(targets_N, other_N, first_N, num_classes, unit_N)),
        Difference(hits, *bootstrap_accuracy_gap(targets_N, other_N, first_N, num_classes, unit_N)),
        int((first_N != other_N).sum()),
    )


def _describe_damage(record: RunRecord) -> Damage:
    summary = record.inputs.summary
    level = None if summary.damaged is None else summary.damaged.level
    return Damage(record.inputs.paths.run_id, level, record.damage_version)


def _list_pair_notes(first: ReportInputs, other: ReportInputs, letter: str) -> list[str]:
    notes = [
        f"folds {', '.join(map(str, inputs.missing_folds))} of {name} are not finished: all figures are about the "
        "pages of the others"
        for name, inputs in (("A", first), (letter, other))
        if inputs.missing_folds
    ]
    num_moved = int((first.merged.folds_N != other.merged.folds_N).sum())
    if num_moved:
        notes.append(
            f"the folds of A and {letter} differ ({num_moved:,} pages are in another fold, as with another "
            "project.seed or data.folds): pages are paired by ID, and no model has trained on the page that it "
            "predicts, but the difference also contains that of the training pages"
        )
    if _has_other_data(first, other):
        notes.append(
            f"the data of A and {letter} differ by config.yaml: the files of some images have changed, or the rule of "
            "their version that makes pixels of files"
        )
    return notes


def _has_other_data(first: ReportInputs, other: ReportInputs) -> bool:
    """Return whether the snapshots say that the images differ; False if that isn't known."""
    known = [inputs.snapshot["provenance"].get("data_digest") for inputs in (first, other) if inputs.snapshot]
    return len(known) == 2 and known[0] != known[1]


def compare_classes(contents: Sequence[ReportContent]) -> tuple[ClassRow, ...]:
    """List the F1 of each class, the largest absolute difference first."""
    columns = zip(*(content.summary.classes for content in contents), strict=True)
    rows = [ClassRow(column[0].label, column[0].num_samples, tuple(item.f1 for item in column)) for column in columns]
    return tuple(sorted(rows, key=lambda row: -row.largest))


# --- pages -----------------------------------------------------------------------------------------------------------


def _pair_pages(runs: Sequence[Sequence[PageResult]]) -> tuple[PagePredictions, ...]:
    by_row = [{page.row: page for page in pages} for pages in runs]
    return tuple(
        PagePredictions(
            row, page.sample_id, page.target, tuple((pages[row].prediction, pages[row].confidence) for pages in by_row)
        )
        for row, page in sorted(by_row[0].items())
    )


def sort_outcomes(pages: Sequence[PagePredictions], other: int) -> tuple[tuple[int, ...], ...]:
    """Return the rows of each outcome for the first run and that of number `other`, in the order of OUTCOMES.

    Those come first of which both runs are most certain: by the lower of the two probabilities.
    """
    outcomes: dict[str, list[PagePredictions]] = {outcome: [] for outcome in OUTCOMES}
    for page in pages:
        (ours, _), (theirs, _) = page.predictions[0], page.predictions[other]
        outcomes[_find_outcome(page.target, ours, theirs)].append(page)

    def rank(page: PagePredictions) -> tuple[float, int]:
        return -min(page.predictions[0][1], page.predictions[other][1]), page.row

    return tuple(tuple(page.row for page in sorted(found, key=rank)) for found in outcomes.values())


def _find_outcome(target: int, first: int, other: int) -> str:
    if first == other:
        return "both right" if first == target else "both wrong, alike"
    if first == target:
        return "only first right"
    return "only other right" if other == target else "both wrong, differently"


def order_rows(pairs: Sequence[Pair]) -> list[int]:
    """Order the rows by how much they need a thumbnail: disagreements, then pages wrong alike, then those right.

    Within each of these, the outcomes of all pairs take turns.
    """
    keyed = [
        ((max(_NUM_DISAGREEMENTS - 1, outcome), turn, number, outcome), row)
        for number, pair in enumerate(pairs)
        for outcome, rows in enumerate(pair.outcomes)
        for turn, row in enumerate(rows)
    ]
    return list(dict.fromkeys(row for _, row in sorted(keyed)))


# --- configs ---------------------------------------------------------------------------------------------------------


def _compare_settings(runs: Sequence[ComparedRun]) -> tuple[tuple[DifferingKey, ...], tuple[DifferingKey, ...]]:
    """Return the differing keys of the configs, and those of their provenance."""
    contents = [run.content for run in runs if run.content.settings]
    provenance = find_differing_keys([content.provenance for content in contents])
    return (
        find_differing_keys([content.settings for content in contents]),
        tuple(item for item in provenance if item.key not in _IDENTITY),
    )


def find_differing_keys(configs: Sequence[Sequence[tuple[str, str]]]) -> tuple[DifferingKey, ...]:
    """Return the keys whose values are not the same in all configs (key and value), in the order of the configs."""
    values = [dict(config) for config in configs]
    keys = dict.fromkeys(key for config in values for key in config)
    rows = (DifferingKey(key, tuple(config.get(key) for config in values)) for key in keys)
    return tuple(row for row in rows if len(set(row.values)) > 1)


def _fit_together(records: Sequence[RunRecord]) -> bool:
    """Return whether `doccls blend` takes the runs: those on the same data and folds."""
    first, *others = (record.inputs for record in records)
    if any(inputs.missing_folds for inputs in (first, *others)):
        return False
    return not any(find_differences(first.merged, other.merged) or _has_other_data(first, other) for other in others)


def _list_commands(records: Sequence[RunRecord]) -> tuple[Command, ...]:
    commands = []
    if not any(record.inputs.members for record in records) and _fit_together(records):
        runs = " ".join(shlex.quote(str(record.inputs.paths.root)) for record in records)
        commands.append(Command("Predict with these runs together", f"doccls blend {runs}"))
    for letter, record in zip(ascii_uppercase, records, strict=False):
        root = shlex.quote(str(record.inputs.paths.root))
        commands.append(Command(f"See {letter} alone", f"doccls report {root}"))
    return tuple(commands)
