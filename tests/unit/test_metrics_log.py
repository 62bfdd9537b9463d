"""metrics.jsonl: the contract's keys, a line an epoch, sorted by fold and epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from doccls.run.metrics_log import EpochMetrics, remove_metrics_leftovers, write_fold_metrics, write_metrics
from doccls.run.paths import RunPaths


def make_row(fold: int, epoch: int) -> EpochMetrics:
    return EpochMetrics(fold, epoch, 1.5, 0.25, 0.1 + fold, 1e-3, 3.5, 100.0)


def read(paths: RunPaths) -> list[dict[str, Any]]:
    return [json.loads(line) for line in paths.metrics.read_text().splitlines()]


def test_rows_are_json_lines_with_the_contracts_keys(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(0, 1)])
    assert paths.metrics.read_text().endswith("}\n")
    (row,) = read(paths)
    contract = ["fold", "epoch", "train_loss", "valid_loss", "macro_f1", "lr", "time_s", "mem_MiB"]
    assert list(row) == [*contract, "selection_f1", "weights"]
    assert row["epoch"] == 1 and isinstance(row["epoch"], int) and row["lr"] == 1e-3


def test_rows_are_sorted_by_fold_and_epoch_as_numbers(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for fold in (10, 2, 0):
        write_fold_metrics(paths, [make_row(fold, epoch) for epoch in range(1, 12)])
    assert [(row["fold"], row["epoch"]) for row in read(paths)] == [
        (fold, epoch) for fold in (0, 2, 10) for epoch in range(1, 12)
    ]


def test_a_killed_fold_removes_what_it_had_half_written_and_no_one_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path)

    def kill(*others: object) -> None:
        raise KeyboardInterrupt

    for fold in (1, 12):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for act in ("replace", "unlink"):  # nobody tidies up after a SIGKILL
                patch.setattr(Path, act, lambda path, *others, **words: kill() if path.suffix == ".tmp" else None)
            write_metrics(paths, f"fold{fold}")
    assert len(list(tmp_path.glob(".metrics.jsonl.fold*.tmp"))) == 2
    remove_metrics_leftovers(paths, 1)
    (left,) = tmp_path.glob(".*.tmp")
    assert left.name.startswith(".metrics.jsonl.fold12.")
    write_fold_metrics(paths, [make_row(12, 1)])
    assert [row["fold"] for row in read(paths)] == [12]


def test_a_fold_trained_again_replaces_its_rows(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(0, 1), make_row(0, 2)])
    write_fold_metrics(paths, [make_row(1, 1)])
    write_fold_metrics(paths, [make_row(0, 1)])
    assert [(row["fold"], row["epoch"]) for row in read(paths)] == [(0, 1), (1, 1)]


def test_the_whole_is_made_anew_from_the_folds(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(0, 1)])
    paths.metrics.write_text("torn")
    write_metrics(paths)
    assert len(read(paths)) == 1


def test_a_run_without_metrics_gets_an_empty_file(tmp_path: Path) -> None:
    write_metrics(RunPaths(tmp_path))
    assert RunPaths(tmp_path).metrics.read_text() == ""


@pytest.mark.parametrize("line", ['{"fold": 1, "epo', "", '{"a": 1}', "[1]", "3", '{"fold": "x"}', "\xff"])
def test_a_damaged_line_is_left_out_and_told(tmp_path: Path, line: str) -> None:
    paths = RunPaths(tmp_path)
    assert write_fold_metrics(paths, [make_row(1, 1), make_row(1, 2)]) == []
    first, _ = paths.fold_metrics(1).read_text().splitlines()
    paths.fold_metrics(1).write_text(f"{first}\n{line}\n")
    remarks = write_fold_metrics(paths, [make_row(0, 1)])
    assert remarks == ["metrics/fold1.jsonl:2: damaged, and left out of metrics.jsonl"]
    assert [(row["fold"], row["epoch"]) for row in read(paths)] == [(0, 1), (1, 1)]


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(1, 1)])
    paths.fold_metrics(1).write_text("")
    assert write_metrics(paths) == ["metrics/fold1.jsonl: empty"]
