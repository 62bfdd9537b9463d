"""`doccls blend`: it writes the files of a run from those of several, or says in words why it can't."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doccls.blend import add_arguments, blend, explain_choice
from doccls.errors import UserError
from doccls.oof import summary as summary_module
from doccls.oof.blend import BlendResult, Candidate, CandidateName, CandidateScore
from doccls.oof.blend_record import read_record
from doccls.oof.metrics import macro_f1, probabilities
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, read_predictions, write_predictions
from doccls.run.fingerprint import digest_json
from doccls.run.paths import RunPaths

COUNT, FOLDS, CLASSES = 60, 3, ("cat, big", 'do"g', "fish")
TARGETS = np.arange(COUNT) % 3
FOLD_OF = np.arange(COUNT) // 7 % FOLDS
IDS = tuple(f"page{row}" for row in range(COUNT))

Change = Callable[[FoldPredictions], FoldPredictions]
Outputs = dict[str, bytes]


def draw_logits(seed: int, noise: float) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, noise, (COUNT, 3))
    logits[np.arange(COUNT), TARGETS] += 2
    return logits.astype(np.float32)


def write_run(
    folder: Path, seed: int, noise: float = 1.5, damage: str = "none", change: Change = lambda predictions: predictions
) -> RunPaths:
    """Write the fold predictions of a run whose logits have noise of their own."""
    paths = RunPaths(folder)
    clean, damaged = draw_logits(seed, noise), draw_logits(100 + seed, noise + 1)
    is_damaged = damage != "none"
    for fold in range(FOLDS):
        rows = np.flatnonzero(fold == FOLD_OF)
        info = PredictionsInfo(
            f"{seed}-fingerprint", fold, FOLDS, COUNT, CLASSES, tuple(IDS[row] for row in rows), (), 1, 0.5,
            damage=damage, macro_f1_damaged=0.25 if is_damaged else None,  # type: ignore[arg-type]
            selected_by="damaged" if is_damaged else "clean",
        )  # fmt: skip
        predictions = FoldPredictions(info, rows, clean[rows], TARGETS[rows], damaged[rows] if is_damaged else None)
        write_predictions(paths.predictions(fold), change(predictions))
    return paths


def change_info(**changes: Any) -> Change:
    return lambda predictions: dataclasses.replace(predictions, info=dataclasses.replace(predictions.info, **changes))


def run_blend(*args: Path | str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return blend(parser.parse_args([str(arg) for arg in args]))


def refuse(*args: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        run_blend(*args)
    return str(caught.value)


@pytest.fixture
def day(tmp_path: Path) -> Path:
    return tmp_path / "experiments" / "20260101"


@pytest.fixture
def runs(day: Path) -> tuple[Path, Path]:
    """Write two runs with damaged copies."""
    return tuple(write_run(day / f"v{seed}-abc", seed, damage="scan").root for seed in (1, 2))  # type: ignore[return-value]


def read_blend(day: Path) -> tuple[RunPaths, Outputs]:
    (folder,) = day.glob("blend-*")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return RunPaths(folder), files


# --- what is written -------------------------------------------------------------------------------------------------


def test_folder_holds_the_files_of_a_run(runs: tuple[Path, Path], day: Path) -> None:
    assert run_blend(*runs) == 0
    paths, files = read_blend(day)
    assert sorted(files) == [
        "blend.json", "oof/oof.csv", "oof/oof_logits.npy", "oof/oof_logits_damaged.npy", "oof/oof_targets.npy",
        "summary.json",
    ]  # fmt: skip
    assert paths.run_id == f"blend-{digest_json(['1-fingerprint', '2-fingerprint'])[:6]}"
    record = json.loads(paths.blend.read_text())
    assert (record["interval_level"], record["gain_level"]) == (0.95, 0.99)
    assert record["format"] == "doccls-blend-1" and (record["used"], record["decided_by"]) == ("equal", "damaged")
    assert [(m["path"], m["fingerprint"], m["weight"]) for m in record["members"]] == [
        ("../v1-abc", "1-fingerprint", 0.5), ("../v2-abc", "2-fingerprint", 0.5)
    ]  # fmt: skip
    assert [m["macro_f1"] for m in record["members"]] == [macro_f1(TARGETS, draw_logits(seed, 1.5)) for seed in (1, 2)]
    assert [m["macro_f1_damaged"] for m in record["members"]] == [
        macro_f1(TARGETS, draw_logits(seed, 2.5)) for seed in (101, 102)
    ]
    assert [member.weight for member in read_record(paths).members] == [0.5, 0.5]
    assert np.array_equal(np.load(paths.oof_targets), TARGETS)
    for path, seeds, noise in ((paths.oof_logits, (1, 2), 1.5), (paths.oof_logits_damaged, (101, 102), 2.5)):
        logits = np.load(path)
        expected = np.mean([probabilities(draw_logits(seed, noise)) for seed in seeds], axis=0)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(np.exp(logits), expected, rtol=1e-5)
    with paths.oof_csv.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    assert [row[0] for row in rows[1:]] == list(IDS) and rows[0][-3:] == [f"prob_{label}" for label in CLASSES]


def test_summary_has_the_scores_that_decided(runs: tuple[Path, Path], day: Path) -> None:
    run_blend(*runs)
    paths, _ = read_blend(day)
    record, summary = json.loads(paths.blend.read_text()), json.loads(paths.summary.read_text())
    (equal,) = [candidate for candidate in record["candidates"] if candidate["name"] == "equal"]
    for scores, written in ((equal["clean"], summary), (equal["damaged"], summary["damaged"])):
        for name in ("macro_f1", "macro_f1_low", "macro_f1_high"):
            assert written[name] == scores[name]
    assert summary["macro_f1"] == macro_f1(TARGETS, np.load(paths.oof_logits))
    assert summary["notes"][0].startswith("a blend of 2 runs (equal weights)")
    assert "selected by its score on damaged copies" in summary["selection"] and len(summary["folds"]) == FOLDS


def test_thresholds_are_not_learned(runs: tuple[Path, Path], day: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may take long, and nothing would use them."""
    monkeypatch.delattr(summary_module, "find_thresholds")
    run_blend(*runs)
    summary = json.loads(read_blend(day)[0].summary.read_text())
    assert summary["thresholds"]["offsets"] is None and summary["thresholds"]["reason"] == "not tried for a blend"


