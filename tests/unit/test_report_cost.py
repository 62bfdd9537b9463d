"""What a run took to train, from its files."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from doccls import blend
from doccls.report.comparison_page import list_cost_rows
from doccls.report.cost import Cost, read_cost
from doccls.report.inputs import read_inputs
from doccls.run.metrics_log import read_metrics, write_fold_metrics
from doccls.run.paths import RunPaths
from tests.unit.report_runs import FOLDS, write_run


def add_cost(paths: RunPaths, time_s: float, mem_MiB: float = 500.0) -> None:
    """Record times, memory, devices and weights, as a training does."""
    for fold in range(FOLDS):
        rows = [row for row in read_metrics(paths)[0] if row.fold == fold]
        peak = mem_MiB if fold == 1 else 100.0
        write_fold_metrics(paths, [replace(row, time_s=time_s, mem_MiB=peak / row.epoch) for row in rows])
        paths.best_checkpoint(fold).parent.mkdir(exist_ok=True)
        paths.best_checkpoint(fold).write_bytes(b"x" * 1000)
    text = paths.snapshot.read_text(encoding="utf-8")
    paths.snapshot.write_text(f"{text}  world_size: 2\n  device: [H100, H100]\n", encoding="utf-8")


def test_cost_of_a_run(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    add_cost(paths, 20.0)
    cost = read_cost(read_inputs(paths))
    assert cost == Cost((3, 3, 3), (60.0, 60.0, 60.0), 500.0, ("H100",), (2,), 3000, 3)


def test_what_is_not_recorded_is_not_invented(tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    for fold in range(FOLDS):
        paths.fold_metrics(fold).unlink()
    paths.snapshot.unlink()
    cost = read_cost(read_inputs(paths))
    assert cost == Cost((), (), None, (), (), 0, 0) and list_cost_rows([cost, cost]) == []


def test_cost_of_a_blend_is_that_of_its_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, seed=seed) for seed in (1, 2)]
    for number, paths in enumerate(runs):
        add_cost(paths, 20.0 + 10 * number, 300.0 + 100 * number)
    parser = argparse.ArgumentParser()
    blend.add_arguments(parser)
    blend.blend(parser.parse_args([*(str(paths.root) for paths in runs), "--run-id", "both"]))
    inputs = read_inputs(RunPaths(runs[0].root.parent / "both"))
    cost = read_cost(inputs)
    assert sorted(cost.fold_times_s) == [60.0] * 3 + [90.0] * 3 and (cost.weights_bytes, cost.num_weights) == (6000, 6)
    assert (cost.devices, cost.world_sizes, cost.peak_mem_MiB, cost.missing) == (("H100",), (2,), 400.0, ())
    shutil.rmtree(runs[1].root)
    cost = read_cost(inputs)
    assert cost.fold_times_s == (60.0,) * 3 and cost.missing == ("tiny2",)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (
            Cost((9, 8), (59.96, 3700.0), 2000.4, ("A", "B"), (1, 2), 2**20, 1),
            ["2", "8 to 9", "1.0 h", "60.0 s to 1.0 h", "2,000 MiB", "A, B", "1 or 2", "1.0 MiB in 1 file"],
        ),
        (
            Cost((8, 8), (90.0, 90.0), 1.0, ("A",), (1,), 2**21, 2),
            ["2", "8", "3.0 min", "1.5 min", "1 MiB", "A", "1", "2.0 MiB in 2 files"],
        ),
    ],
)
def test_costs_in_words(cost: Cost, expected: list[str]) -> None:
    assert [texts for _, texts in list_cost_rows([cost])] == [[text] for text in expected]
