"""metrics.jsonl has the contract's keys and one line per epoch, sorted by fold and epoch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doccls.run.metrics_log import (
    EpochMetrics,
    read_fold_metrics,
    remove_metrics_leftovers,
    write_fold_metrics,
    write_metrics,
)
from doccls.run.paths import RunPaths


def make_row(fold: int, epoch: int) -> EpochMetrics:
    return EpochMetrics(fold, epoch, 1.5, 0.25, 0.1 + fold, 1e-3, 3.5, 100.0)


def read(paths: RunPaths) -> list[dict[str, Any]]:
    return [json.loads(line) for line in paths.metrics.read_text().splitlines()]


def test_rows_are_json_lines_with_contract_keys(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(0, 1)])
    assert paths.metrics.read_text().endswith("}\n")
    (row,) = read(paths)
    contract = ["fold", "epoch", "train_loss", "valid_loss", "macro_f1", "lr", "time_s", "mem_MiB"]
    assert list(row) == [*contract, "selection_f1", "weights", "images_per_s"]
    assert row["epoch"] == 1 and isinstance(row["epoch"], int) and row["lr"] == 1e-3


def test_score_on_damaged_pages_is_a_key_only_where_there_is_one(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(0, 1), replace(make_row(0, 2), macro_f1_damaged=0.25)])
    plain, damaged = read(paths)
    assert damaged == plain | {"epoch": 2, "macro_f1_damaged": 0.25} and "macro_f1_damaged" not in plain


def test_rows_are_sorted_numerically_by_fold_and_epoch(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for fold in (10, 2, 0):
        write_fold_metrics(paths, [make_row(fold, epoch) for epoch in range(1, 12)])
    assert [(row["fold"], row["epoch"]) for row in read(paths)] == [
        (fold, epoch) for fold in (0, 2, 10) for epoch in range(1, 12)
    ]


def test_only_partial_files_of_the_killed_fold_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(tmp_path)

    def kill() -> None:
        raise KeyboardInterrupt

    for fold in (1, 12):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in ("replace", "unlink"):  # nothing cleans up after a SIGKILL
                patch.setattr(Path, name, lambda path, *_, **__: kill() if path.suffix == ".tmp" else None)
            write_metrics(paths, f"fold{fold}")
    assert len(list(tmp_path.glob(".metrics.jsonl.fold*.tmp"))) == 2
    remove_metrics_leftovers(paths, 1)
    (remaining,) = tmp_path.glob(".*.tmp")
    assert remaining.name.startswith(".metrics.jsonl.fold12-")
    write_fold_metrics(paths, [make_row(12, 1)])
    assert [row["fold"] for row in read(paths)] == [12]


def test_retrained_fold_replaces_its_rows(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(0, 1), make_row(0, 2)])
    write_fold_metrics(paths, [make_row(1, 1)])
    write_fold_metrics(paths, [make_row(0, 1)])
    assert [(row["fold"], row["epoch"]) for row in read(paths)] == [(0, 1), (1, 1)]


def test_damaged_log_is_rebuilt_from_fold_files(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(0, 1)])
    paths.metrics.write_text("torn")
    write_metrics(paths)
    assert len(read(paths)) == 1


def test_run_without_metrics_gets_an_empty_file(tmp_path: Path) -> None:
    write_metrics(RunPaths(tmp_path))
    assert RunPaths(tmp_path).metrics.read_text() == ""


@pytest.mark.parametrize("line", ['{"fold": 1, "epo', "", '{"a": 1}', "[1]", "3", '{"fold": "x"}', "\xff"])
def test_damaged_line_is_skipped_with_warning(tmp_path: Path, line: str) -> None:
    paths = RunPaths(tmp_path)
    assert write_fold_metrics(paths, [make_row(1, 1), make_row(1, 2)]) == []
    first, _ = paths.fold_metrics(1).read_text().splitlines()
    paths.fold_metrics(1).write_text(f"{first}\n{line}\n")
    warnings = write_fold_metrics(paths, [make_row(0, 1)])
    assert warnings == ["metrics/fold1.jsonl:2: damaged, left out of metrics.jsonl"]
    assert [(row["fold"], row["epoch"]) for row in read(paths)] == [(0, 1), (1, 1)]


def test_empty_file_is_reported(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_fold_metrics(paths, [make_row(1, 1)])
    paths.fold_metrics(1).write_text("")
    assert write_metrics(paths) == ["metrics/fold1.jsonl: empty"]


def test_epochs_of_one_fold_are_read_without_damaged_lines(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert read_fold_metrics(paths.fold_metrics(1)) == []
    rows = [make_row(1, 1), make_row(1, 2)]
    write_fold_metrics(paths, rows)
    with paths.fold_metrics(1).open("a") as file:
        file.write('{"fold": 1, "ep')
    assert read_fold_metrics(paths.fold_metrics(1)) == rows
