"""`doccls runs`: it lists what is in an experiments folder, whatever that is, and changes nothing."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from doccls import blend
from doccls.__main__ import main
from doccls.run.heartbeat import Beat
from doccls.run.paths import RunPaths
from doccls.system import lock
from doccls.system.lock import hold_lock
from tests.unit.report_runs import write_run

List = Callable[..., str]


@pytest.fixture
def list_runs(capsys: pytest.CaptureFixture[str]) -> List:
    """A function that runs `doccls runs ARGS`, which has to succeed, and returns its output."""

    def run(*args: object) -> str:
        capsys.readouterr()
        assert main(["runs", *map(str, args)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> List:
    """A function that runs `doccls runs ARGS`, which has to fail, and returns its message."""

    def run(*args: object) -> str:
        assert main(["runs", *map(str, args)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return write_run(tmp_path)


def find_row(out: str, run_id: str) -> list[str]:
    """Return the words of the run's line of figures."""
    (row,) = (line.split() for line in out.splitlines() if line.startswith(f"20260101/{run_id} "))
    return row


def find_state(out: str, run_id: str = "tiny0") -> str:
    words = find_row(out, run_id)[1:-2]
    return " ".join(itertools.dropwhile(re.compile(r"-|~?[0-9]\.[0-9]{4}").fullmatch, words))


def unmerge(paths: RunPaths, *missing: int) -> None:
    """Remove the results, and the predictions of some folds."""
    paths.summary.unlink()
    for fold in missing:
        paths.predictions(fold).unlink()


def edit_config(paths: RunPaths, section: str, **values: object) -> None:
    snapshot = yaml.safe_load(paths.snapshot.read_text())
    snapshot[section] |= values
    paths.snapshot.write_text(yaml.safe_dump(snapshot))


def read_all(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# --- what is listed --------------------------------------------------------------------------------------------------


def test_runs_of_the_default_folder_are_listed_newest_first(
    tmp_path: Path, list_runs: List, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path, seed=seed) for seed in (1, 2, 3)]
    edit_config(runs[1], "provenance", started="2026-01-01T20:00:00")
    edit_config(runs[1], "train", epochs=7)
    before = read_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    out = list_runs()
    assert read_all(tmp_path) == before
    rows = [line.split()[0] for line in out.splitlines() if line.startswith("2026")]
    assert rows == ["20260101/tiny2", "20260101/tiny1", "20260101/tiny3"]
    scores = json.loads(runs[0].summary.read_text())
    clean, damaged = scores["macro_f1"], scores["damaged"]["macro_f1"]
    figures = [f"{figure:.4f}" for figure in (clean, damaged, clean - damaged)]
    assert find_row(out, "tiny1")[1:5] == [*figures, "merged"]
    assert "    train.epochs=7\n" in out and out == list_runs(tmp_path / "experiments")


def test_blend_is_listed_on_its_day(tmp_path: Path, list_runs: List) -> None:
    runs = [write_run(tmp_path, seed=seed).root for seed in (1, 2)]
    parser = argparse.ArgumentParser()
    blend.add_arguments(parser)
    blend.blend(parser.parse_args([*map(str, runs), "--run-id", "both"]))
    out = list_runs(tmp_path / "experiments")
    assert find_state(out, "both") == "blend"
    assert out.splitlines()[2].startswith("20260101/both ")
    (tmp_path / "experiments" / "20260102").mkdir()
    later = RunPaths(runs[1].rename(tmp_path / "experiments" / "20260102" / "later"))
    edit_config(later, "provenance", started="2026-01-02T00:00:01")
    listed = [line.split()[0] for line in list_runs(tmp_path / "experiments").splitlines() if line.startswith("2026")]
    assert listed == ["20260102/later", "20260101/both", "20260101/tiny1"]  # the blend's files are of today
    (runs[0].parent / "both" / "blend.json").write_text("[" * 100_000)
    out = list_runs(tmp_path / "experiments")
    assert find_state(out, "both") == "damaged" and "! blend.json: damaged" in out


def test_run_without_config_is_dated_by_its_oldest_file(tmp_path: Path, list_runs: List) -> None:
    runs = [write_run(tmp_path, seed=seed) for seed in (1, 2)]
    at_nine, at_eleven = time.mktime((2026, 1, 1, 9, 0, 0, 0, 0, -1)), time.mktime((2026, 1, 1, 11, 0, 0, 0, 0, -1))
    for started_s, first in ((at_nine, "tiny1"), (at_eleven, "tiny2")):
        runs[1].snapshot.unlink(missing_ok=True)
        os.utime(runs[1].metrics_dir / "fold0.jsonl", (started_s, started_s))
        assert list_runs(tmp_path / "experiments").splitlines()[2].startswith(f"20260101/{first} ")


