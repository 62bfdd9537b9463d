"""W&B: one run a fold in one group, and nothing that it does or lacks stops training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb

from doccls.config import Config
from doccls.run import tracking
from doccls.run.runlog import RunLog
from doccls.run.tracking import track_fold

MakeConfig = Callable[..., Config]


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished: list[int | None] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Arguments of each wandb.init; its run is under `run`."""
    made: list[dict[str, Any]] = []

    def start(**options: Any) -> FakeRun:
        run = FakeRun()
        made.append(options | {"run": run})
        return run

    monkeypatch.setattr(wandb, "init", start)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(tracking, "_answers", lambda url: True)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return made


def give_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)


def track(config: Config, folder: Path | None, fold: int = 2) -> None:
    with track_fold(config, folder, fold, RunLog(None)) as tracker:
        tracker.log({"train/loss": 0.5}, 7)


def test_without_a_key_it_logs_offline(make_config: MakeConfig, calls: list[dict[str, Any]], tmp_path: Path) -> None:
    track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")
    assert [call["mode"] for call in calls] == ["offline"]


def test_with_a_key_it_logs_online(
    make_config: MakeConfig, calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_key(monkeypatch)
    track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")
    assert [call["mode"] for call in calls] == ["online"]


def test_offline_by_environment_wins_over_a_key(
    make_config: MakeConfig, calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_key(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")
    assert [call["mode"] for call in calls] == ["offline"]


def test_wandb_disabled_by_environment_stays_disabled(
    make_config: MakeConfig, calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")
    assert [call["mode"] for call in calls] == ["disabled"]


def test_a_key_in_netrc_counts_and_one_for_another_host_does_not(
    make_config: MakeConfig, calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for host in (urlsplit(wandb.Settings().base_url).hostname, "example.org"):
        (tmp_path / "netrc").write_text(f"machine {host} login user password {'x' * 40}\n")
        (tmp_path / "netrc").chmod(0o600)
        track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")
    (tmp_path / "netrc").write_text("this is no netrc")
    track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")
    assert [call["mode"] for call in calls] == ["online", "offline", "offline"]


def test_a_server_that_does_not_answer_is_not_waited_for(
    make_config: MakeConfig, calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or FakeRun())
    monkeypatch.setattr(tracking, "getproxies", dict)

    def refuse(address: tuple[str, int], timeout: float) -> None:
        assert timeout <= 5
        raise TimeoutError

    monkeypatch.setattr(tracking.socket, "create_connection", refuse)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    give_key(monkeypatch)
    track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")
    assert [call["mode"] for call in calls] == ["offline"]


def test_one_group_a_run_and_one_run_a_fold(
    make_config: MakeConfig, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = make_config(tracking={"wandb": True, "entity": "team"}, project={"name": "pages"})
    for fold in (0, 1):
        track(config, tmp_path / "v1-abc", fold)
    assert {call["group"] for call in calls} == {"v1-abc"}
    assert [call["name"] for call in calls] == ["v1-abc-fold0", "v1-abc-fold1"]
    assert {(call["project"], call["entity"]) for call in calls} == {("pages", "team")}
    assert [call["config"]["fold"] for call in calls] == [0, 1]
    assert all(call["run"].logged == [({"train/loss": 0.5}, 7)] for call in calls)
    assert all(call["run"].finished == [0] for call in calls)
    track(make_config(tracking={"wandb": True, "project": "other"}), tmp_path / "v1-abc")
    assert calls[-1]["project"] == "other"


def test_off_and_on_other_processes_nothing_is_started(
    make_config: MakeConfig, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    track(make_config(), tmp_path)
    track(make_config(tracking={"wandb": True}), None)
    assert not calls


@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.CommError("no network"),
        wandb.errors.UsageError("bad key"),
        OSError("disk"),
        TimeoutError(),
        RuntimeError("wandb-core died"),
        ValueError("bad project"),
    ],
)
def test_a_wandb_that_does_not_start_is_told_and_training_goes_on(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    calls: list[dict[str, Any]],
) -> None:
    give_key(monkeypatch)

    def fail(**options: Any) -> None:
        calls.append(options)
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    with RunLog(tmp_path / "l.log") as log:
        with track_fold(make_config(tracking={"wandb": True}), tmp_path / "v1-abc", 0, log) as tracker:
            tracker.log({"a": 1.0}, 1)
        log.line("went on")
    text = (tmp_path / "l.log").read_text()
    assert "[TRACKING] W&B online did not start" in text and "[TRACKING] W&B offline did not start" in text
    assert "went on" in text and [call["mode"] for call in calls] == ["online", "offline"]


def test_an_unreachable_server_falls_back_to_offline(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    give_key(monkeypatch)
    start = wandb.init

    def fail_online(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return start(**options)

    monkeypatch.setattr(wandb, "init", fail_online)
    track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")
    assert [call["mode"] for call in calls] == ["offline"]
    assert calls[0]["run"].logged


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_wandb_that_fails_later_does_not_stop_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, calls: list[dict[str, Any]]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("gone")

    monkeypatch.setattr(FakeRun, where, fail)
    track(make_config(tracking={"wandb": True}), tmp_path / "v1-abc")


def test_a_fold_that_fails_is_marked_and_its_error_goes_on(
    make_config: MakeConfig, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    config = make_config(tracking={"wandb": True})
    with pytest.raises(KeyError, match="mine"), track_fold(config, tmp_path / "v1-abc", 0, RunLog(None)):
        raise KeyError("mine")
    assert calls[0]["run"].finished == [1]
