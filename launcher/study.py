"""A study, configs x settings x seeds as runs whose folds share one queue: its runs, and the order of folds; pure."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from doccls.config.load import parse_override
from doccls.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_FOREIGN = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_ID = 80
_MAX_LABEL = 30  # of a run's settings in its ID


@dataclass(frozen=True)
class StudyRun:
    """A run of a study, before its config is loaded."""

    run_id: str
    config: Path
    seed: int | None = None  # None: the config's own
    settings: tuple[str, ...] = ()  # KEY=VALUE of --set-each

    def list_overrides(self, fold_seed: int | None) -> list[str]:
        """List the keys that the study sets, as in `--set`: all seeds of a config are trained on the same folds.

        `fold_seed` is the seed of the config's own folds; None if the config states it, or there is no `--seeds`.
        """
        overrides = list(self.settings)
        if self.seed is not None:
            overrides.append(f"project.seed={self.seed}")
            if fold_seed not in (None, self.seed):
                overrides.append(f"data.fold_seed={fold_seed}")
        return overrides


@contextmanager
def naming_study() -> Iterator[None]:
    """Make errors about a run of a study advise another `--study`, by which its runs are named, and not `--run-id`."""
    try:
        yield
    except UserError as error:
        if "another --run-id" not in str(error):
            raise
        raise UserError(str(error).replace("another --run-id", "another --study")) from error


def name_fold(fold: int, run_id: str, study: str | None) -> str:
    """Return the name of a fold in log lines: with its run where the log is about several."""
    return f"fold {fold}" if study is None else f"{run_id} fold {fold}"


def check_study_name(name: str) -> str:
    """Return the name of a study.

    Raises:
        UserError: it can't be part of file names.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--study {name!r}: up to 40 letters, digits, dots, hyphens and underscores, the first a letter or digit"
        )
    return name


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse `--seeds`: different non-negative integers, separated by commas.

    Raises:
        UserError: they are not.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise UserError(f"--seeds {text!r}: must be integers of at least 0, separated by commas, such as 42,43,44")
    seeds = tuple(map(int, words))
    twice = next((seed for number, seed in enumerate(seeds) if seed in seeds[:number]), None)
    if twice is not None:
        raise UserError(f"--seeds {text!r}: {twice} is there twice")
    return seeds


def parse_grid(texts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Parse all `--set-each KEY=VALUE,VALUE`, and return every combination of their values, as `--set` takes them.

    Raises:
        UserError: a key has no values or is there twice, or a value is a list.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        key, words = key.strip(), [word.strip() for word in values.split(",")]
        if not key or not all(words):
            raise UserError(f"--set-each {text!r}: write key=value,value, for example --set-each train.lr=1e-4,3e-4")
        if any(character in values for character in "[]{}"):
            raise UserError(
                f"--set-each {text!r}: a value can't be a list or mapping: state these in configs of their own"
            )
        if key in axes:
            raise UserError(f"--set-each {text!r}: {key} is there twice; list all its values in one option")
        values_of_words = [parse_override(f"{key}={word}").value for word in words]
        if any(value in values_of_words[:number] for number, value in enumerate(values_of_words)):
            raise UserError(f"--set-each {text!r}: a value is there twice")
        axes[key] = [f"{key}={word}" for word in words]
    return tuple(itertools.product(*axes.values()))


def list_runs(
    name: str, configs: Sequence[Path], seeds: Sequence[int], grid: Sequence[tuple[str, ...]] = ((),)
) -> tuple[StudyRun, ...]:
    """List the runs of a study: each config with each settings of the grid and each seed, or else with its own seed.

    The run id is made from the names of the study and of the config's file, from the settings, and from the seed.

    Raises:
        UserError: two configs would give the same run id.
    """
    runs: dict[str, StudyRun] = {}
    for config, settings in itertools.product(configs, grid):
        stem = _FOREIGN.sub("-", config.stem).strip("-.") or "config"
        for seed in seeds or (None,):
            suffix = _label(settings) + ("" if seed is None else f"-s{seed}")
            run_id = f"{name}-{stem[: _MAX_ID - len(name) - len(suffix) - 1]}{suffix}"
            if run_id in runs:
                raise UserError(
                    f"--config {runs[run_id].config} and {config} would both be run {run_id}: rename one of the files"
                )
            runs[run_id] = StudyRun(run_id, config, seed, settings)
    return tuple(runs.values())


def order_runs(efforts: Sequence[float]) -> list[int]:
    """Return the numbers of runs whose folds take this effort, in the order in which an array trains them."""
    return sorted(range(len(efforts)), key=lambda number: (-efforts[number], number))


def _label(settings: Sequence[str]) -> str:
    """Return a part of a run id: the last words of the keys and the values, or a digest where these can't be in it."""
    if not settings:
        return ""
    pairs = [setting.partition("=") for setting in settings]
    text = "-".join(f"{key.rpartition('.')[2]}{value}" for key, _, value in pairs)
    if _FOREIGN.search(text) or len(text) > _MAX_LABEL:
        text = "x" + hashlib.sha256("\n".join(settings).encode()).hexdigest()[:8]
    return f"-{text}"


@dataclass(frozen=True)
class Work:
    """The folds of a run that wait for a slot, and what is known about how long one takes."""

    run: int  # its number in the study
    folds: tuple[int, ...]
    units: float  # expected work of a fold: epochs x pages x pixels
    measured_s: float | None  # mean time of the run's finished folds; None without any


def order_folds(works: Sequence[Work]) -> list[tuple[int, int]]:
    """Return (run, fold) in the order in which they start: those that are expected to take longest first.

    So the last folds to end are short, and slots idle little (Graham, Bounds on Multiprocessing Timing Anomalies,
    1969). Where folds are expected to take equally long, those of one run start one after another. Finished folds of a
    run say how long its others take; runs without any are compared by their expected work, at the rate of the others.
    """
    rates = [work.measured_s / work.units for work in works if work.measured_s is not None and work.units]
    rate = sum(rates) / len(rates) if rates else 1.0

    def expect(work: Work) -> float:
        return work.units * rate if work.measured_s is None else work.measured_s

    ordered = sorted(works, key=lambda work: (-expect(work), work.run))
    return [(work.run, fold) for work in ordered for fold in work.folds]