def test_size_counts_hard_links_once_and_no_links(paths: RunPaths, tmp_path: Path, list_runs: List) -> None:
    def read_size() -> float:
        return float(find_row(list_runs(tmp_path / "experiments"), "tiny0")[-2])

    before = read_size()
    big = paths.root / "ckpt" / "best_fold0.pth"
    big.parent.mkdir()
    with big.open("wb") as file:
        file.truncate(5 * 2**20)
    os.link(big, big.with_name("copy.pth"))
    (paths.root / "ckpt" / "link.pth").symlink_to(big)
    (paths.root / "ckpt" / "loop").symlink_to(paths.root)
    assert read_size() == pytest.approx(before + 5, abs=0.11) and find_state(list_runs(paths.exp_dir)) == "merged"


# --- states ----------------------------------------------------------------------------------------------------------


def test_states_of_a_run_without_results(paths: RunPaths, list_runs: List) -> None:
    unmerge(paths)
    out = list_runs(paths.exp_dir)
    assert find_row(out, "tiny0")[1:4] == ["~0.5000", "~0.2500", "~0.2500"] and find_state(out) == "not merged"
    assert find_state(list_runs(paths.exp_dir)) == "not merged"
    paths.predictions(1).unlink()
    assert find_state(list_runs(paths.exp_dir)) == "stopped 2/3 folds"
    paths.array_jobs.write_text("{}")
    assert find_state(list_runs(paths.exp_dir)) == "queued? 2/3 folds"
    paths.array_jobs.unlink()
    paths.predictions(2).unlink()
    edit_config(paths, "data", valid_fold=0)
    assert find_state(list_runs(paths.exp_dir)) == "fold 0 only"


def test_results_that_are_older_than_a_fold_are_not_shown(paths: RunPaths, list_runs: List) -> None:
    assert find_state(list_runs(paths.exp_dir)) == "merged"
    os.utime(paths.predictions(1), ns=(2**62, 2**62))
    out = list_runs(paths.exp_dir)
    assert find_state(out) == "not merged" and find_row(out, "tiny0")[1] == "~0.5000"


def test_run_is_training_while_a_process_holds_a_lock_of_it(paths: RunPaths, list_runs: List) -> None:
    unmerge(paths, 2)
    for path, state in ((paths.fold_lock(2), "training"), (paths.merge_lock, "merging")):
        with hold_lock(path, "this test"):
            assert find_state(list_runs(paths.exp_dir)) == f"{state} 2/3 folds"
        assert find_state(list_runs(paths.exp_dir)) == "stopped 2/3 folds"