def test_selected_weights_of_a_fold_are_those_chosen_on_the_others(day: Path) -> None:
    noises = (1, 1.5, 9, 9, 9, 9)
    run_blend(*(write_run(day / f"v{seed}", seed, noise).root for seed, noise in enumerate(noises, 1)))
    paths, files = read_blend(day)
    record = json.loads(paths.blend.read_text())
    assert record["used"] == "selection" and record["decided_by"] == "clean"
    assert record["members"][0]["weight"] > 0.5 and "oof/oof_logits_damaged.npy" not in files
    (selection,) = [candidate for candidate in record["candidates"] if candidate["name"] == "selection"]
    assert selection["weights"] == [member["weight"] for member in record["members"]]
    assert len({tuple(weights) for weights in selection["part_weights"]}) == FOLDS, "the folds must differ"
    weights = np.array(selection["part_weights"])[FOLD_OF]
    probs = np.stack([probabilities(draw_logits(seed, noise)) for seed, noise in enumerate(noises, 1)])
    expected = np.einsum("nr,rnc->nc", weights, probs)
    np.testing.assert_allclose(np.exp(np.load(paths.oof_logits)), expected, rtol=1e-5)


def test_blending_again_gives_the_same_bytes_in_any_order(
    runs: tuple[Path, Path], day: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_blend(*runs)
    out = capsys.readouterr().out
    paths, files = read_blend(day)
    leftover = paths.root / ".blend.json.0a1b.tmp"
    leftover.touch()
    run_blend(*reversed(runs))
    assert read_blend(day)[1] == files and capsys.readouterr().out == out
    shutil.rmtree(paths.root)
    paths.root.mkdir()
    run_blend(*runs)
    assert read_blend(day)[1] == files, "an empty folder is used"


def test_name_and_place_follow_run_id_and_first_run(day: Path, tmp_path: Path) -> None:
    first, second = write_run(day / "v1", 1).root, write_run(tmp_path / "experiments" / "20260202" / "v2", 2).root
    run_blend(second, first, "--run-id", "both")
    folder = RunPaths(second.parent / "both")
    assert [member.path for member in read_record(folder).members] == ["../../20260101/v1", "../v2"]
    with pytest.raises(UserError, match=r"run id '\.\./up': at most 80"):
        run_blend(second, first, "--run-id", "../up")


def test_skipped_rows_stay_without_prediction(day: Path) -> None:
    def skip(predictions: FoldPredictions) -> FoldPredictions:
        if predictions.info.fold:
            return predictions
        logits = predictions.logits_NC.copy()
        logits[2] = np.nan
        info = dataclasses.replace(predictions.info, skipped=(int(predictions.indices_N[2]),))
        return dataclasses.replace(predictions, info=info, logits_NC=logits)

    runs = [write_run(day / f"v{seed}", seed, change=skip).root for seed in (1, 2)]
    run_blend(*runs)
    paths, _ = read_blend(day)
    logits, summary = np.load(paths.oof_logits), json.loads(paths.summary.read_text())
    assert np.flatnonzero(np.isnan(logits).any(axis=1)).tolist() == [2]
    assert (summary["num_samples"], summary["num_skipped"]) == (COUNT - 1, 1)


def test_groups_are_resampled(day: Path) -> None:
    def group(predictions: FoldPredictions) -> FoldPredictions:
        return change_info(groups=tuple(f"g{row // 2}" for row in predictions.indices_N))(predictions)

    run_blend(*(write_run(day / f"v{seed}", seed, change=group).root for seed in (1, 2)))
    paths, _ = read_blend(day)
    record, summary = json.loads(paths.blend.read_text()), json.loads(paths.summary.read_text())
    assert record["interval_units"] == summary["interval_units"] == "groups"
    (equal,) = [candidate for candidate in record["candidates"] if candidate["name"] == "equal"]
    assert equal["clean"]["macro_f1_low"] == summary["macro_f1_low"]


# --- damaged copies that differ --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "reason"), [(("scan", "none"), "only some"), (("scan", "light"), "differently")])
def test_clean_scores_decide_if_damaged_copies_differ(
    day: Path, capsys: pytest.CaptureFixture[str], levels: tuple[str, str], reason: str
) -> None:
    run_blend(*(write_run(day / f"v{number}", number, damage=level).root for number, level in enumerate(levels)))
    out = capsys.readouterr().out
    assert out.startswith("[WARNING] ") and reason in out and f"v0: scan, v1: {levels[1]})" in out
    paths, files = read_blend(day)
    assert json.loads(paths.blend.read_text())["decided_by"] == "clean"
    assert "oof/oof_logits_damaged.npy" not in files and "damaged" not in json.loads(paths.summary.read_text())


def write_snapshot(run: Path, data: str = "d", folds: str = "f", damage_version: int | None = None) -> None:
    version = "" if damage_version is None else f", damage_version: {damage_version}"
    text = f"provenance: {{fingerprint: f, data_digest: {data}, folds_digest: {folds}{version}}}\n"
    RunPaths(run).snapshot.write_text(text)


def test_clean_scores_decide_if_another_version_damaged_the_copies(
    runs: tuple[Path, Path], day: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_snapshot(runs[1], damage_version=2)
    run_blend(*runs)
    assert "[WARNING]" not in capsys.readouterr().out, "the first run has no snapshot"
    write_snapshot(runs[0])
    run_blend(*runs)
    out = capsys.readouterr().out
    assert out.startswith("[WARNING] the runs were validated on copies that different versions of doccls damaged")
    assert "(damage_version in config.yaml: v1-abc: 1, v2-abc: 2): the clean scores decide" in out
    paths, files = read_blend(day)
    assert json.loads(paths.blend.read_text())["decided_by"] == "clean"
    assert "oof/oof_logits_damaged.npy" not in files, "that of the blend above is removed"
    write_snapshot(runs[1], damage_version=1)
    run_blend(*runs)
    assert "[WARNING]" not in capsys.readouterr().out
    assert json.loads(read_blend(day)[0].blend.read_text())["decided_by"] == "damaged"


def test_version_of_damage_does_not_matter_without_damaged_copies(
    day: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is that of the training pages."""
    runs = [write_run(day / f"v{number}", number).root for number in (1, 2)]
    for version, run in enumerate(runs, 1):
        write_snapshot(run, damage_version=version)
    run_blend(*runs)
    assert "[WARNING]" not in capsys.readouterr().out


def test_runs_of_one_name_on_two_days_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = ("scan", "light")
    runs = [write_run(tmp_path / f"2026010{n}" / "v", n, damage=level).root for n, level in enumerate(levels, 1)]
    run_blend(*runs)
    assert "(valid.damage: v: scan, v: light): the clean scores decide" in capsys.readouterr().out


# --- what is refused -------------------------------------------------------------------------------------------------


def test_one_run_and_the_same_run_twice_are_refused(runs: tuple[Path, Path], day: Path) -> None:
    assert "at least two runs" in refuse(runs[0])
    assert f"{runs[0]} is named twice" in refuse(runs[0], runs[1], runs[0] / ".." / runs[0].name)
    shutil.copytree(runs[0], day / "copied")
    assert f"{day / 'copied'} is the same run as {runs[0]}, or a copy of it" in refuse(*runs, day / "copied")


def test_unfinished_missing_and_damaged_runs_are_refused(runs: tuple[Path, Path], day: Path) -> None:
    RunPaths(runs[1]).predictions(1).unlink()
    message = refuse(*runs)
    assert f"RUN {runs[1]}: can't be blended until all" in message and "1 of 3 folds have no predictions: 1" in message
    RunPaths(runs[1]).predictions(1).write_bytes(b"torn")
    assert str(RunPaths(runs[1]).predictions(1)) in refuse(*runs)
    assert "no such run folder" in refuse(runs[0], day / "gone")
    assert not list(day.glob("blend-*"))


def test_blend_of_a_blend_is_refused(runs: tuple[Path, Path], day: Path) -> None:
    run_blend(*runs)
    assert "a blend; name the runs" in refuse(runs[0], read_blend(day)[0].root)


def swap(name: str, first: int, second: int) -> Change:
    """Exchange two rows of a fold's targets or IDs."""

    def change(predictions: FoldPredictions) -> FoldPredictions:
        if predictions.info.fold:
            return predictions
        values = list(predictions.info.ids if name == "ids" else predictions.targets_N)
        values[first], values[second] = values[second], values[first]
        if name == "ids":
            return change_info(ids=tuple(values))(predictions)
        return dataclasses.replace(predictions, targets_N=np.array(values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_info(classes=CLASSES[::-1]), 'the classes are in another order: fish, do"g, cat, big'),
        (change_info(classes=("a", "b", "c")), "the classes are others: a, b, c"),
        (swap("ids", 1, 2), "the IDs differ in 2 of 60 rows (first in row 1, ID 'page1')"),
        (swap("targets", 1, 2), "the labels differ in 2 of 60 rows (first in row 1, ID 'page1')"),
        (lambda p: change_info(groups=tuple("g" for _ in p.indices_N))(p), "the groups differ in 60 of 60 rows"),
        (
            lambda p: p if p.info.fold else change_info(skipped=(3,))(p),
            "the rows without a usable image differ in 1 of 60 rows (first in row 3",
        ),
    ],
)
def test_runs_on_other_data_are_refused(day: Path, change: Change, message: str) -> None:
    runs = write_run(day / "v1", 1).root, write_run(day / "v2", 2, change=change).root
    said = refuse(*runs)
    assert f"- {runs[1]}: {message}" in said and f"compared with {runs[0]}" in said
    assert not list(day.glob("blend-*"))


def test_runs_with_other_folds_or_fewer_rows_are_refused(day: Path) -> None:
    first, second = write_run(day / "v1", 1), write_run(day / "v2", 2)
    info = [read_predictions(second.predictions(fold)) for fold in range(2)]
    for own, other in ((0, 1), (1, 0)):
        moved = dataclasses.replace(info[other], info=dataclasses.replace(info[other].info, fold=own))
        write_predictions(second.predictions(own), moved)
    differing = int(np.sum(FOLD_OF < 2))
    assert f"the folds differ in {differing} of 60 rows" in refuse(first.root, second.root)
    for fold in range(FOLDS):
        predictions = read_predictions(first.predictions(fold))
        kept = predictions.indices_N < 59
        write_predictions(
            second.predictions(fold),
            FoldPredictions(
                dataclasses.replace(
                    predictions.info, fingerprint="fewer", num_samples=59, ids=predictions.info.ids[: kept.sum()]
                ),
                *(array[kept] for array in (predictions.indices_N, predictions.logits_NC, predictions.targets_N)),
            ),
        )
    assert "59 rows instead of 60" in refuse(first.root, second.root)


def test_digests_are_compared_where_both_runs_have_snapshots(runs: tuple[Path, Path], day: Path) -> None:
    write_snapshot(runs[0], "d", "e")
    assert run_blend(*runs) == 0
    write_snapshot(runs[1], "other", "e")
    message = refuse(*runs)
    assert "the data (files, labels or groups" in message and "the folds differ" not in message
    write_snapshot(runs[1], "d", "other")
    assert "the folds differ, by config.yaml" in refuse(*runs)
    write_snapshot(runs[1], "d", "e")
    assert run_blend(*runs) == 0


def test_folder_with_other_content_is_refused(runs: tuple[Path, Path], day: Path) -> None:
    third = write_run(day / "v3", 3, damage="scan").root
    assert "v3 has other files than those of a blend: choose another --run-id" in refuse(*runs, "--run-id", "v3")
    run_blend(*runs, "--run-id", "ours")
    before = {path: path.read_bytes() for path in (day / "ours").rglob("*") if path.is_file()}
    message = refuse(runs[0], third, "--run-id", "ours")
    assert f"{day / 'ours'} has a blend of ../v1-abc, ../v2-abc: choose another --run-id" in message
    assert {path: path.read_bytes() for path in before} == before
    (day / "ours" / "blend.json").write_text("torn")
    assert "damaged, or not the record of a blend" in refuse(*runs, "--run-id", "ours")


EMPTY = {
    "format": "doccls-blend-1", "members": [], "decided_by": "clean", "folds": [], "temperature": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "damaged, or not"),
        ("[]", "damaged, or not"),
        ('{"format": "doccls-blend-9"}', "another version"),
        (json.dumps(EMPTY), "don't sum to 1"),
        (json.dumps(EMPTY | {"temperature": None}), "damaged, or not"),
        ('{"format": "doccls-blend-1", "members": [{"path": "x", "weight": 1}]}', "damaged, or not"),
    ],
)
def test_damaged_record_is_reported(tmp_path: Path, content: str, message: str) -> None:
    paths = RunPaths(tmp_path)
    paths.blend.write_text(content)
    with pytest.raises(UserError, match=message):
        read_record(paths)


