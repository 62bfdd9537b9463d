"""Opening a run: its files are checked, its folder is created or joined, and other experiments are rejected."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from doccls.config import Config, load_config, schema
from doccls.config.files import check_files
from doccls.data.image_scan import ScannedImage, scan_files
from doccls.data.prepare import PreparedData
from doccls.errors import UserError
from doccls.experiment import (
    Experiment,
    OpenRun,
    describe_unmerged,
    log_config,
    open_run,
    prepare,
)
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, write_predictions
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths, locate_run
from doccls.system.lock import LockError, hold_lock
from tests.unit.conftest import KeptLog, MakeConfig, MakeData

NOW = datetime(2026, 3, 7, 9, 5, 59)
IDS = tuple(f"page{row}" for row in range(12))
SILENT = RunLog(None)
Open = Callable[..., tuple[Experiment, tuple[int, ...]]]


@pytest.fixture
def pages(make_data: MakeData) -> Path:
    return make_data(IDS, ["card", "form"] * 6)


@pytest.fixture
def open_run_of(pages: Path, make_config: MakeConfig) -> Callable[..., OpenRun]:
    """A function that opens the run `x` with three folds of the pages: `open_run_of(train={"epochs": 2})`."""

    def open_it(run_id: str = "x", now: datetime = NOW, **sections: Any) -> OpenRun:
        sections["data"] = {"folds": 3, **sections.get("data", {})}
        sections["output"] = {"exp_dir": "experiments", **sections.get("output", {})}
        config = make_config(**sections)
        paths = locate_run(config.output.exp_dir, run_id, now)
        return open_run(config, paths, now, {"world_size": 2, "device": "cpu"}, SILENT)

    return open_it


@pytest.fixture
def open_it(open_run_of: Callable[..., OpenRun]) -> Open:
    """Like `open_run_of`, but returns the experiment and the finished folds."""

    def unpack(*others: Any, **sections: Any) -> tuple[Experiment, tuple[int, ...]]:
        run = open_run_of(*others, **sections)
        return run.experiment, run.finished

    return unpack


def finish(experiment: Experiment, fold: int, fingerprint: str | None = None) -> None:
    """Write the fold's predictions."""
    rows = experiment.data.assignment.list_valid(fold)
    manifest = experiment.data.manifest
    info = PredictionsInfo(
        fingerprint or experiment.fingerprint, fold, 3, len(manifest), manifest.classes,
        tuple(manifest.ids[row] for row in rows), (), 1, 0.5,
    )  # fmt: skip
    targets = manifest.targets_N[rows]
    logits = np.zeros((len(rows), len(manifest.classes)), np.float32)
    write_predictions(experiment.paths.predictions(fold), FoldPredictions(info, rows.astype(np.int64), logits, targets))


def test_training_adds_to_snapshot_what_launcher_cannot_know(pages: Path, make_config: MakeConfig) -> None:
    config = make_config(data={"folds": 3}, output={"exp_dir": "experiments"}, train={"lr": 1e-3})
    paths = locate_run(config.output.exp_dir, "x", NOW)
    open_run(config, paths, NOW, {"world_size": 2}, SILENT)
    launched = load_config(paths.snapshot)
    for device in (["H100", "H100"], ["cpu", "cpu"]):  # the first one is kept
        open_run(config, paths, NOW, {"world_size": 7, "device": device, "precision": "bf16"}, SILENT)
    trained = load_config(paths.snapshot)
    assert launched.provenance is not None
    assert trained.provenance == launched.provenance | {"device": ["H100", "H100"], "precision": "bf16"}
    assert trained.model_copy(update={"provenance": launched.provenance}) == launched


def test_files_that_a_killed_process_had_moved_aside_are_back_before_they_are_read(open_run_of: Any) -> None:
    paths = open_run_of().experiment.paths
    content = paths.snapshot.read_bytes()
    paths.snapshot.rename(paths.root / ".config.yaml.0123abcd-0a1b.old.tmp")
    with pytest.raises(UserError, match="choose another --run-id"):
        open_run_of(train={"lr": 0.5})
    open_run_of()
    assert paths.snapshot.read_bytes() == content and not list(paths.root.glob(".*"))