def test_lock_of_another_machine_is_judged_without_a_file(
    paths: RunPaths, list_runs: List, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmerge(paths, 1)
    monkeypatch.setattr(lock, "_measure_silence_s", lambda claim: pytest.fail("it writes"))
    with hold_lock(paths.fold_lock(2), "this test"):
        holder = json.loads(paths.fold_lock(2).read_text()) | {"host": "elsewhere"}
    for age_s, state in ((0, "training"), (4000, "stopped")):
        paths.fold_lock(1).write_text(json.dumps(holder))
        os.utime(paths.fold_lock(1), (time.time() - age_s, time.time() - age_s))
        before = read_all(paths.root)
        assert find_state(list_runs(paths.exp_dir)).startswith(state)
        assert read_all(paths.root) == before


def test_heartbeat_of_a_live_process_means_training(paths: RunPaths, list_runs: List) -> None:
    unmerge(paths, 1)
    paths.live.mkdir(exist_ok=True)
    beats = (
        (Beat(socket.gethostname(), os.getpid(), "train", 1), 0, "training"),
        (Beat("elsewhere", 2**22 + 1, "train", 1), 0, "training"),
        (Beat("elsewhere", 2**22 + 1, "train", 1), 4000, "stopped"),
        (Beat(socket.gethostname(), 2**22 + 1, "train", 1), 0, "stopped"),  # above the largest PID of Linux
        (Beat(socket.gethostname(), os.getpid(), "stopped", 1), 0, "stopped"),
    )
    for beat, age_s, state in beats:
        path = paths.heartbeat(1, 0)
        path.write_text(json.dumps(asdict(beat)))
        os.utime(path, (time.time() - age_s, time.time() - age_s))
        assert find_state(list_runs(paths.exp_dir)).startswith(state)


def test_error_of_a_failed_fold_is_shown_until_it_is_finished(paths: RunPaths, list_runs: List) -> None:
    unmerge(paths, 1)
    paths.live.mkdir(exist_ok=True)
    beat = Beat("here", 1, "failed", 1, message="no\x07 memory\nmore", error="OSError")
    paths.heartbeat(1, 0).write_text(json.dumps(asdict(beat)))
    out = list_runs(paths.exp_dir)
    assert find_state(out) == "failed 2/3 folds" and "    ! 'fold 1: no\\x07 memory'\n" in out
    beat = Beat("here", 1, "failed", 2, message="no memory")
    paths.heartbeat(1, 0).write_text(json.dumps(asdict(beat)))
    assert find_state(list_runs(paths.exp_dir)) == "stopped 2/3 folds"


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b'{"num_samples": 3}'),
        ("summary.json", b"[" * 100_000),
        ("summary.json", b"\xff"),
        ("config.yaml", b"mode: [basic"),
        ("config.yaml", b"- a list"),
        ("config.yaml", b"[" * 900 + b"]" * 900),
        ("config.yaml", b"provenance: {}\na: &a [1]\nb: [*a, *a]"),
        ("config.yaml", b"provenance: &a\n  b: *a"),
        ("config.yaml", b"\x00\xff"),
    ],
)
def test_damaged_file_is_named_below_its_run(
    paths: RunPaths, tmp_path: Path, list_runs: List, name: str, content: bytes
) -> None:
    write_run(tmp_path, seed=1)
    (paths.root / name).write_bytes(content)
    out = list_runs(paths.exp_dir)
    assert find_state(out) == "damaged" and find_state(out, "tiny1") == "merged"
    assert f"    ! {name}: damaged" in out and str(paths.root) not in out


def test_score_that_is_no_number_is_damage(paths: RunPaths, list_runs: List) -> None:
    summary = json.loads(paths.summary.read_text())
    for score in ("high", None, [1]):
        paths.summary.write_text(json.dumps(summary | {"macro_f1": score}))
        assert "! summary.json: damaged" in list_runs(paths.exp_dir)


def test_huge_file_is_not_read(paths: RunPaths, list_runs: List) -> None:
    os.truncate(paths.snapshot, 2**40)
    out = list_runs(paths.exp_dir)
    assert "! config.yaml: damaged: over 1.0 GiB" in out and find_row(out, "tiny0")[-2:] == ["1024.0", "GiB"]


def test_damaged_predictions_of_an_unmerged_run_are_named(paths: RunPaths, list_runs: List) -> None:
    unmerge(paths)
    paths.predictions(1).write_bytes(b"torn")
    out = list_runs(paths.exp_dir)
    assert find_state(out) == "damaged" and "! oof/parts/fold1.safetensors: can't be read" in out
    assert find_row(out, "tiny0")[1] == "~0.5000"
    shutil.copy(paths.predictions(0), paths.predictions(1))
    assert "! oof/parts/fold1.safetensors: the predictions of fold 0" in list_runs(paths.exp_dir)


def test_predictions_of_another_version_are_not_called_damaged(
    paths: RunPaths, list_runs: List, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmerge(paths)
    monkeypatch.setattr("doccls.oof.predictions._FORMAT", "doccls-fold-predictions-99")
    out = list_runs(paths.exp_dir)
    assert find_state(out) == "other version" and "! oof/parts/fold0.safetensors: written by another version" in out


def test_heartbeats_and_locks_of_nonsense_are_ignored(paths: RunPaths, list_runs: List) -> None:
    unmerge(paths, 1)
    paths.live.mkdir(exist_ok=True)
    host = socket.gethostname()
    beats = (
        {"host": [], "pid": "x", "phase": "failed", "fold": [1]},
        *({"host": host, "pid": pid} for pid in ("x", -5, 0, 10**30, [1], None)),
    )
    for text in ("", "[]", *map(json.dumps, beats)):
        paths.heartbeat(1, 0).write_text(text)
        paths.fold_lock(1).write_text(text)
        os.utime(paths.fold_lock(1), (0, 0))
        assert "training" not in list_runs(paths.exp_dir)


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "oof", "live", "oof/parts/fold0.safetensors"])
def test_links_are_not_followed(paths: RunPaths, tmp_path: Path, list_runs: List, name: str) -> None:
    if name.startswith("oof/"):
        unmerge(paths)
    target = tmp_path / "elsewhere"
    if (paths.root / name).exists():
        (paths.root / name).rename(target)
    (paths.root / name).symlink_to(target)
    out = list_runs(paths.exp_dir)
    assert find_state(out) == "damaged" and f"! {name}: a link, and links are not followed" in out


