"""The table of runs as text; pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, set_cell_size

from doccls.config.paths import format_path
from doccls.runs.read import RunFacts, Scores
from doccls.system.disk import format_size

_GAP, _INDENT = "  ", "    "
_NO_FIGURE = "-"
_CUT = "..."
_NO_RECIPE = ("output.", "data.valid_fold")  # of config keys


@dataclass(frozen=True)
class Differences:
    """The config keys that are not the same in all runs, as `key=value`."""

    of_runs: tuple[tuple[str, ...], ...]  # for each run those that are not usual
    usual: tuple[str, ...]  # the values of more than half of the runs


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, ...]
    below: tuple[tuple[str, ...], ...]  # lines below, each as words to wrap


def order_runs(runs: Iterable[RunFacts]) -> list[RunFacts]:
    """Order the runs by their start, newest first; those that started at the same time by name."""
    return sorted(sorted(runs, key=lambda run: run.name), key=lambda run: run.started, reverse=True)


def derive_state(run: RunFacts) -> str:
    """Return the state of a run in plain words."""
    finished = [row.fold for row in run.folds]
    count = run.merged_folds or len(finished)
    folds = "" if run.num_folds is None else f" {count}/{run.num_folds} folds"
    if run.activity is not None:
        return f"{run.activity}{folds}"
    if run.problems:
        return "other version" if run.is_of_other_version else "damaged"
    if run.is_blend:
        return "blend"
    if run.merged_scores is not None:
        return "merged" if run.num_folds in (None, count) else f"merged{folds}"
    if finished and len(finished) == run.num_folds:
        return "not merged"
    if run.valid_fold in finished:
        return f"fold{'s' * (len(finished) > 1)} {', '.join(map(str, finished))} only"
    if run.failure is not None:
        return f"failed{folds}"
    return f"{'queued?' if run.is_submitted else 'stopped'}{folds}"


def average_folds(run: RunFacts) -> Scores | None:
    """Return the mean scores of the finished folds, those on damaged copies only if all have them."""
    scores = [row.scores for row in run.folds]
    if not scores:
        return None
    damaged = [score.damaged for score in scores if score.damaged is not None]
    return Scores(
        sum(score.clean for score in scores) / len(scores),
        sum(damaged) / len(damaged) if len(damaged) == len(scores) else None,
    )


def find_differences(runs: Sequence[RunFacts]) -> Differences:
    """Find the config keys that are not the same in all runs that have them, but for those that are no recipe.

    Runs of other versions of doccls may lack keys, and a blend has none.
    """
    configs = [run.settings or {} for run in runs]
    usual: dict[str, str] = {}
    differing = []
    for key in dict.fromkeys(key for config in configs for key in config if not key.startswith(_NO_RECIPE)):
        counts = Counter(config[key] for config in configs if key in config)
        if len(counts) > 1:
            differing.append(key)
            value, count = counts.most_common(1)[0]
            if count > counts.total() / 2:
                usual[key] = value
    of_runs = tuple(
        tuple(_format_setting(key, config[key]) for key in differing if key in config and config[key] != usual.get(key))
        for config in configs
    )
    return Differences(of_runs, tuple(_format_setting(key, value) for key, value in usual.items()))


def _format_setting(key: str, value: str) -> str:
    return f"{quote(key)}={quote(value)}"


def quote(text: str) -> str:
    """Return text from a file as one word without control characters: in quotes with escapes if need be."""
    return text if text and text.isprintable() and " " not in text else repr(text)


def render_table(exp_dir: Path, runs: Sequence[RunFacts], width: int | None) -> str:
    """Render the runs in the order given, wrapped to the width of a terminal, or not at all if that is None."""
    differences = find_differences(runs)
    all_scores = [run.merged_scores or average_folds(run) for run in runs]
    has_damaged = any(scores is not None and scores.damaged is not None for scores in all_scores)
    header = ("run", "clean", *(("damaged", "gap") if has_damaged else ()), "state", "size")
    rows = [
        _Row(
            (
                format_path(Path(run.name)),
                *_format_scores(scores, "" if run.merged_scores else "~", has_damaged),
                derive_state(run),
                format_size(run.size_bytes),
            ),
            _list_remarks(run, _clip(unusual, width)),
        )
        for run, scores, unusual in zip(runs, all_scores, differences.of_runs, strict=True)
    ]
    count = "1 run" if len(runs) == 1 else f"{len(runs):,} runs"
    lines = [f"{count} in {format_path(exp_dir)}, newest first", *_render_rows(header, rows, width)]
    lines.append("")
    if differences.usual:
        lines += wrap_words(("usual:", *_clip(differences.usual, width)), width)
    lines += [line for note in _list_notes(rows, has_damaged, differences) for line in wrap_words(note.split(), width)]
    return "\n".join(lines) + "\n"


def _clip(words: tuple[str, ...], width: int | None) -> tuple[str, ...]:
    """Shorten words that have no room in a line of a terminal."""
    if width is None:
        return words
    room = max(width - 2 * len(_INDENT), len(_CUT))
    return tuple(
        word if cell_len(word) <= room else set_cell_size(word, room - len(_CUT)).rstrip() + _CUT for word in words
    )


def _format_scores(scores: Scores | None, mark: str, has_damaged: bool) -> list[str]:
    figures = [None, None, None] if scores is None else [scores.clean, scores.damaged, scores.gap]
    shown = figures if has_damaged else figures[:1]
    return [_NO_FIGURE if figure is None else f"{mark}{figure:.4f}" for figure in shown]


def _list_remarks(run: RunFacts, unusual: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    remarks = [tuple(f"! {_escape(problem)}".split(" ")) for problem in run.problems]
    if run.failure is not None and derive_state(run).startswith("failed"):
        remarks.append(tuple(f"! {_escape(run.failure)}".split(" ")))
    return (*remarks, unusual) if unusual else tuple(remarks)


def _escape(text: str) -> str:
    return text if text.isprintable() else repr(text)


def _render_rows(header: tuple[str, ...], rows: Sequence[_Row], width: int | None) -> list[str]:
    """Align the cells; on a terminal that is too narrow for the longest names, those have a line of their own."""
    tables = [header, *(row.cells for row in rows)]
    others = [max(cell_len(cells[column]) for cells in tables) for column in range(1, len(header))]
    first = max(cell_len(cells[0]) for cells in tables)
    if width is not None:
        first = min(first, max(width - sum(others) - len(_GAP) * len(others), len(header[0])))
    lines = []
    for cells, below in [(header, ()), *((row.cells, row.below) for row in rows)]:
        name = cells[0]
        if cell_len(name) > first:
            lines.append(name)
            name = ""
        aligned = [
            _pad(text, size, to_left=column == len(others) - 2)
            for column, (text, size) in enumerate(zip(cells[1:], others, strict=True))
        ]
        lines.append(_GAP.join([_pad(name, first, to_left=True), *aligned]))
        for words in below:
            lines += wrap_words(words, width, _INDENT)
    return lines


def _pad(text: str, size: int, to_left: bool) -> str:
    space = " " * (size - cell_len(text))
    return text + space if to_left else space + text


def wrap_words(words: Sequence[str], width: int | None, indent: str = "") -> list[str]:
    """Join the words to lines of at most that width, all but the first indented once more; never split a word."""
    lines: list[str] = []
    line = indent + words[0]
    for word in words[1:]:
        if width is not None and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line = f"{indent}{_INDENT}{word}"
        else:
            line += f" {word}"
    return [*lines, line]


def _list_notes(rows: Sequence[_Row], has_damaged: bool, differences: Differences) -> list[str]:
    """Explain what the table has, and nothing else."""
    cells = [cell for row in rows for cell in row.cells]
    states = {row.cells[-2].split(" ")[0] for row in rows}
    notes = [
        "clean: macro-F1 on the pages as they are"
        + ("; damaged: on damaged copies of them; gap: clean minus damaged" if has_damaged else "")
    ]
    if any(cell.startswith("~") for cell in cells):
        notes.append("~: mean of the finished folds, which is not comparable with a merged run")
    if differences.usual:
        notes.append("usual: what most runs have, of the config keys that differ; below a run is what it has instead")
    elif any(differences.of_runs):
        notes.append("below each run: the config keys that differ among these runs")
    if "not" in states:
        notes.append("not merged: doccls-launch merge RUN")
    if states & {"stopped", "failed"}:
        notes.append("stopped, failed: doccls-launch status RUN says more, and how to resume")
    if "queued?" in states:
        notes.append("queued?: it was submitted to Slurm; doccls-launch status RUN asks there")
    return notes