# --- files and data --------------------------------------------------------------------------------------------------


def test_existing_files_pass(pages: Path, make_config: MakeConfig) -> None:
    check_files(make_config())


def test_all_missing_files_are_named_with_their_keys(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(
        data={"sample_csv": "sample.csv", "image_dir_test": "test"}, model={"weights": "weights.safetensors"}
    )
    with pytest.raises(UserError) as caught:
        check_files(config)
    message = str(caught.value)
    for key, name in (
        ("data.train_csv: no such file", "train.csv"),
        ("data.image_dir_train: no such folder", "train"),
        ("data.sample_csv: no such file", "sample.csv"),
        ("data.image_dir_test: no such folder", "test"),
        ("model.weights: no such file", "weights.safetensors"),
    ):
        assert f"{key}: {tmp_path / name}\n" in message


def test_optional_files_may_be_unset(pages: Path, make_config: MakeConfig) -> None:
    config = make_config()
    assert (config.data.sample_csv, config.data.image_dir_test, config.model.weights) == (None, None, None)
    check_files(config)


def test_prepare_logs_paths_warnings_and_folds(
    make_data: MakeData, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(IDS, ["card", "form"] * 6)
    (tmp_path / "train" / "page3.jpg").write_bytes(b"no image")
    with RunLog(tmp_path / "log") as log:
        data = prepare(make_config(data={"folds": 3, "on_bad_image": "skip"}), RunPaths(tmp_path / "x"), log)
    output = capsys.readouterr().out
    assert f"\n[PATH] OK | train_csv={tmp_path / 'train.csv'} |" in output
    assert data.skipped == {3} and len(data.warnings) == 2
    assert all(f"\n[WARNING] {warning}\n" in output for warning in data.warnings)
    assert f"\n[FOLD] distribution={data.assignment.count()}\n" in output


def test_prepare_checks_files_before_reading_data(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doccls.experiment.prepare_data", lambda *others: pytest.fail("data was read"))
    with pytest.raises(UserError, match=r"data\.train_csv"):
        prepare(make_config(), RunPaths(tmp_path / "x"), SILENT)


def test_all_resolved_values_are_logged(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path / "log") as log:
        log_config(make_config(project={"seed": 7}, train={"cpu_threads": 3}), log)
    lines = capsys.readouterr().out.splitlines()
    assert "[CFG] project.seed=7" in lines and "[CFG] train.cpu_threads=3" in lines
    assert "[SEED] 7 for Python, NumPy and PyTorch; 3 CPU threads" in lines


# --- opening a run ---------------------------------------------------------------------------------------------------


def test_launcher_lock_is_taken_after_data_check_and_before_writing(
    pages: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(data={"folds": 3}, output={"exp_dir": "experiments"})
    paths = locate_run(config.output.exp_dir, "x", NOW)

    def refuse() -> None:
        assert not paths.root.exists()
        raise LockError("another launcher")

    bad = make_config(data={"folds": 3, "target_col": "nope"}, output={"exp_dir": "experiments"})
    with pytest.raises(UserError, match="nope"):
        open_run(bad, paths, NOW, {}, SILENT, refuse)
    with pytest.raises(LockError, match="another launcher"):
        open_run(config, paths, NOW, {}, SILENT, refuse)
    assert not paths.root.exists()
    with ExitStack() as held:
        run = open_run(
            config, paths, NOW, {}, SILENT, lambda: held.enter_context(hold_lock(paths.launch_lock(), "x is launched"))
        )
        assert run.lock is not None and paths.snapshot.exists()
        run.lock.check()


def test_open_run_lists_missing_folds_and_drops_scans(open_run_of: Callable[..., OpenRun]) -> None:
    run = open_run_of()
    assert run.list_missing([2, 0]) == [2, 0]
    finish(run.experiment, 0)
    joined = open_run_of()
    assert joined.finished == (0,) == joined.experiment.find_finished()
    assert joined.list_missing([2, 0]) == [2] and not joined.experiment.data.scans


def test_new_run_gets_folder_and_snapshot_with_provenance(open_it: Open) -> None:
    experiment, finished = open_it()
    paths = experiment.paths
    assert finished == () and paths.root.is_dir()
    assert (paths.root.parent.name, paths.run_id) == ("20260307", "x")
    stored = yaml.safe_load(paths.snapshot.read_text(encoding="utf-8"))["provenance"]
    assert stored["fingerprint"] == experiment.fingerprint
    assert (stored["run_id"], stored["started"]) == ("x", "2026-03-07T09:05:59")
    assert (stored["world_size"], stored["device"]) == (2, "cpu")
    assert (stored["num_samples"], stored["classes"], stored["skipped_rows"]) == (12, ["card", "form"], [])
    assert stored["data_digest"] == experiment.data.digest
    assert stored["folds_digest"] == experiment.data.assignment.digest()
    assert "torch" in stored["packages"]


def test_snapshot_has_version_of_damage(open_it: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "DAMAGE_VERSION", 7)
    for run_id, damage, version in (("a", "scan", 7), ("b", "none", None)):
        snapshot = open_it(run_id, valid={"damage": damage})[0].paths.snapshot
        stored = yaml.safe_load(snapshot.read_text(encoding="utf-8"))["provenance"]
        assert stored["damage_version"] == version


def test_run_is_joined_in_old_folder_with_finished_folds(open_it: Open) -> None:
    first, _ = open_it()
    for fold in (0, 2):
        finish(first, fold)
    second, finished = open_it(now=datetime(2027, 1, 1))
    assert finished == (0, 2)
    assert second.paths == first.paths and second.fingerprint == first.fingerprint


def test_joining_keeps_snapshot_of_first_command(open_it: Open) -> None:
    first, _ = open_it()
    finish(first, 1)
    before = first.paths.snapshot.read_bytes()
    open_it(now=datetime(2027, 1, 1), data={"valid_fold": 2})
    assert first.paths.snapshot.read_bytes() == before


def test_other_experiment_is_rejected_by_snapshot_and_predictions_and_changes_nothing(open_it: Open) -> None:
    first, _ = open_it()
    before = first.paths.snapshot.read_bytes()
    with pytest.raises(UserError, match="choose another --run-id"):
        open_it(train={"lr": 0.5})
    assert first.paths.snapshot.read_bytes() == before
    finish(first, 0)
    first.paths.snapshot.unlink()
    with pytest.raises(UserError, match="choose another --run-id"):
        open_it(train={"lr": 0.5})
    assert not first.paths.snapshot.exists()


def test_other_images_under_same_names_are_another_experiment(open_it: Open, pages: Path) -> None:
    open_it()
    (pages / "train" / "page0.jpg").write_bytes((pages / "train" / "page1.jpg").read_bytes())
    with pytest.raises(UserError, match="choose another --run-id"):
        open_it()


def test_no_snapshot_is_written_if_disabled(open_it: Open) -> None:
    experiment, _ = open_it(output={"snapshots": False})
    assert experiment.paths.root.is_dir() and not experiment.paths.snapshot.exists()


def test_folder_that_cannot_be_created_is_reported_with_key(open_it: Open, tmp_path: Path) -> None:
    (tmp_path / "experiments").write_text("in the way")
    with pytest.raises(UserError, match=r"output\.exp_dir: not a folder: .*experiments \(it is a file\)"):
        open_it()


def test_initial_weights_are_part_of_fingerprint(open_it: Open, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"first")
    plain, _ = open_it("a")
    first, _ = open_it("b", model={"weights": "w.pth"})
    (tmp_path / "w.pth").write_bytes(b"second")
    second, _ = open_it("c", model={"weights": "w.pth"})
    assert len({plain.fingerprint, first.fingerprint, second.fingerprint}) == 3


def test_snapshot_reads_back_as_config(open_it: Open, make_config: MakeConfig) -> None:
    experiment, _ = open_it(train={"epochs": 7})
    reloaded: Config = load_config(experiment.paths.snapshot)
    assert reloaded.provenance is not None and reloaded.provenance["fingerprint"] == experiment.fingerprint
    assert reloaded.model_copy(update={"provenance": None}) == experiment.config


# --- the scan cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that collects the names of the images as they are scanned."""
    names: list[str] = []

    def scan(paths: list[Path], *others: Any) -> Iterator[ScannedImage]:
        names.extend(path.name for path in paths)
        return scan_files(paths, *others)

    monkeypatch.setattr("doccls.data.scan.scan_files", scan)
    return names


def find_scan_cache(experiment: Experiment) -> Path:
    """Return the scan cache file, in the run or in the store."""
    root = experiment.paths.root.parents[2]
    (file,) = (path for path in root.rglob("*.json") if "page0.jpg" in path.read_text(encoding="utf-8"))
    return file


@pytest.mark.parametrize("store", ["auto", "off"])
def test_joined_run_rereads_no_image(open_it: Open, scanned: list[str], store: str) -> None:
    first, _ = open_it(data={"store": store})
    assert sorted(scanned) == sorted(f"{image_id}.jpg" for image_id in IDS)
    scanned.clear()
    second, _ = open_it(data={"valid_fold": 1, "store": store})
    assert scanned == [] and second.fingerprint == first.fingerprint
    assert (find_scan_cache(second) == second.paths.images) == (store == "off")


def test_second_run_on_same_images_reads_none(open_it: Open, scanned: list[str]) -> None:
    first, _ = open_it("a")
    scanned.clear()
    second, _ = open_it("b", data={"valid_fold": 1})
    assert scanned == [] and second.fingerprint == first.fingerprint


def test_changed_image_is_reread(open_it: Open, pages: Path, scanned: list[str]) -> None:
    open_it()
    scanned.clear()
    (pages / "train" / "page4.jpg").write_bytes((pages / "train" / "page5.jpg").read_bytes())
    with pytest.raises(UserError, match="choose another --run-id"):
        open_it()
    assert scanned == ["page4.jpg"]


@pytest.mark.parametrize("store", ["auto", "off"])
@pytest.mark.parametrize("damage", [b"", b"[]", b'{"format": "doccls-images-1"}', b"\xff"])
def test_damaged_scan_cache_is_replaced_by_new_scan(
    open_it: Open, scanned: list[str], damage: bytes, store: str
) -> None:
    first, _ = open_it(data={"store": store})
    cache = find_scan_cache(first)
    content = cache.read_bytes()
    cache.write_bytes(damage)
    scanned.clear()
    open_it(data={"store": store})
    assert len(scanned) == len(IDS) and cache.read_bytes() == content


def test_run_without_its_store_rescans_and_keeps_fingerprint(open_it: Open, scanned: list[str]) -> None:
    first, _ = open_it()
    shutil.rmtree(first.paths.root.parents[2] / "page_store")
    scanned.clear()
    second, _ = open_it()
    assert len(scanned) == len(IDS) and second.fingerprint == first.fingerprint


def test_run_keeps_scan_cache_if_store_cannot_be_written(open_it: Open, pages: Path, scanned: list[str]) -> None:
    (pages / "page_store").write_text("a file in place of the folder")
    first, _ = open_it()
    scanned.clear()
    second, _ = open_it()
    assert scanned == [] and find_scan_cache(second) == first.paths.images


@pytest.mark.parametrize("store", ["auto", "off"])
def test_changed_pixel_limit_rescans(open_it: Open, scanned: list[str], store: str) -> None:
    open_it("a", data={"store": store}, output={"snapshots": False})
    scanned.clear()
    open_it("a", data={"store": store, "max_image_pixels": 10_000}, output={"snapshots": False})
    assert len(scanned) == len(IDS)


def test_runs_with_different_pixel_limits_share_store_without_rescans(open_it: Open, scanned: list[str]) -> None:
    open_it("a")
    open_it("b", data={"max_image_pixels": 10_000})
    scanned.clear()
    open_it("a")
    open_it("b", data={"max_image_pixels": 10_000})
    assert scanned == []


# --- decoded pages ---------------------------------------------------------------------------------------------------


@pytest.fixture
def prepare_it(pages: Path, make_config: MakeConfig) -> Callable[..., tuple[PreparedData, str]]:
    """A function that returns the data and the log lines of the store: `prepare_it(store="off")`."""

    def prepare_data(**data: Any) -> tuple[PreparedData, str]:
        config = make_config(data={"folds": 3, **data}, output={"exp_dir": "experiments"}, train={"img_size": 32})
        log = KeptLog()
        prepared = prepare(config, locate_run(config.output.exp_dir, "x", NOW), log)
        assert "[DATA] OK | 12 rows, 2 classes" in log.lines
        kept = (line for line in log.lines if line.startswith(("[DATA]", "[WARNING]")) and " OK " not in line)
        return prepared, "\n".join(kept)

    return prepare_data


def test_mixup_of_single_images_is_refused_at_start(pages: Path, make_config: MakeConfig) -> None:
    config = make_config(train={"mixup_alpha": 0.5, "micro_batch_size": 1})
    with pytest.raises(UserError, match=r"train\.mixup_alpha = 0\.5 .* one by one"):
        prepare(config, locate_run(config.output.exp_dir, "x", NOW), KeptLog())


def test_pages_are_stored_beside_experiments_or_in_named_folder(
    prepare_it: Callable[..., tuple[PreparedData, str]], pages: Path
) -> None:
    for store, folder in (("auto", pages / "page_store"), ("mine", pages / "mine")):
        for decoded in (12, 0):
            prepared, output = prepare_it(store=store)
            assert prepared.stored is not None and prepared.stored.read(3) is not None
            *first, last = output.splitlines()
            assert first == (["[DATA] 12 images to read and decode"] if decoded else [])
            assert last.startswith(f"[DATA] decoded pages: {folder}/px32-")
            assert last.endswith(f" holds 12, of which {decoded} were decoded now")


def test_nothing_is_stored_without_store(prepare_it: Callable[..., tuple[PreparedData, str]], pages: Path) -> None:
    prepared, output = prepare_it(store="off")
    assert prepared.stored is None and output == "[DATA] 12 images to read and decode"
    assert not (pages / "page_store").exists()


def test_unwritable_store_is_warning_by_default_and_error_if_named(
    prepare_it: Callable[..., tuple[PreparedData, str]], pages: Path
) -> None:
    (pages / "page_store").write_text("a file in place of the folder")
    prepared, output = prepare_it()
    assert prepared.stored is None
    warning, progress = output.splitlines()
    assert warning.startswith(f"[WARNING] not a folder: {pages}/page_store (it is a file): ")
    assert warning.endswith("in each epoch (data.store)")
    assert progress == "[DATA] 12 images to read and decode"
    with pytest.raises(UserError, match=r"data\.store: not a folder: .*page_store"):
        prepare_it(store="page_store")


# --- which folds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("valid_fold", "wanted"), [("all", [0, 1, 2, 3]), (0, [0]), (3, [3])])
def test_valid_fold_selects_folds(make_config: MakeConfig, valid_fold: int | str, wanted: list[int]) -> None:
    assert make_config(data={"folds": 4, "valid_fold": valid_fold}).data.list_wanted() == wanted


def test_missing_folds_are_reported_until_all_are_finished(open_it: Open) -> None:
    experiment, _ = open_it(data={"valid_fold": 1})
    finish(experiment, 1)
    assert describe_unmerged(experiment) == (
        "[OOF] not merged: folds [0, 2] of this run are missing; train them with --run-id x"
    )
    finish(experiment, 0)
    finish(experiment, 2)
    line = describe_unmerged(experiment)
    assert line == f"[OOF] all 3 folds are finished; merge them: doccls-launch merge {experiment.paths.root}"
    experiment.paths.predictions(0).write_bytes(b"torn")
    assert "folds [0] of this run" in describe_unmerged(experiment)


def test_predictions_of_other_experiment_are_rejected(open_it: Open) -> None:
    experiment, _ = open_it()
    finish(experiment, 1, fingerprint="b" * 64)
    with pytest.raises(UserError, match="choose another --run-id"):
        describe_unmerged(experiment)
