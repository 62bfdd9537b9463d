"""Tracking: one W&B run per fold, in a process that can neither delay nor stop training."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from doccls.config import Config
from doccls.reporting.log import RunLog
from doccls.reporting.tracking import Tracker, track_fold

MakeConfig = Callable[..., Config]
WANDB = """
import __main__, json, os, sys, time
__main__.FINISH_S = 1.0
class Settings:
    base_url = "http://127.0.0.1:9"
    def __init__(self, **options): pass
def record(*values):
    with open(os.environ["DOCCLS_TEST_CALLS"], "a") as file:
        file.write(json.dumps(values) + "\\n")
def setup():
    raise ValueError("settings")
def hold(where):
    if os.environ["DOCCLS_TEST_HOLD"] == where:
        time.sleep(600)
class Run:
    def log(self, values, step):
        hold("log")
        record("log", values, step)
    def finish(self, exit_code):
        hold("finish")
        record("finish", exit_code)
def init(**options):
    hold("init")
    names = ("group", "name", "project", "entity", "dir")
    record("init", *(options[name] for name in names), options["config"]["fold"])
    record("id", options["id"], sorted(name for name in os.environ if name.startswith("WANDB_")))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """Install a fake W&B that records calls and hangs where DOCCLS_TEST_HOLD says; return their reader."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("DOCCLS_TEST_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("DOCCLS_TEST_HOLD", "nowhere")
    monkeypatch.setenv("WANDB_MODE", "offline")

    def read() -> list[Any]:
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return read


def track(config: Config, folder: Path, fold: int = 2, count: int = 1, fingerprint: str = "f1") -> str:
    """Track a fold with `count` steps, check that the W&B process has exited, and return the log."""
    with RunLog(folder / "a.log") as log, track_fold(config, folder / "v1-abc", fold, fingerprint, log) as tracker:
        process = find_process(tracker)
        for step in range(count):
            tracker.log({"train/loss": 0.5}, step)
    assert not process.is_running()
    return (folder / "a.log").read_text()


def find_process(tracker: Tracker) -> psutil.Process:
    return psutil.Process(tracker._process.pid)  # type: ignore[attr-defined]


def test_one_group_per_run_and_one_run_per_fold(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path
) -> None:
    config = make_config(tracking={"wandb": True, "entity": "team"}, project={"name": "pages"})
    for fold in (0, 1):
        text = track(config, tmp_path, fold)
    assert [call for call in wandb() if call[0] != "id"] == [
        call
        for fold in (0, 1)
        for call in (
            ["init", "v1-abc", f"v1-abc-fold{fold}", "pages", "team", str(tmp_path / "v1-abc"), fold],
            ["log", {"train/loss": 0.5}, 0],
            ["finish", 0],
        )
    ]
    assert "[TRACKING] W&B offline | group=v1-abc name=v1-abc-fold1\n" in text
    track(make_config(tracking={"wandb": True, "project": "other"}), tmp_path)
    assert wandb()[-4][3] == "other"


def test_no_process_is_started_if_off_or_on_other_ranks(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started a process"))
    with track_fold(make_config(), tmp_path, 0, "f1", RunLog(None)) as tracker:
        tracker.log({"train/loss": 0.5}, 7)
    with track_fold(make_config(tracking={"wandb": True}), None, 0, "f1", RunLog(None)) as tracker:
        tracker.log({"train/loss": 0.5}, 7)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_hanging_wandb_does_not_stop_training(
    make_config: MakeConfig,
    wandb: Callable[[], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.setenv("DOCCLS_TEST_HOLD", where)
    text = track(make_config(tracking={"wandb": True}), tmp_path, count=20_000)  # far more than a pipe holds
    assert "[TRACKING] W&B has not sent everything within 1 s: send it with `wandb sync`" in text
    assert text.splitlines()[-2] == "[EXIT] TRAINING SUCCESS code=0"


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_lost_process_is_reported_once(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path, number: signal.Signals
) -> None:
    config = make_config(tracking={"wandb": True})
    with RunLog(tmp_path / "a.log") as log, track_fold(config, tmp_path / "v1-abc", 0, "f1", log) as tracker:
        process = find_process(tracker)
        process.send_signal(number)
        for step in range(40_000):
            tracker.log({"train/loss": 0.5}, step)
    assert (tmp_path / "a.log").read_text().count("[TRACKING] lost the W&B process (") == 1
    assert not process.is_running()


def test_failed_fold_is_marked_and_its_error_propagates(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path
) -> None:
    config = make_config(tracking={"wandb": True})
    with pytest.raises(KeyError, match="mine"), track_fold(config, tmp_path / "v1-abc", 0, "f1", RunLog(None)):
        raise KeyError("mine")
    assert wandb()[-1] == ["finish", 1]


def test_killed_training_is_marked_as_failed(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path
) -> None:
    """The input of the W&B process ends without an exit code."""
    with track_fold(make_config(tracking={"wandb": True}), tmp_path / "v1-abc", 0, "f1", RunLog(None)) as tracker:
        process = find_process(tracker)
        tracker._process.stdin.close()  # type: ignore[attr-defined]
        process.wait(60)
        tracker._process = None  # type: ignore[attr-defined]
    assert wandb()[-1] == ["finish", 1]


def test_restart_continues_its_run_whatever_another_run_left_behind(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables are those of a run that is going on in the shell, such as a notebook's."""
    config = make_config(tracking={"wandb": True})
    for name in ("RUN_ID", "RESUME", "RUN_GROUP", "NAME", "PROJECT", "SWEEP_ID", "SERVICE", "RESUME_FROM"):
        monkeypatch.setenv(f"WANDB_{name}", "foreign")
    monkeypatch.setenv("WANDB_TAGS", "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for fold, fingerprint in ((0, "f1"), (0, "f1"), (1, "f1"), (0, "f2")):
        track(config, tmp_path, fold, fingerprint=fingerprint)
    ids, variables = zip(*(call[1:] for call in wandb() if call[0] == "id"), strict=True)
    assert ids[0] == ids[1] and len(set(ids)) == 3 and all(len(name) == 16 for name in ids)
    assert all(names == ["WANDB_MODE", "WANDB_SILENT", "WANDB_TAGS"] for names in variables)


def test_equal_run_ids_in_two_folders_are_two_runs(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path
) -> None:
    """One is copied with its folder, as to another machine: it stays the same run."""
    config = make_config(tracking={"wandb": True})
    for folder in ("20260101", "20260102"):
        (tmp_path / folder).mkdir()
        track(config, tmp_path / folder)
    shutil.copytree(tmp_path / "20260101", tmp_path / "copy")
    track(config, tmp_path / "copy")
    first, second, copied = (call[1] for call in wandb() if call[0] == "id")
    assert first != second and first == copied


@pytest.mark.parametrize("content", [b"", b"\xff", b"half of a tok"])
def test_damaged_token_is_replaced(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "v1-abc" / "wandb" / "fold2.token"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for _ in range(2):
        track(make_config(tracking={"wandb": True}), tmp_path)
    first, second = (call[1] for call in wandb() if call[0] == "id")
    assert first == second and path.read_bytes() != content


def test_token_that_cannot_be_kept_does_not_stop_training(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path
) -> None:
    (tmp_path / "v1-abc" / "wandb" / "fold2.token").mkdir(parents=True)
    text = track(make_config(tracking={"wandb": True}), tmp_path)
    assert "fold2.token: Is a directory (errno 21): a restart of this fold will begin another W&B run\n" in text
    assert wandb()[-1] == ["finish", 0]


def test_logs_of_wandb_are_beside_the_run_if_the_cache_is_read_only(
    make_config: MakeConfig, wandb: Callable[[], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    track(make_config(tracking={"wandb": True}), tmp_path)
    (variables,) = (call[2] for call in wandb() if call[0] == "id")
    assert variables == ["WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_MODE", "WANDB_SILENT"]