# --- the console -----------------------------------------------------------------------------------------------------


def test_console_shows_runs_candidates_choice_weights_and_next_command(
    runs: tuple[Path, Path], day: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_blend(*runs)
    paths, _ = read_blend(day)
    record = json.loads(paths.blend.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[BLEND] ") for line in lines)
    table = [line.removeprefix("[BLEND] ") for line in lines]
    assert table[0].split() == ["macro_f1", "damaged", "pages"]
    for line, member in zip(table[1:3], record["members"], strict=True):
        name = member["path"].removeprefix("../")
        assert line.split() == [name, f"{member['macro_f1']:.5f}", f"{member['macro_f1_damaged']:.5f}"]
    for line, title, candidate in zip(
        table[3:6], ("best single run", "equal weights", "selection"), record["candidates"], strict=True
    ):
        cells = [
            f"{score['macro_f1']:.5f} [{score['macro_f1_low']:.3f}, {score['macro_f1_high']:.3f}]"
            for score in (candidate["clean"], candidate["damaged"])
        ]
        assert line.split("  ")[0] == title and [cell for cell in line.split("  ") if cell.strip()][1:] == cells
    single, _, selection = (candidate["damaged"]["gain"] for candidate in record["candidates"])
    assert table[6].startswith(f"gain over equal weights, damaged pages: selection {selection:+.5f} [")
    assert f"], best single run {single:+.5f} [" in table[6]
    assert table[7:] == [
        "used: equal weights, since neither gain's 99% interval lies above 0",
        "weights: v1-abc 0.50, v2-abc 0.50", str(paths.root), f"next: doccls predict {paths.root}"
    ]  # fmt: skip


def test_choice_is_explained() -> None:
    def make(name: CandidateName, low: float) -> Candidate:
        return Candidate(name, (0.5, 0.5), (), CandidateScore(0.5, 0.4, 0.6, low + 0.01, low, low + 0.02), None)

    def explain(used: CandidateName, single: float, selection: float) -> list[str]:
        return explain_choice(
            BlendResult(make("single", single), make("equal", 0), make("selection", selection), used, "clean")
        )

    assert explain("selection", -0.05, 0.01) == [
        "gain over equal weights, clean pages: selection +0.02000 [+0.010, +0.030], "
        "best single run -0.04000 [-0.050, -0.030]",
        "used: selection, since its gain's 99% interval lies above 0",
    ]
    assert explain("single", 0.02, -0.01)[1] == "used: best single run, since only its gain's 99% interval lies above 0"
    assert explain("equal", -0.01, -0.01)[1] == "used: equal weights, since neither gain's 99% interval lies above 0"