def test_fifos_in_the_place_of_files_are_not_opened(paths: RunPaths, list_runs: List) -> None:
    paths.live.mkdir(exist_ok=True)
    for path in (paths.summary, paths.snapshot, paths.blend, paths.fold_lock(0), paths.heartbeat(0, 0)):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert find_state(list_runs(paths.exp_dir)) == "not merged"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_folders_without_permission_are_named(paths: RunPaths, tmp_path: Path, list_runs: List, refuse: List) -> None:
    write_run(tmp_path, seed=1)
    for path in (*tmp_path.parents, tmp_path, *tmp_path.rglob("*")):
        if "pytest" in str(path):
            path.chmod(0o755)
    day = paths.root.parent
    for path, mode, message in (
        (paths.root, 0, "! no permission: "),
        (paths.root, 0o744, "! no permission: "),
        (paths.predictions_dir, 0, "! no permission: "),
        (paths.snapshot, 0, "! no permission: config.yaml"),
        (day, 0, f"[WARNING] no permission: {day}"),
        (paths.exp_dir, 0, f"EXP_DIR: no permission: {paths.exp_dir}"),
    ):
        path.chmod(mode)
        os.seteuid(65534)
        try:
            out = (refuse if path == paths.exp_dir else list_runs)(paths.exp_dir)
        finally:
            os.seteuid(0)
            path.chmod(0o755)
        assert message in out
        assert path in (day, paths.exp_dir) or find_state(out, "tiny1") == "merged"


# --- folders ---------------------------------------------------------------------------------------------------------


def test_what_is_no_run_is_left_out(paths: RunPaths, list_runs: List) -> None:
    day = paths.root.parent
    (day / "empty").mkdir()
    (day / "notes.txt").write_text("mine")
    (paths.exp_dir / "20260102").write_text("mine")
    (paths.exp_dir / "archive" / "20260101" / "run").mkdir(parents=True)
    (day / "loop").symlink_to(day)
    (paths.exp_dir / "20260103").symlink_to(day)
    out = list_runs(paths.exp_dir)
    assert out.startswith("1 run in ")
    assert [line for line in out.splitlines() if "WARNING" in line] == [
        f"[WARNING] {day / 'empty'} is left out: nothing of a run is in it",
        f"[WARNING] {paths.exp_dir / '20260103'} is left out: it is a link",
        f"[WARNING] {day / 'loop'} is left out: it is a link",
    ]


def test_folder_without_runs_says_so(paths: RunPaths, tmp_path: Path, list_runs: List) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert list_runs(empty) == f"no runs in {empty} (runs are in EXP_DIR/YYYYMMDD/<run_id>)\n"
    assert "list the folder above it" in list_runs(paths.root.parent)


def test_day_that_is_no_date_is_listed(paths: RunPaths, list_runs: List) -> None:
    paths.root.parent.rename(paths.exp_dir / "20269999")
    shutil.copytree(paths.exp_dir / "20269999", paths.root.parent)
    (paths.exp_dir / "20269999" / "tiny0" / "config.yaml").unlink()
    lines = list_runs(paths.exp_dir).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["20260101/tiny0", "20269999/tiny0"]


def test_paths_that_can_not_be_listed_are_refused(tmp_path: Path, refuse: List) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refuse(tmp_path / "none") == f"doccls runs: EXP_DIR: no such folder: {tmp_path / 'none'}\n"
    assert "EXP_DIR: not a folder" in refuse(tmp_path / "file")
    assert "EXP_DIR: a loop of symbolic links" in refuse(tmp_path / "loop")


def test_only_a_terminal_wraps(
    paths: RunPaths, tmp_path: Path, list_runs: List, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(write_run(tmp_path, seed=1), "model", name="x" * 200)
    monkeypatch.setenv("COLUMNS", "80")
    assert "x" * 200 in list_runs(paths.exp_dir)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = list_runs(paths.exp_dir)
    assert "x" * 200 not in out and all(len(line) <= 80 for line in out.splitlines()[1:])


def test_listing_does_not_import_torch(paths: RunPaths) -> None:
    code = "import sys; from doccls.__main__ import main; main(['runs', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(paths.exp_dir)], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "20260101/tiny0" in done.stdout
